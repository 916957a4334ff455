"""Speed and memory, in ratios of one run: ``make bench`` writes ``data/results/bench.json``.

Random weights and noise stand in for models and photographs: nothing can be learnt from them, and they cost the same.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.io import decode_jpeg, read_file
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as VF

from mclip.config import DistillConfig, TrainConfig, closest, require
from mclip.deploy.cost import Call, latency, random_model
from mclip.files import DATA
from mclip.objectives import Contrastive, Distillation
from mclip.pairs import BatchSource, Pairs, Targets
from mclip.pictures import Crops
from mclip.recipes import BASE, student_prepare
from mclip.results import make_result, save_result
from mclip.sources.loading import load_pairs
from mclip.targets import embed_captions, embed_pictures
from mclip.teacher import load_teacher
from mclip.text_encoder import LightConv, light_conv_reference
from mclip.train import train

FILE = DATA / "results" / "bench.json"
Row = dict[str, Any]
NO_MODEL = {"name": "random weights", "parameters": 0, "sha256": "0" * 64}
ALL_TERMS = DistillConfig(phases=(0.0, 0.0, 0.0), ramp=0.0)
SENTENCE = "a small red dog runs along the beach beside two men who throw a ball"


def row(what: str, value: float, unit: str = "times", bar: str = "", **more: Any) -> Row:
    """One line of the table: what was measured, and the aim ``bar``, such as "at least 20"."""
    return {"what": what, "value": float(value), "unit": unit, "bar": bar, **more}


class Noise:
    """Pictures (N, 3, side, side) uint8 that are drawn when they are read, and take no memory before."""

    dtype = np.dtype(np.uint8)

    def __init__(self, count: int, side: int) -> None:
        self.shape = (count, 3, side, side)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.random.default_rng(rows.tolist()).integers(0, 256, (len(rows), *self.shape[1:]), np.uint8)


def student_and_batches(preset: str, batch_size: int, count: int = 1) -> tuple[nn.Module, BatchSource]:
    """A student with random weights, and ``count`` batches of noise, captions of eleven words and random targets."""
    model, config = random_model(preset)
    size, rng = batch_size * count, np.random.default_rng(0)
    captions = [[" ".join(rng.choice(SENTENCE.split(), 11))] for _ in range(size)]
    pairs = Pairs(Noise(size, config.image.image_size), captions, "noise", "noise")
    vectors = rng.standard_normal((2, size, 512))
    targets = Targets(*(vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).astype(np.float16), 100.0, "noise")
    return model, BatchSource(pairs, model.tokenizer, student_prepare(config), batch_size, 0, targets)


def pairs_per_second(preset: str, batch_size: int, count: int, pieces: int = 1) -> float:
    """Median pace of distillation steps with all three terms, through the one training loop, once it is warm."""
    model, source = student_and_batches(preset, batch_size, count)
    settings = TrainConfig(
        max_epochs=1, batch_size=batch_size, accumulate_grad_batches=pieces, progress=False, accelerator="cpu"
    )
    objective, clock = Distillation(ALL_TERMS, (model.config.embed_dim,) * 2, 512, 100.0), []
    with tempfile.TemporaryDirectory() as folder:
        run = {"objective": objective, "out_dir": folder}
        train(model, source, settings, on_record=lambda record: clock.append(time.perf_counter()), **run)
    warm = np.diff(clock)[3:]
    return batch_size * pieces / float(np.median(warm)) if len(warm) else 0.0


def steps(batch_size: int = 16, count: int = 16) -> Iterator[Row]:
    """Steps of the real-size students on cached ViT-B/32 targets, 224 pixels."""
    for name, bar in (("klmobile", 20), ("mobile-512", 30)):
        what = f"distillation step, {name}, 224 px, batch {batch_size}, cached targets"
        yield row(what, pairs_per_second(name, batch_size, count), "pairs/s", f"at least {bar}", key=name)


def write_photographs(folder: str, count: int = 256) -> Path:
    """A CSV of JPEGs of 500 x 375 pixels, as smooth as photographs, in ``folder``."""
    rng = np.random.default_rng(0)
    lines = ["file_name,caption"]
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (19, 25, 3), dtype=np.uint8)).resize((500, 375))
        noise = rng.integers(-12, 13, (375, 500, 3))
        picture = np.clip(np.asarray(coarse, np.int16) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(Path(folder, f"{number}.jpg"), quality=85)
        lines.append(f"{number}.jpg,picture {number}")
    table = Path(folder, "pairs.csv")
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def targets(count: int = 256) -> Iterator[Row]:
    """Pace of a ViT-B/32 that embeds JPEGs and captions for the cache, and the bytes that each takes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(open_clip.create_model("ViT-B-32").state_dict(), f"{folder}/random.pt")
        teacher = load_teacher("ViT-B-32", f"{folder}/random.pt")
        pairs = load_pairs(write_photographs(folder, count), 64, progress=False)
        begun = time.perf_counter()
        embedded = embed_pictures(teacher, pairs, np.arange(count))
        between = time.perf_counter()
        embed_captions(teacher, pairs, range(count))
        seconds = {"pictures": between - begun, "captions": time.perf_counter() - between}
    for kind, taken in seconds.items():
        yield row(f"{kind} embedded by ViT-B/32 for the cache", count / taken, f"{kind}/s", key=f"teacher {kind}")
    yield row("size of a ViT-B/32 target", embedded[0].nbytes, "bytes", key="bytes of a target")


