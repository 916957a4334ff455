"""Speed and memory, in ratios of one run: ``make bench`` writes ``data/results/bench.json``.

Two forms of the same work are timed in turns, so that a slow moment meets both. Random weights and noise stand in for
models and photographs: nothing can be learnt from them, and they cost the same.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.io import decode_jpeg, read_file
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as VF

from mclip.config import PRESETS, DistillConfig, TrainConfig, closest, require
from mclip.deploy.cost import random_model
from mclip.evaluate import BATCH_SIZE, embed_images
from mclip.files import DATA
from mclip.objectives import Contrastive, Distillation
from mclip.pairs import Batch, BatchSource, Pairs, Targets
from mclip.pictures import Crops
from mclip.recipes import BASE, student_prepare
from mclip.results import make_result, save_result
from mclip.scenes.world import SceneConfig
from mclip.sources.loading import load_pairs
from mclip.targets import OnlineTargets, embed_captions, embed_pictures, get_targets
from mclip.teacher import Teacher, load_teacher
from mclip.text_encoder import LightConv, TextEncoder, light_conv_reference, padding_mask
from mclip.train import train

FILE = DATA / "results" / "bench.json"
Row = dict[str, Any]
Step = Callable[[], Any]
NO_MODEL = {"name": "random weights", "parameters": 0, "sha256": "0" * 64}
SENTENCE = "a small red dog runs along the beach beside two men who throw a ball"
ALL_TERMS = DistillConfig(phases=(0.0, 0.0, 0.0), ramp=0.0)
TERMS = ["original", "feature", "response"]


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

    def __getitem__(self, rows: np.ndarray | int) -> np.ndarray:
        several = np.atleast_1d(rows)
        shape = (len(several), *self.shape[1:])
        pictures = np.random.default_rng(several.tolist()).integers(0, 256, shape, np.uint8)
        return pictures if np.ndim(rows) else pictures[0]


def random_pairs(count: int, side: int) -> Pairs:
    """Noise with captions of eleven words."""
    rng = np.random.default_rng(0)
    captions = [[" ".join(rng.choice(SENTENCE.split(), 11))] for _ in range(count)]
    return Pairs(Noise(count, side), captions, "noise", "noise")


def random_targets(count: int, width: int = 512) -> Targets:
    """Unit vectors in place of a teacher's embeddings."""
    vectors = np.random.default_rng(1).standard_normal((2, count, width))
    images, texts = (vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).astype(np.float16)
    return Targets(images, texts, 100.0, "noise")


