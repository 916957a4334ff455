"""Speed and memory, each pair of figures measured in one run: ``make bench`` writes ``data/results/bench.json``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import psutil
import torch
from PIL import Image
from torch import nn
from torchvision.io import decode_jpeg, read_file
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as VF

from mclip.config import PRESETS, DistillConfig, TrainConfig, closest, require
from mclip.deploy.cost import random_model
from mclip.files import DATA, read_json, write_json
from mclip.objectives import Distillation
from mclip.pairs import BatchSource
from mclip.pictures import Crops
from mclip.results import describe_device, describe_machine, versions
from mclip.scenes.world import SceneConfig
from mclip.sources.loading import load_pairs
from mclip.study.bench_forms import batches, distillation, evaluation, existing_step, forms, in_turns
from mclip.study.noise import photographs, random_pairs, random_targets, random_teacher
from mclip.targets import OnlineTargets, embed_captions, embed_pictures, get_targets
from mclip.teacher import load_teacher
from mclip.train import train

WARM_UP = 3  # steps
Row = dict[str, Any]


def pairs_per_second(
    model: nn.Module, source: BatchSource, width: int, settings: TrainConfig, teacher_width: int = 512
) -> float:
    """Median pace of distillation steps with all three terms, through the one training loop."""
    objective = Distillation(DistillConfig(phases=(0.0, 0.0, 0.0), ramp=0.0), (width, width), teacher_width, 100.0)
    clock: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train(
            model,
            source,
            settings,
            objective=objective,
            out_dir=folder,
            on_record=lambda record: clock.append(time.perf_counter()),
        )
    step = np.median(np.diff(clock)[WARM_UP:]) if len(clock) > WARM_UP + 1 else np.inf
    return settings.batch_size * settings.accumulate_grad_batches / float(step)


def steps(batch_size: int = 16, count: int = 16) -> list[Row]:
    """Steps of the real-size students on cached ViT-B/32 targets, 224 pixels."""
    rows = []
    settings = TrainConfig(max_epochs=1, batch_size=batch_size, progress=False, accelerator="cpu")
    pairs, targets = random_pairs(batch_size * count, 224), random_targets(batch_size * count)
    for name, bar in (("klmobile", 20), ("mobile-512", 30)):
        model, config = random_model(name)
        source = batches(model, pairs, batch_size, targets)
        pace = pairs_per_second(model, source, config.embed_dim, settings)
        rows.append(
            {
                "what": f"distillation step, {name}, 224 px, batch {batch_size}, cached targets",
                "value": pace,
                "unit": "pairs/s",
                "bar": f"at least {bar}",
                "key": name,
            }
        )
    return rows


def teacher_in_the_loop(batch_size: int = 16, count: int = 10) -> list[Row]:
    """Cached targets against a teacher that embeds each batch: our student, and an open_clip one of equal size."""
    rows = []
    settings = TrainConfig(max_epochs=1, batch_size=batch_size, progress=False, accelerator="cpu")
    pairs = random_pairs(batch_size * count, 224)
    with tempfile.TemporaryDirectory() as folder:
        teacher = random_teacher(Path(folder))
    for name in ("mobile-512", "ViT-B-32"):
        paces = []
        for targets in (random_targets(len(pairs)), OnlineTargets([teacher], pairs)):
            if name == "ViT-B-32":
                model, tokenizer = open_clip.create_model(name, output_dict=True), open_clip.get_tokenizer(name)
                source = BatchSource(pairs, tokenizer, teacher.prepare, batch_size, 0, targets)
            else:
                model, _ = random_model(name)
                source = batches(model, pairs, batch_size, targets)
            paces.append(pairs_per_second(model, source, 512, settings))
        rows.append(
            {
                "what": f"cached targets against an online ViT-B/32, student {name}",
                "value": paces[0] / paces[1],
                "unit": "times",
                "bar": "at least 2",
                "pairs/s": paces,
            }
        )
    return rows


def targets(count: int = 256) -> list[Row]:
    """Pace of a ViT-B/32 that embeds JPEGs and captions for the cache, and the bytes that each takes."""
    with tempfile.TemporaryDirectory() as folder, photographs(count) as pictures:
        teacher, pairs = random_teacher(Path(folder)), load_pairs(pictures / "pairs.csv", 64, progress=False)
        begun = time.perf_counter()
        found = embed_pictures(teacher, pairs, np.arange(count))
        between = time.perf_counter()
        embed_captions(teacher, pairs, pairs.first_caption, range(count))
        paces = {"pictures": count / (between - begun), "captions": count / (time.perf_counter() - between)}
    rows = [
        {
            "what": f"{kind} embedded by ViT-B/32 for the cache",
            "value": pace,
            "unit": f"{kind}/s",
            "bar": "",
            "key": f"teacher {kind}",
        }
        for kind, pace in paces.items()
    ]
    size = {
        "what": "size of a ViT-B/32 target",
        "value": found[0].nbytes,
        "unit": "bytes",
        "bar": "",
        "key": "bytes of a target",
    }
    return [*rows, size]


def views(count: int = 24) -> list[Row]:
    """Steps on four cached crops of each scene against an online teacher and new crops, the course's student."""
    settings = TrainConfig(max_epochs=1, batch_size=64, progress=False, accelerator="cpu", crop_scale=0.6, views=4)
    teacher, pairs = load_teacher(), load_pairs(scenes=SceneConfig(64 * count, 64, "train"), progress=False)
    paces = []
    for crops, online in ((Crops(0.6, 4, 0), False), (Crops(0.6, 0, 0), True)):
        found = get_targets([teacher], pairs, online, crops, False)
        model, config = random_model("course")
        source = batches(model, pairs, 64, found, crops)
        paces.append(pairs_per_second(model, source, config.embed_dim, settings, teacher.embed_dim))
    what = "steps on four cached crops against an online teacher, course, scenes"
    return [{"what": what, "unit": "times", "value": paces[0] / paces[1], "bar": "", "pairs/s": paces}]