def ratio(what: str, forms: dict[str, Call], rounds: int, bar: str = "") -> Row:
    """How many times as long the first of two forms takes as the second."""
    milliseconds = {name: clock["median"] for name, clock in latency(forms, rounds, 1).items()}
    first, second = milliseconds.values()
    return row(what, first / second, bar=bar, milliseconds=milliseconds)


def loading(rounds: int = 3) -> Iterator[Row]:
    """Decode, crop at random and resize to 224 pixels: our batches against bare loops on as many threads, in turns."""
    scale, shape = (0.5, 1.0), (3 / 4, 4 / 3)

    def with_pillow(file: str) -> np.ndarray:
        picture = Image.open(file).convert("RGB")
        top, left, height, width = RandomResizedCrop.get_params(picture, scale, shape)
        box = (left, top, left + width, top + height)
        return np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC, box=box)).transpose(2, 0, 1)

    def with_torchvision(file: str) -> np.ndarray:
        picture = decode_jpeg(read_file(file))
        box = RandomResizedCrop.get_params(picture, scale, shape)
        return VF.resized_crop(picture, *box, [224, 224], VF.InterpolationMode.BICUBIC, antialias=True).numpy()

    def bare(read: Callable[[str], np.ndarray]) -> None:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            pictures = list(pool.map(read, pairs.files))
        for start in range(0, len(pictures), 64):
            np.stack(pictures[start : start + 64])

    with tempfile.TemporaryDirectory() as folder:
        pairs = load_pairs(write_photographs(folder), 224, decoding="always", progress=False)
        tokenizer = random_model("course")[0].tokenizer
        source = BatchSource(pairs, tokenizer, lambda pixels: pixels, 64, 0, crops=Crops(scale[0], 0, 0))
        for name, read in (("Pillow", with_pillow), ("torchvision.io", with_torchvision)):
            forms = {name: lambda read=read: bare(read), "ours": lambda: list(source.epoch(0))}
            what = f"224 px JPEGs decoded, cropped and resized, against a bare loop of {name}"
            yield ratio(what, forms, rounds, "at least 0.9")


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns in a process of its own, whose peak of memory is its own too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def peak_megabytes() -> float:
    """Peak memory of this process in MB (2^20 bytes); Linux only, whose getrusage would count the parent's peak too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _peak_of_step(preset: str, batch_size: int, pieces: int) -> float:
    pairs_per_second(preset, batch_size, pieces, pieces)
    return peak_megabytes()


def memory(preset: str = "mobile-512", batch_size: int = 128, pieces: int = 32) -> Iterator[Row]:
    """Peak memory of one large step in pieces against that of one piece; all terms, all in-batch negatives."""
    one, many = (in_new_process(_peak_of_step, preset, batch_size, count) for count in (1, pieces))
    size = f"{pieces * batch_size:,} pairs in pieces of {batch_size} against one of {batch_size}"
    yield row(f"peak memory of a step of {size}, {preset}", many / one, bar="at most 1.3", megabytes=[many, one])


def _open_table(file: str) -> tuple[float, float]:
    before, begun = psutil.Process().memory_info().rss / 2**20, time.perf_counter()
    load_pairs(file, 64, progress=False)
    return time.perf_counter() - begun, peak_megabytes() - before


def million(rows: int = 1_000_000) -> Iterator[Row]:
    """Open a CSV of a million rows, each with its own picture, which is not decoded."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "pairs.csv")
        with table.open("w", encoding="utf-8") as handle:
            handle.write("file_name,caption\n")
            for number in range(rows):
                name = f"{number:09d}.jpg"
                Path(folder, name).touch()
                handle.write(f"{name},a person rides a brown horse along the beach at sunset number {number}\n")
        seconds, megabytes = in_new_process(_open_table, str(table))
    what = f"a CSV of {rows:,} rows and pictures opened"
    yield row(what, seconds, "s", "at most 5")
    yield row(f"{what}: memory beyond that of the imports", megabytes, "MB", "at most 600")