def random_teacher() -> Teacher:
    """The architecture of OpenAI's ViT-B/32 with random weights, loaded by path as the real ones are."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(open_clip.create_model("ViT-B-32").state_dict(), f"{folder}/random.pt")
        return load_teacher("ViT-B-32", f"{folder}/random.pt")


@contextmanager
def photographs(count: int = 256) -> Iterator[Path]:
    """A CSV of JPEGs of 500 x 375 pixels, as smooth as photographs."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        lines = ["file_name,caption"]
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (19, 25, 3), dtype=np.uint8)).resize((500, 375))
            noise = rng.integers(-12, 13, (375, 500, 3))
            picture = np.clip(np.asarray(coarse, np.int16) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(Path(name, f"{number}.jpg"), quality=85)
            lines.append(f"{number}.jpg,picture {number}")
        table = Path(name, "pairs.csv")
        table.write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield table


def batches(model: Any, pairs: Pairs, batch_size: int, targets: Any = None, crops: Crops | None = None) -> BatchSource:
    """Batches of ``pairs`` as the student ``model`` reads them, in the order of seed 0."""
    return BatchSource(pairs, model.tokenizer, student_prepare(model.config), batch_size, 0, targets, crops)


def in_turns(forms: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each form over ``rounds`` turns; one turn before them does not count."""
    clock: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds + 1):
        for name, form in forms.items():
            begun = time.perf_counter()
            form()
            clock[name].append(time.perf_counter() - begun)
    return {name: float(np.median(times[1:])) for name, times in clock.items()}


def ratio(what: str, forms: Mapping[str, Step], rounds: int, bar: str = "") -> Row:
    """How many times as long the first of two forms takes as the second."""
    seconds = in_turns(forms, rounds)
    first, second = seconds.values()
    return row(what, first / second, bar=bar, seconds=seconds)


def pairs_per_second(model: Any, source: BatchSource, width: int, settings: TrainConfig, teacher: int = 512) -> float:
    """Median pace of distillation steps with all three terms, through the one training loop, once it is warm."""
    objective, clock = Distillation(ALL_TERMS, (width, width), teacher, 100.0), []
    with tempfile.TemporaryDirectory() as folder:
        options = {"objective": objective, "out_dir": folder}
        train(model, source, settings, on_record=lambda record: clock.append(time.perf_counter()), **options)
    warm = np.diff(clock)[3:]
    step = float(np.median(warm)) if len(warm) else np.inf
    return settings.batch_size * settings.accumulate_grad_batches / step


def one_epoch(batch_size: int, **changes: Any) -> TrainConfig:
    """Settings of one pass on the processor."""
    return TrainConfig(max_epochs=1, batch_size=batch_size, progress=False, accelerator="cpu", **changes)


def steps(batch_size: int = 16, count: int = 16) -> Iterator[Row]:
    """Steps of the real-size students on cached ViT-B/32 targets, 224 pixels."""
    pairs, targets = random_pairs(batch_size * count, 224), random_targets(batch_size * count)
    for name, bar in (("klmobile", 20), ("mobile-512", 30)):
        model, config = random_model(name)
        source = batches(model, pairs, batch_size, targets)
        pace = pairs_per_second(model, source, config.embed_dim, one_epoch(batch_size))
        what = f"distillation step, {name}, 224 px, batch {batch_size}, cached targets"
        yield row(what, pace, "pairs/s", f"at least {bar}", key=name)


def teacher_in_the_loop(batch_size: int = 16, count: int = 10) -> Iterator[Row]:
    """Cached targets against a teacher that embeds each batch: our student, and an open_clip one of equal size."""
    pairs, teacher = random_pairs(batch_size * count, 224), random_teacher()
    for name in ("mobile-512", "ViT-B-32"):
        paces = []
        for targets in (random_targets(len(pairs)), OnlineTargets(teacher, pairs)):
            if name == "ViT-B-32":
                model, tokenizer = open_clip.create_model(name, output_dict=True), open_clip.get_tokenizer(name)
                source = BatchSource(pairs, tokenizer, teacher.prepare, batch_size, 0, targets)
            else:
                model, _ = random_model(name)
                source = batches(model, pairs, batch_size, targets)
            paces.append(pairs_per_second(model, source, 512, one_epoch(batch_size)))
        what = f"cached targets against an online ViT-B/32, student {name}"
        yield row(what, paces[0] / paces[1], bar="at least 2", paces=paces)


def targets(count: int = 256) -> Iterator[Row]:
    """Pace of a ViT-B/32 that embeds JPEGs and captions for the cache, and the bytes that each takes."""
    with photographs(count) as table:
        teacher, pairs = random_teacher(), load_pairs(table, 64, progress=False)
        begun = time.perf_counter()
        embedded = embed_pictures(teacher, pairs, np.arange(count))
        between = time.perf_counter()
        embed_captions(teacher, pairs, range(count))
        seconds = {"pictures": between - begun, "captions": time.perf_counter() - between}
    for kind, taken in seconds.items():
        yield row(f"{kind} embedded by ViT-B/32 for the cache", count / taken, f"{kind}/s", key=f"teacher {kind}")
    yield row("size of a ViT-B/32 target", embedded[0].nbytes, "bytes", key="bytes of a target")


def views(count: int = 24) -> Iterator[Row]:
    """Steps on four cached crops of each scene against an online teacher and new crops, the course's student."""
    teacher, pairs = load_teacher(), load_pairs(scenes=SceneConfig(64 * count, 64, "train"), progress=False)
    paces = []
    for crops, online in ((Crops(0.6, 4, 0), False), (Crops(0.6, 0, 0), True)):
        model, config = random_model("course")
        source = batches(model, pairs, 64, get_targets(teacher, pairs, online, crops, False), crops)
        settings = one_epoch(64, crop_scale=0.6, views=4)
        paces.append(pairs_per_second(model, source, config.embed_dim, settings, teacher.embed_dim))
    yield row("steps on four cached crops against an online teacher, course, scenes", paces[0] / paces[1], paces=paces)


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

    with photographs() as table:
        pairs = load_pairs(table, 224, decoding="always", progress=False)
        source = batches(random_model("course")[0], pairs, 64, crops=Crops(scale[0], 0, 0))
        source.prepare = lambda pixels: pixels
        loops = {
            "ours": lambda: list(source.epoch(0)),
            "Pillow": lambda: bare(with_pillow),
            "torchvision.io": lambda: bare(with_torchvision),
        }
        seconds = in_turns(loops, rounds)
    for name in ("Pillow", "torchvision.io"):
        what = f"224 px JPEGs decoded, cropped and resized, against a bare loop of {name}"
        yield row(what, seconds[name] / seconds["ours"], bar="at least 0.9", seconds=seconds)


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns in a process of its own, whose peak of memory is its own too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def peak_megabytes() -> float:
    """Peak memory of this process in MB (2^20 bytes); Linux only, whose getrusage would count the parent's peak too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _peak_of_step(pieces: int, batch_size: int, preset: str) -> float:
    pairs = random_pairs(pieces * batch_size, PRESETS[preset].image.image_size)
    model, config = random_model(preset)
    source = batches(model, pairs, batch_size, random_targets(len(pairs)))
    pairs_per_second(model, source, config.embed_dim, one_epoch(batch_size, accumulate_grad_batches=pieces))
    return peak_megabytes()


def memory(batch_size: int = 128, pieces: int = 32, preset: str = "mobile-512") -> Iterator[Row]:
    """Peak memory of one large step in pieces against that of one piece; all terms, all in-batch negatives."""
    one, many = (in_new_process(_peak_of_step, count, batch_size, preset) for count in (1, pieces))
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


def backward(module: nn.Module, forward: Callable[[], Tensor]) -> Step:
    """A forward and a backward pass, from the sum of the squares of what ``forward`` returns."""

    def step() -> None:
        forward().square().sum().backward()
        module.zero_grad(set_to_none=True)

    return step


def training_step(model: Any, objective: Contrastive, batch: Batch, names: list[str]) -> Step:
    """Forward and backward of the terms called ``names``, without the optimiser, which is the same in all forms."""

    def step() -> None:
        sum(objective(model(batch.images, batch.tokens), batch, names, 4.0).values()).backward()
        model.zero_grad(set_to_none=True)

    return step


def distillation(batch_size: int = 64, rounds: int = 12) -> Iterator[Row]:
    """What cached distillation adds to a step of the course's student."""
    model, config = random_model("course")
    pairs, targets = random_pairs(batch_size, config.image.image_size), random_targets(batch_size)
    batch = next(batches(model, pairs, batch_size, targets).epoch(0))
    all_terms = Distillation(ALL_TERMS, (config.embed_dim,) * 2, 512, 100.0)
    forms = {
        "distillation": training_step(model, all_terms, batch, TERMS),
        "base": training_step(model, Contrastive(BASE), batch, ["original"]),
    }
    what = "distillation step with cached targets against a step of the student alone, course"
    yield ratio(what, forms, rounds, "at most 1.15")


def existing(
    batch_size: int = 16, rounds: int = 3, preset: str = "klmobile", teacher: Teacher | None = None
) -> Iterator[Row]:
    """A step of the structure that KLmobile's has against ours, both on the student ``preset``.

    There the pictures go back to PIL for the teacher's own preparation, the teacher embeds them and the captions in
    every step, the image encoder runs twice, and captions are padded to 77 tokens.
    """
    teacher, (model, config) = teacher or random_teacher(), random_model(preset)
    pairs, targets = random_pairs(batch_size, config.image.image_size), random_targets(batch_size, teacher.embed_dim)
    batch = next(batches(model, pairs, batch_size, targets).epoch(0))
    objective = Distillation(ALL_TERMS, (config.embed_dim,) * 2, teacher.embed_dim, 100.0)
    captions = [own[0] for own in pairs.captions]

    def theirs() -> None:
        with torch.inference_mode():
            pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in batch.pixels]
            image = teacher.model.encode_image(torch.stack([teacher.transform(p) for p in pictures]), normalize=True)
            text = teacher.model.encode_text(teacher.tokenize(captions), normalize=True)
        seen = Batch(batch.pixels, batch.tokens, batch.index, image.clone(), text.clone(), batch.prepare)
        image_features = model.image_encoder(batch.images)
        text_features = padded_features(model.text_encoder, batch.tokens)
        again = model.image_encoder(batch.images)  # the pictures once more, as their own negatives
        output = {
            "image_features": F.normalize(model.image_projection(image_features), dim=-1),
            "text_features": F.normalize(model.text_projection(text_features), dim=-1),
            "logit_scale": model.logit_scale.exp(),
        }
        (sum(objective(output, seen, TERMS, 4.0).values()) + 0 * again.sum()).backward()
        model.zero_grad(set_to_none=True)

    forms = {"theirs": theirs, "ours": training_step(model, objective, batch, TERMS)}
    yield ratio(f"a step of the structure of KLmobile's against ours, {preset}, batch {batch_size}", forms, rounds)


def padded_features(encoder: TextEncoder, tokens: Tensor) -> Tensor:
    """What ``encoder`` says of ``tokens`` (B, T) that are padded to its whole context: the same, for more work."""
    tokens = F.pad(tokens, (0, len(encoder.position_embedding) - tokens.shape[1]))
    padding = padding_mask(tokens)
    x = encoder.dropout(encoder.embed(tokens))
    for block in encoder.blocks:
        x = block(x, padding)
    return encoder.norm(x[torch.arange(len(x)), (~padding).sum(1) - 1])


def forms(rounds: int = 10) -> Iterator[Row]:
    """LightConv as a matrix, captions cut to the longest, channels innermost: each against the plain form."""
    torch.manual_seed(0)
    conv, x = LightConv(256, 8, 15), torch.randn(64, 32, 256, requires_grad=True)
    plain, matrix = (
        backward(conv, lambda: light_conv_reference(x, conv.weight.softmax(1))),
        backward(conv, lambda: conv(x)),
    )
    what = "LightConv as conv1d against a banded matrix, T = 32"
    yield ratio(what, {"conv1d": plain, "matrix": matrix}, 4 * rounds, "at least 4")
    klmobile, _ = random_model("klmobile")
    encoder, tokens = klmobile.text_encoder, klmobile.tokenizer([SENTENCE] * 16)
    padded, cut = (
        backward(encoder, lambda: padded_features(encoder, tokens)),
        backward(encoder, lambda: encoder(tokens)),
    )
    what = "captions of fifteen words padded to 77 tokens against cut, klmobile"
    yield ratio(what, {"padded": padded, "cut": cut}, rounds)
    pictures, layouts = torch.randn(16, 3, 224, 224), {}
    for name, layout in (("channels first", torch.contiguous_format), ("channels last", torch.channels_last)):
        half, laid = (
            random_model("mobile-512")[0].image_encoder.to(memory_format=layout),
            pictures.contiguous(memory_format=layout),
        )
        layouts[name] = backward(half, lambda half=half, laid=laid: half(laid))
    yield ratio("image encoder, channels first against last, mobile-512", layouts, rounds)


def evaluation(count: int = 4, singles: int = 32, rounds: int = 7) -> Iterator[Row]:
    """Pictures embedded in batches, as evaluation does, against one by one: seconds of a picture, course's student."""
    model, config = random_model("course")
    pictures = random_pairs(count * BATCH_SIZE, config.image.image_size).images[np.arange(count * BATCH_SIZE)]
    one_by_one = lambda: embed_images(model, pictures[:singles], 1)  # noqa: E731
    seconds = in_turns({"one by one": one_by_one, "batches": lambda: embed_images(model, pictures)}, rounds)
    each = {"one by one": seconds["one by one"] / singles, "batches": seconds["batches"] / len(pictures)}
    what = f"pictures embedded one by one against batches of {BATCH_SIZE}, course, 64 px"
    yield row(what, each["one by one"] / each["batches"], bar="at least 20", seconds=each)


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "steps": steps,
    "teacher": teacher_in_the_loop,
    "targets": targets,
    "views": views,
    "loading": loading,
    "memory": memory,
    "million": million,
    "distillation": distillation,
    "existing": existing,
    "forms": forms,
    "evaluation": evaluation,
}


