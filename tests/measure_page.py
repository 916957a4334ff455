"""An exported student in a browser beside native ONNX Runtime, on the same machine in one run: data/results/web.json.

``python tests/measure_page.py FOLDER_OF_PHOTOGRAPHS`` after ``make phone``, or with ``--out_dir`` and
``--model_checkpoint`` after ``export --web`` of another student. It is no command of the package, because it needs
Playwright and Chromium, which come with the development tools.
"""

from __future__ import annotations

import base64
import random
import re
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from playwright.sync_api import sync_playwright

import mclip
from mclip.config import require
from mclip.deploy.cost import CAPTION, summary
from mclip.deploy.reader import Deployed
from mclip.deploy.web import PAGE, page_server
from mclip.files import DATA, read_json
from mclip.pictures import open_picture
from mclip.results import make_result, save_result, weights_sha256
from mclip.study.bench import describe_machine

FILE = DATA / "results" / "web.json"
READY = "() => !document.querySelector('#settings').disabled && document.querySelector('#check').textContent"
BARS = "() => document.querySelectorAll('#bars li').length"
CAMERA = "() => document.querySelector('#speed').textContent.includes('frames per second')"
EXAMINE = """async pairs => {
  const { examine } = await import(new URL("app.js", location).href);
  const pack = array => btoa(new Uint8Array(array.buffer).reduce((text, byte) => text + String.fromCharCode(byte), ""));
  const found = [];
  for (const [content, sentence] of pairs) {
    const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
    const { levels, image, ids, text } = await examine(new Blob([bytes]), sentence);
    found.push({ levels: pack(levels), image: pack(image), ids, text: pack(text) });
  }
  return found;
}"""
"""Pictures in base 64 and sentences -> what the page makes of each pair."""
CALL = """async ([name, sentence]) => {
  const { examine } = await import(new URL("app.js", location).href);
  return (await examine(await (await fetch(name)).blob(), sentence)).ms;
}"""
"""One picture and one sentence -> milliseconds of the image graph, and of tokenizer and text graph together."""


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def examine(page: Any, contents: list[bytes], sentences: list[str]) -> list[dict[str, np.ndarray]]:
    """What the page makes of each picture and sentence."""
    found = page.evaluate(EXAMINE, [[encoded(c), s] for c, s in zip(contents, sentences, strict=True)])
    kinds = {"levels": np.uint8, "image": np.float32, "text": np.float32}
    return [
        {"ids": each["ids"]} | {key: np.frombuffer(base64.b64decode(each[key]), kind) for key, kind in kinds.items()}
        for each in found
    ]


def same_answers(page: Any, student: tuple[Any, Any, Any], photographs: Path, count: int = 100) -> dict[str, float]:
    """For each set of sentences, how many of ``count`` photographs get PyTorch's answer on the page, in percent."""
    model, preprocess, tokenizer = student
    paths = sorted(path for path in photographs.iterdir() if path.suffix == ".jpg")
    paths = random.Random(1).sample(paths, min(count, len(paths)))
    sets = read_json(PAGE / "sets.json")
    sentences = [sentence for own in sets.values() for sentence in own]
    rows = max(len(paths), len(sentences))
    contents = [paths[row % len(paths)].read_bytes() for row in range(rows)]
    found = examine(page, contents, [sentences[row % len(sentences)] for row in range(rows)])
    images = np.stack([own["image"] for own in found[: len(paths)]])
    texts = np.stack([own["text"] for own in found[: len(sentences)]])
    with torch.inference_mode():
        batch = torch.stack([preprocess(open_picture(path)) for path in paths])
        own_images = model.encode_image(batch, normalize=True).numpy()
        own_texts = model.encode_text(tokenizer(sentences), normalize=True).numpy()
    same, start = {}, 0
    for name, own in sets.items():
        part = slice(start, start + len(own))
        start += len(own)
        answers = (images @ texts[part].T).argmax(1)
        same[name] = 100 * float((answers == (own_images @ own_texts[part].T).argmax(1)).mean())
    return same