def loading(rounds: int = 3) -> list[Row]:
    """Decode, crop at random and resize to 224 pixels: our batches against bare loops on as many threads, in turns."""
    scale, ratio = (0.5, 1.0), (3 / 4, 4 / 3)

    def with_pillow(file: str) -> np.ndarray:
        picture = Image.open(file).convert("RGB")
        top, left, height, width = RandomResizedCrop.get_params(picture, scale, ratio)
        box = (left, top, left + width, top + height)
        return np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC, box=box)).transpose(2, 0, 1)

    def with_torchvision(file: str) -> np.ndarray:
        picture = decode_jpeg(read_file(file))
        box = RandomResizedCrop.get_params(picture, scale, ratio)
        return VF.resized_crop(picture, *box, [224, 224], VF.InterpolationMode.BICUBIC, antialias=True).numpy()

    with photographs() as folder:
        pairs = load_pairs(folder / "pairs.csv", 224, decoding="always", progress=False)
        source = BatchSource(
            pairs, random_model("course")[0].tokenizer, lambda x: x, 64, 0, crops=Crops(scale[0], 0, 0)
        )

        def ours() -> None:
            for _ in source.epoch(0):
                pass

        def bare(read: Callable[[str], np.ndarray]) -> Callable[[], None]:
            def loop() -> None:
                with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                    found = list(pool.map(read, pairs.files))
                [np.stack(found[start : start + 64]) for start in range(0, len(found), 64)]

            return loop

        loops = {"ours": ours, "Pillow": bare(with_pillow), "torchvision.io": bare(with_torchvision)}
        pace = {name: len(pairs) / seconds for name, seconds in in_turns(loops, rounds).items()}
    return [
        {
            "what": f"224 px JPEGs decoded, cropped and resized, against a bare loop of {name}",
            "unit": "times",
            "value": pace["ours"] / pace[name],
            "bar": "at least 0.9",
            "pictures/s": [pace["ours"], pace[name]],
        }
        for name in ("Pillow", "torchvision.io")
    ]


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns in a process of its own, whose peak of memory is its own too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def peak_megabytes() -> float:
    """Peak memory of this process in MB (2^20 bytes); Linux only, whose getrusage would count the parent's peak too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _peak_of_step(pieces: int, batch_size: int, preset: str) -> float:
    """Peak memory in MB of a process that takes a step of ``pieces`` batches."""
    settings = TrainConfig(max_epochs=1, batch_size=batch_size, accumulate_grad_batches=pieces, progress=False)
    pairs = random_pairs(pieces * batch_size, PRESETS[preset].image.image_size)
    model, config = random_model(preset)
    source = batches(model, pairs, batch_size, random_targets(len(pairs)))
    pairs_per_second(model, source, config.embed_dim, settings)
    return peak_megabytes()


def memory(batch_size: int = 128, pieces: int = 32, preset: str = "mobile-512") -> list[Row]:
    """Peak memory of one large step in pieces against that of one piece; all terms, all in-batch negatives."""
    one, many = (in_new_process(_peak_of_step, count, batch_size, preset) for count in (1, pieces))
    return [
        {
            "what": f"peak memory of a step of {pieces * batch_size:,} pairs in pieces of {batch_size} against one of "
            f"{batch_size}, {preset}",
            "value": many / one,
            "unit": "times",
            "bar": "at most 1.3",
            "MB": [many, one],
        }
    ]


def _open_table(file: str) -> tuple[float, float]:
    before, begun = psutil.Process().memory_info().rss / 2**20, time.perf_counter()
    load_pairs(file, 64, progress=False)
    return time.perf_counter() - begun, peak_megabytes() - before


def million(rows: int = 1_000_000) -> list[Row]:
    """Open a CSV of a million rows, each with its own picture, which is not decoded."""
    with tempfile.TemporaryDirectory() as folder:
        with Path(folder, "pairs.csv").open("w", encoding="utf-8") as handle:
            handle.write("file_name,caption\n")
            for number in range(rows):
                Path(folder, f"{number:09d}.jpg").touch()
                handle.write(
                    f"{number:09d}.jpg,a person rides a brown horse along the beach at sunset number {number}\n"
                )
        seconds, megabytes = in_new_process(_open_table, str(Path(folder, "pairs.csv")))
    what = f"a CSV of {rows:,} rows and pictures opened"
    beyond = f"{what}: memory beyond that of the imports"
    return [
        {"what": what, "value": seconds, "unit": "s", "bar": "at most 5"},
        {"what": beyond, "value": megabytes, "unit": "MB", "bar": "at most 600"},
    ]


def existing(batch_size: int = 16) -> list[Row]:
    """See :func:`~mclip.study.bench_forms.existing_step`."""
    with tempfile.TemporaryDirectory() as folder:
        return existing_step(random_teacher(Path(folder)), batch_size)


PARTS: dict[str, Callable[[], list[Row]]] = {
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


def bench(only: list[str] | None = None) -> None:
    """Measure, print, and keep in ``data/results/bench.json``; a part that is not measured keeps its old rows.

    Args:
        only: parts to measure, all by default: steps, teacher, targets, views, loading, memory, million, distillation,
            existing, forms, evaluation.
    """
    for name in only or ():
        require(name in PARTS, "only", name, closest(name, PARTS))
    file = DATA / "results" / "bench.json"
    kept = read_json(file)["parts"] if file.exists() else {}
    for name in only or PARTS:
        kept[name] = PARTS[name]()
        for row in kept[name]:
            print(f"{row['what']}: {row['value']:.2f} {row['unit']} ({row['bar']})", flush=True)
        write_json(
            file,
            {"device": describe_device("cpu"), "machine": describe_machine(), "versions": versions(), "parts": kept},
        )