def describe_machine() -> dict[str, Any]:
    """Processor and cores; and how many processes wanted to run in the last minute: 1 is this one alone."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text(encoding="utf-8")) if file.exists() else []
    return {"processor": (names or [platform.processor()])[0], "cores": os.cpu_count(), "load": os.getloadavg()[0]}


def bench(only: list[str] | None = None, out: str = "") -> None:
    """Measure, print, and keep one record of each part; a part that is not measured keeps its old rows.

    Args:
        only: parts to measure, all by default: steps, teacher, targets, views, loading, memory, million, distillation,
            existing, forms, evaluation.
        out: file of the records; data/results/bench.json if empty.
    """
    for name in only or ():
        require(name in PARTS, "only", name, closest(name, PARTS))
    for name in only or PARTS:
        begun, rows = time.perf_counter(), list(PARTS[name]())
        for each in rows:
            print(f"{each['what']}: {each['value']:.2f} {each['unit']} ({each['bar']})", flush=True)
        metrics, details = {each["what"]: each["value"] for each in rows}, {"rows": rows, "machine": describe_machine()}
        seconds = time.perf_counter() - begun
        record = make_result("bench", name, "none", len(rows), NO_MODEL, metrics, seconds=seconds, details=details)
        save_result(out or FILE, record)
