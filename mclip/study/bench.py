"""Speed and memory: ``make bench`` measures training, the command ``efficiency`` what each model costs to run.

Random weights and noise stand in for models and photographs, because they cost the same.
"""

import ctypes
import gc
import importlib.util
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import psutil
import torch

from mclip.config import DistillConfig, TrainConfig, closest, get_profile, require
from mclip.deploy.cost import CAPTION, RIVALS, Form, candidate, candidate_name, latency, random_model, threads
from mclip.deploy.export import evaluate_deployed, export, write_int8
from mclip.deploy.reader import GRAPHS, Deployed, session
from mclip.evaluate import ZeroShotSet, as_templates
from mclip.files import DATA
from mclip.model import MobileCLIP
from mclip.objectives import Distillation
from mclip.pairs import BatchSource, Pairs, Targets, normalise
from mclip.recipes import load_model, student_prepare
from mclip.results import describe_model, load_results, make_result, save_result
from mclip.scenes.test_sets import scene_sets
from mclip.scenes.world import SceneConfig, export_scenes, make_scenes
from mclip.show.figures import set_label
from mclip.show.widgets import free_crops
from mclip.sources.loading import load_pairs
from mclip.sources.zero_shot import EXCERPTS, photograph_set
from mclip.targets import embed_captions, embed_pictures
from mclip.teacher import load_teacher
from mclip.train import train

RESULTS = DATA / "results"
Row = dict[str, Any]
Encode = Callable[[np.ndarray], np.ndarray]
NO_MODEL = {"name": "random weights", "parameters": 0, "sha256": "0" * 64}
ALL_TERMS = DistillConfig(phases=(0.0, 0.0, 0.0), ramp=0.0)
PHOTOGRAPHS = 1000  # of each set, on which the forms of a student are compared
SENTENCE = "a small red dog runs along the beach beside two men who throw a ball"


def row(what: str, value: float, unit: str = "times", bar: str = "", **more: Any) -> Row:
    """One line of the table: what was measured, and the aim ``bar``, such as "at least 20"."""
    return {"what": what, "value": float(value), "unit": unit, "bar": bar, **more}


def pairs_per_second(preset: str, batch_size: int, count: int, pieces: int = 1) -> float:
    """Median pace of distillation steps with all three terms, through the one training loop, once it is warm.

    ``count`` batches of noise have captions of eleven words and random targets.
    """
    model, config = random_model(preset)
    size, side, rng = batch_size * count, config.image.image_size, np.random.default_rng(0)
    levels = rng.integers(0, 256, 3 * side**2 + size, np.uint8)
    # Each picture is the one before, shifted by a number: all are different, and together take the memory of one.
    pictures = np.lib.stride_tricks.as_strided(levels, (size, 3, side, side), (1, side**2, side, 1), writeable=False)
    captions = [[" ".join(rng.choice(SENTENCE.split(), 11))] for _ in range(size)]
    pairs = Pairs(pictures, captions, "noise", "noise")
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
    status = Path("/proc/self/status")
    require(status.exists(), "platform", platform.system(), "peaks of memory are read on Linux alone; name other parts")
    return int(status.read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) / 1024


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
        save_result(out or RESULTS / "bench.json", record)


MODELS: tuple[tuple[str, Form], ...] = (
    *((name, "deployed") for name in ("pocket-256", "mobile-256", "mobile-512", "klmobile", *RIVALS)),
    *((name, "trained") for name in ("mobile-256", "MobileCLIP2-S0")),
    *((name, form) for name in ("pocket-256", "mobile-256") for form in ("ONNX", "int8")),
)
"""Name and form of all that is measured."""