def backward(module: nn.Module, loss: Callable[[], Tensor]) -> Call:
    """A forward and a backward pass; the optimiser is left out, because it is the same in all forms."""

    @torch.inference_mode(False)  # in which latency calls
    @torch.enable_grad()
    def step() -> None:
        loss().backward()
        module.zero_grad(set_to_none=True)

    return step


def distillation(batch_size: int = 64, rounds: int = 12) -> Iterator[Row]:
    """What cached distillation adds to a step of the course's student."""
    model, source = student_and_batches("course", batch_size)
    batch = next(source.epoch(0))
    all_terms = Distillation(ALL_TERMS, (model.config.embed_dim,) * 2, 512, 100.0)

    def loss(objective: Contrastive, names: list[str]) -> Tensor:
        return sum(objective(model(batch.images, batch.tokens), batch, names, 4.0).values())

    forms = {
        "distillation": backward(model, lambda: loss(all_terms, ["original", "feature", "response"])),
        "base": backward(model, lambda: loss(Contrastive(BASE), ["original"])),
    }
    what = "distillation step with cached targets against a step of the student alone, course"
    yield ratio(what, forms, rounds, "at most 1.15")


def forms(rounds: int = 40) -> Iterator[Row]:
    """LightConv as a banded matrix against the plain form."""
    torch.manual_seed(0)
    conv, x = LightConv(256, 8, 15), torch.randn(64, 32, 256, requires_grad=True)
    plain = backward(conv, lambda: light_conv_reference(x, conv.weight.softmax(1)).square().sum())
    matrix = backward(conv, lambda: conv(x).square().sum())
    what = "LightConv as conv1d against a banded matrix, T = 32"
    yield ratio(what, {"conv1d": plain, "matrix": matrix}, rounds, "at least 4")


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    part.__name__: part for part in (steps, targets, loading, memory, million, distillation, forms)
}


def describe_machine() -> dict[str, Any]:
    """Processor and cores; and how many processes wanted to run in the last minute: 1 is this one alone."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text(encoding="utf-8")) if file.exists() else []
    return {"processor": (names or [platform.processor()])[0], "cores": os.cpu_count(), "load": os.getloadavg()[0]}


def choose(only: list[str] | None, parts: Collection[str]) -> list[str]:
    """The names of ``only``, or of all ``parts``; ConfigError for one that is no part."""
    for name in only or ():
        require(name in parts, "only", name, closest(name, parts))
    return only or list(parts)


def bench(only: list[str] | None = None, out: str = "") -> None:
    """Measure, print, and keep one record of each part; a part that is not measured keeps its old rows.

    Args:
        only: parts to measure, all by default: steps, targets, loading, memory, million, distillation, forms.
        out: file of the records; data/results/bench.json if empty.
    """
    for name in choose(only, PARTS):
        begun, rows = time.perf_counter(), list(PARTS[name]())
        for each in rows:
            print(f"{each['what']}: {each['value']:.2f} {each['unit']} ({each['bar']})", flush=True)
        metrics, details = {each["what"]: each["value"] for each in rows}, {"rows": rows, "machine": describe_machine()}
        seconds = time.perf_counter() - begun
        record = make_result("bench", name, "none", len(rows), NO_MODEL, metrics, seconds=seconds, details=details)
        save_result(out or FILE, record)