def measure(page: Any, folder: Path, form: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of both halves in ``page``, which has loaded ``form``, and natively, in turns."""
    count = int(re.search(r"(\d+) thread", page.inner_text("#status"))[1])
    readers = {f"native, {n} thread{'s' * (n > 1)}": Deployed(folder, form, threads=n) for n in sorted({1, count})}
    size = next(iter(readers.values())).settings["size"]
    pixels, name = np.zeros((1, 3, size, size), np.float32), f"page, {count} thread{'s' * (count > 1)}"
    clock: dict[str, dict[str, list[float]]] = {each: {"image": [], "text": []} for each in (name, *readers)}
    for _ in range(rounds):
        for half, milliseconds in zip(("image", "text"), page.evaluate(CALL, ["icon-192.png", CAPTION]), strict=True):
            clock[name][half].append(milliseconds)
        for each, reader in readers.items():
            calls = {"image": partial(reader.encode_prepared, pixels), "text": partial(reader.encode_texts, [CAPTION])}
            for half, call in calls.items():
                begun = time.perf_counter()
                call()
                clock[each][half].append(1000 * (time.perf_counter() - begun))
    return {each: {half: summary(times[1:]) for half, times in halves.items()} for each, halves in clock.items()}


def page(
    photographs: str, out_dir: str = "runs/phone", model_checkpoint: str = "photo", rounds: int = 40, out: str = ""
) -> None:
    """Open the page in Chromium, and measure the first answer, frames per second, latency, and answers like PyTorch's.

    Args:
        photographs: a folder of JPEGs, of which 100 are asked about, such as flickr8k-mini/images.
        out_dir: a folder that export --web wrote.
        model_checkpoint: the student that was exported.
        rounds: calls of each half, two at least; the first one warms up.
        out: file of the record; data/results/web.json if empty.
    """
    chromium, folder, file = shutil.which("chromium"), Path(out_dir).expanduser(), Path(out or FILE)
    require(rounds >= 2, "rounds", rounds, "the first call is not counted; ask for two or more")
    require(chromium is not None, "chromium", None, "the page is measured in it; install it")
    student, model = mclip.load(model_checkpoint), Deployed(folder, check=False).manifest["model"]
    remedy = f"{out_dir} holds another student; export this one"
    require(weights_sha256(student[0]) == model["sha256"], "model_checkpoint", model_checkpoint, remedy)
    with page_server(out_dir, port=0) as server, sync_playwright() as driver:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        browser = driver.chromium.launch(executable_path=chromium, args=options)
        tab, begun = browser.new_page(), time.perf_counter()
        tab.set_default_timeout(300_000)
        tab.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        tab.set_input_files("#file", folder / "web" / "icon-192.png")
        tab.wait_for_function(BARS)
        metrics: dict[str, Any] = {"first_answer_seconds": time.perf_counter() - begun}
        tab.get_by_text("the page opens without network").wait_for()
        metrics["same_answers"] = same_answers(tab, student, Path(photographs).expanduser())
        metrics["int8"] = measure(tab, folder, "int8", rounds)
        tab.click("#camera")
        tab.wait_for_function(CAMERA)
        time.sleep(5)
        metrics["frames_per_second"] = float(re.search(r"([\d.]+) frames", tab.inner_text("#speed"))[1])
        tab.click("#camera")
        tab.check("#float32")
        tab.wait_for_function(READY)
        metrics["float32"] = measure(tab, folder, "float32", rounds)
        details = {"browser": browser.version, "caption": CAPTION, "machine": describe_machine()}
        browser.close()
        server.shutdown()
    small = [each for each in (folder / "web").rglob("*") if each.is_file()]
    small = [each for each in small if each.relative_to(folder / "web").parts[0] not in ("vendor", "float32")]
    metrics["megabytes_without_runtime"] = sum(each.stat().st_size for each in small) / 1e6
    save_result(file, make_result("efficiency", "page", "none", rounds, model, metrics, details=details))
    print(f"{file}: first answer after {metrics['first_answer_seconds']:.1f} s")


if __name__ == "__main__":
    auto_cli(page)
