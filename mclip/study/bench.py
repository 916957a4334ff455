"""Speed and memory, in ratios of one run: ``make bench`` writes ``data/results/bench.json``.

Random weights and noise stand in for models and photographs: nothing can be learnt from them, and they cost the same.
"""

import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import psutil
import torch

from mclip.config import DistillConfig, TrainConfig, closest, require
from mclip.deploy.cost import random_model
from mclip.files import DATA
from mclip.objectives import Distillation
from mclip.pairs import BatchSource, Pairs, Targets
from mclip.recipes import student_prepare
from mclip.results import make_result, save_result
from mclip.scenes.world import SceneConfig, export_scenes, make_scenes
from mclip.sources.loading import load_pairs
from mclip.targets import embed_captions, embed_pictures
from mclip.teacher import load_teacher
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


def pairs_per_second(preset: str, batch_size: int, count: int, pieces: int = 1) -> float:
    """Median pace of distillation steps with all three terms, through the one training loop, once it is warm.

    ``count`` batches of noise have captions of eleven words and random targets.
    """
    model, config = random_model(preset)
    size, rng = batch_size * count, np.random.default_rng(0)
    captions = [[" ".join(rng.choice(SENTENCE.split(), 11))] for _ in range(size)]
    pairs = Pairs(Noise(size, config.image.image_size), captions, "noise", "noise")
    vectors = rng.standard_normal((2, size, 512))
    targets = Targets(*(vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).astype(np.float16), 100.0, "noise")
    source = BatchSource(pairs, model.tokenizer, student_prepare(config), batch_size, 0, targets)
    once = {"max_epochs": 1, "progress": False, "accelerator": "cpu"}
    settings = TrainConfig(batch_size=batch_size, accumulate_grad_batches=pieces, **once)
    objective, clock = Distillation(ALL_TERMS, (config.embed_dim,) * 2, 512, 100.0), []
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


def targets(count: int = 256) -> Iterator[Row]:
    """Pace of a ViT-B/32 that embeds JPEGs and captions for the cache, and the bytes that each takes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(open_clip.create_model("ViT-B-32").state_dict(), f"{folder}/random.pt")
        teacher = load_teacher("ViT-B-32", f"{folder}/random.pt")
        export_scenes(make_scenes(SceneConfig(count, 384), progress=False), f"{folder}/scenes")
        pairs = load_pairs(f"{folder}/scenes/captions.csv", 64, progress=False)
        begun = time.perf_counter()
        embedded = embed_pictures(teacher, pairs, np.arange(count))
        between = time.perf_counter()
        embed_captions(teacher, pairs, range(count))
        seconds = {"pictures": between - begun, "captions": time.perf_counter() - between}
    for kind, taken in seconds.items():
        yield row(f"{kind} embedded by ViT-B/32 for the cache", count / taken, f"{kind}/s", key=f"teacher {kind}")
    yield row("size of a ViT-B/32 target", embedded[0].nbytes, "bytes", key="bytes of a target")


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


PARTS: dict[str, Callable[[], Iterator[Row]]] = {part.__name__: part for part in (steps, targets, memory, million)}


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
        only: parts to measure, all by default: steps, targets, memory, million.
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