def models(rounds: int = 6) -> dict[str, Any]:
    """Parameters, multiply-adds, megabytes and latency of :data:`MODELS`: 1 and 2 threads, 1 and 32 samples."""
    candidates = [candidate(name, form) for name, form in MODELS]
    measured: dict[str, Any] = {}
    for each in candidates:
        costs = {key: getattr(each, key) for key in ("parameters", "image_size", "megabytes")} | {"latency": {}}
        adds = each.multiply_adds()
        measured[each.name] = costs | ({"multiply_adds": adds} if adds else {})
    for count in (1, 2):
        for batch, turns, repeats in ((1, rounds, 3), (32, max(2, rounds // 5), 1)):
            with threads(count):
                calls = {(each.name, half): call for each in candidates for half, call in each.calls(batch).items()}
                clock = latency(calls, turns, repeats)
            setting = f"{count} thread{'s' * (count > 1)}, batch {batch}"
            for (name, half), numbers in clock.items():
                measured[name]["latency"].setdefault(setting, {})[half] = numbers
    return measured


def quantised() -> dict[str, Any]:
    """The shipped student, exported, in float32 and with int8 halves: MB, and top-1 (%) of each set of scenes.

    Ranges of activations come from 512 pictures of the training set.
    """
    model, _ = load_model("kd")
    size = model.config.image.image_size
    seen = make_scenes(SceneConfig(512, size, "train"), progress=False).images
    sets, forms = scene_sets(size, get_profile("cpu").test_pictures).values(), {}
    with tempfile.TemporaryDirectory() as place:
        export(model, Path(place) / "kd", "kd", seen)
        for form in ("float32", "int8 text", "int8 image", "int8"):
            reader = Deployed(Path(place) / "kd", form)
            megabytes = sum(reader.manifest["files"][graph]["bytes"] for graph in reader.graphs) / 1e6
            records = [evaluate_deployed(reader, each, form) for each in sets]
            top1 = {record["dataset"]: record["metrics"]["top1"] for record in records}
            forms[form] = {"megabytes": megabytes, "top1": top1}
    return forms


def forms(model: MobileCLIP, rounds: int = 30) -> dict[str, Any]:
    """A student of photographs in each form that an app can carry, against PyTorch; by the names of :data:`GRAPHS`.

    Of both halves megabytes, latency on one thread and the mean cosine with PyTorch's embeddings; on
    :data:`PHOTOGRAPHS` of each set top-1 (%) and how often the answer is PyTorch's (%). The sets lie below the cache
    folder. int8 is calibrated as by the command ``export``. ExecuTorch is measured if it is installed.
    """
    pictures, tests = free_crops(model.config.image.image_size, 256), [photograph_set(name) for name in EXCERPTS]
    has_executorch = importlib.util.find_spec("executorch") is not None
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "photo"
        manifest = export(model, folder, "photo", pictures, has_executorch)
        readers = {form: Deployed(folder, form, threads=1) for form in manifest["forms"]}
        reader = readers["float32"]
        measured = {"PyTorch": {"megabytes": 4e-6 * sum(weight.numel() for weight in model.parameters())}}
        encoders = {"PyTorch": _eager(model)}
        for form, each in readers.items():
            encoders[form] = {"image": each.encode_prepared, "text": each.encode_tokens}
            measured[form] = {"megabytes": sum(manifest["files"][graph]["bytes"] for graph in each.graphs) / 1e6}
        inputs = {"image": reader.prepare([pictures[0].transpose(1, 2, 0)]), "text": reader.tokenize([CAPTION])}
        with threads(1):
            halves = {(form, half): call for form, own in encoders.items() for half, call in own.items()}
            clock = latency({key: partial(call, inputs[key[1]]) for key, call in halves.items()}, rounds)
            answers = _answers(tests, reader, encoders)
    for form, row in measured.items():
        row["latency"] = {half: clock[form, half] for half in inputs}
        row |= answers[form]
    return measured


INT8_CHOICES: dict[str, dict[str, Any]] = {
    "8 bits, ranges of 99.999 %": {"bits": 8, "first_in_float": False},
    "7 bits": {"first_in_float": False},
    "7 bits, first convolution in float": {},
    "the same, ranges of 99.99 %": {"percentile": 99.99},
    "the same, ranges of 99.995 %": {"percentile": 99.995},
}
"""Arguments of :func:`~mclip.deploy.export.write_int8`; an empty row is its defaults."""


def choices(model: MobileCLIP) -> dict[str, Any]:
    """Of each of :data:`INT8_CHOICES` for the image half what :func:`forms` measures, but for the time.

    The photographs are of the part of each set that is for choosing.
    """
    size, encoders = model.config.image.image_size, {"PyTorch": _eager(model)}
    seen = normalise(torch.from_numpy(free_crops(size, 256)), size, model.MEAN, model.STD).contiguous().numpy()
    with tempfile.TemporaryDirectory() as place, threads(1):
        folder = Path(place) / "photo"
        export(model, folder)
        for choice, arguments in INT8_CHOICES.items():
            write_int8(folder, seen, **arguments)
            run = session((folder / GRAPHS["int8"][0]).read_bytes(), 1).run
            encoders[choice] = encoders["PyTorch"] | {"image": lambda rows, run=run: run(None, {"images": rows})[0]}
        return _answers([photograph_set(name, part="choose") for name in EXCERPTS], Deployed(folder), encoders)


def _eager(model: MobileCLIP) -> dict[str, Encode]:
    """Both halves in PyTorch, as a device's reader calls them."""

    def half(encode: Callable[..., torch.Tensor]) -> Encode:
        return torch.inference_mode()(lambda rows: encode(torch.from_numpy(rows), normalize=True).numpy())

    return {"image": half(model.encode_image), "text": half(model.encode_text)}


def _answers(tests: Sequence[ZeroShotSet], reader: Deployed, encoders: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each form of a student, on photograph sets: cosines with PyTorch's embeddings, top-1 and the same answers."""
    compared = {form: {"cosine": {"image": [], "text": []}, "top1": {}, "same answer": {}} for form in encoders}
    for test in tests:
        label = set_label({"task": "zero_shot", "dataset": test.name, "split": test.split})
        chosen = sorted(np.random.default_rng(0).permutation(len(test.images))[:PHOTOGRAPHS].tolist())
        pictures, labels = zip(*(test.images[row] for row in chosen), strict=True)
        templates = as_templates(test.templates)
        prompts = [template.replace("{}", each) for each in test.class_names for template in templates]
        inputs = {"image": reader.prepare(pictures), "text": reader.tokenize(prompts)}
        expected = {}
        for form, own in encoders.items():
            rows = {
                half: np.concatenate([own[half](batch[start : start + 64]) for start in range(0, len(batch), 64)])
                for half, batch in inputs.items()
            }
            classes = rows["text"].reshape(len(test.class_names), len(templates), -1).mean(1)
            answers = (rows["image"] @ (classes / np.linalg.norm(classes, axis=1, keepdims=True)).T).argmax(1)
            expected = expected or rows | {"answers": answers}  # PyTorch comes first
            for half, cosines in compared[form]["cosine"].items():
                cosines.append(float((rows[half] * expected[half]).sum(1).mean()))
            compared[form]["top1"][label] = 100 * float((answers == np.array(labels)).mean())
            compared[form]["same answer"][label] = 100 * float((answers == expected["answers"]).mean())
    for own in compared.values():
        own["cosine"] = {half: float(np.mean(cosines)) for half, cosines in own["cosine"].items()}
    return compared


def peak_memory(name: str, form: Form = "deployed", batch: int = 1) -> float:
    """MB (2^20 bytes) of the weights and of what a call of each encoder adds to them; call it in a process of its own.

    What building the model took, and what of it was never given back, such as the unfused copy or the ranges seen
    in calibration, is not counted, because a device never builds it. Linux only.
    """
    torch.set_num_threads(1)
    peak_megabytes()  # its own error, where there is none
    each = candidate(name, form)
    calls = each.calls(batch)
    # Freed memory goes back to the system; else the calls would find what they need in it and seem to need nothing.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    built = psutil.Process().memory_info().rss / 2**20
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of building the model
    with torch.inference_mode():
        for call in calls.values():
            call()
    added = peak_megabytes() - built
    return 1e6 * each.megabytes / 2**20 + added  # last: it makes a copy of the weights


def peaks() -> dict[str, float]:
    """Peak memory in MB of :data:`MODELS`, by the names that they have there; each in a process of its own."""
    return {candidate_name(name, form): in_new_process(peak_memory, name, form) for name, form in MODELS}


COSTS: dict[str, Callable[[], dict[str, Any]]] = {"models": models, "memory": peaks, "int8": quantised}
OF_PHOTO: dict[str, Callable[[MobileCLIP], dict[str, Any]]] = {"forms": forms, "choices": choices}


def efficiency(only: list[str] | None = None, out: str = "") -> None:
    """Measure, about a quarter of an hour on two cores; a part that is not measured keeps its old numbers.

    Args:
        only: parts to measure: models, memory, int8; and forms and choices (of int8) if asked for, since they need the
            photographs. These two are records of their own, which name the student; the rows of ExecuTorch stay where
            that is not installed.
        out: file of the records; data/results/efficiency.json if empty.
    """
    file = Path(out or RESULTS / "efficiency.json")
    for name in choose(only or list(COSTS), [*COSTS, *OF_PHOTO]):
        records = {record["dataset"]: record for record in (load_results(file) if file.exists() else [])}
        if name in OF_PHOTO:
            student, kept, details = load_model("photo")[0].eval(), records.get(name, {}), {}
            dataset, n, model = name, PHOTOGRAPHS, describe_model("photo", student)
            metrics = (kept["metrics"] if kept.get("model") == model else {}) | OF_PHOTO[name](student)
        else:
            dataset, n, model = "costs", len(MODELS), NO_MODEL
            kept = records.get(dataset, {"metrics": {}, "details": {}})
            metrics, details = kept["metrics"] | {name: COSTS[name]()}, kept["details"]
        details["caption"] = CAPTION
        if name in ("models", *OF_PHOTO):
            details["machine"] = describe_machine()
        record = make_result("efficiency", dataset, "none", n, model, metrics, details=details)
        save_result(file, record)
        print(f"{name}: measured, {file}", flush=True)
