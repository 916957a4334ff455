"""The command ``efficiency``: what every preset and its rivals cost, all in one run."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm

from mclip.config import closest, get_profile, require
from mclip.deploy.cost import (
    CAPTION,
    RIVALS,
    Candidate,
    Form,
    block_times,
    candidate,
    candidate_name,
    latency,
    stage_times,
    threads,
)
from mclip.deploy.export import evaluate_deployed, export
from mclip.deploy.reader import Deployed
from mclip.files import DATA, read_json, write_json
from mclip.recipes import load_model
from mclip.results import describe_machine, versions
from mclip.scenes.test_sets import scene_sets
from mclip.scenes.world import SceneConfig, make_scenes
from mclip.study.bench import in_new_process, peak_megabytes

FILE = DATA / "results" / "efficiency.json"
MODELS = (
    *((name, "deployed") for name in ("mobile-256", "mobile-512", "klmobile", *RIVALS)),
    ("mobile-256", "trained"),
    ("MobileCLIP2-S0", "trained"),
    ("mobile-256", "ONNX"),
    ("mobile-256", "int8"),
)
"""Name and form of all that is measured."""


def costs(each: Candidate) -> dict[str, Any]:
    """What does not depend on the clock: parameters by part, multiply-adds of each half, size of the weights in MB.

    PyTorch's counter does not see the operations of ONNX Runtime, so exported forms have no multiply-adds.
    """
    return {
        "parameters": each.parameters,
        "multiply_adds": each.multiply_adds(),
        "image_size": each.image_size,
        "megabytes": each.megabytes,
        "latency": {},
    }


def quantised(calibration: int = 512, profile: str = "cpu") -> dict[str, dict[str, Any]]:
    """The shipped student, exported, in float32 and with int8 halves: MB, and top-1 (%) of each set of scenes.

    Ranges of activations come from pictures of the training set.
    """
    model, _ = load_model("kd")
    size = model.config.image.image_size
    seen = make_scenes(SceneConfig(calibration, size, "train"), progress=False).images
    forms: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as place:
        export(model, Path(place) / "kd", "kd", seen)
        for form in ("float32", "int8 text", "int8 image", "int8"):
            reader = Deployed(Path(place) / "kd", form)
            bytes_each = (reader.manifest["files"][graph]["bytes"] for graph in reader.graphs)
            forms[form] = {"megabytes": sum(bytes_each) / 1e6, "top1": {}}
            for dataset in scene_sets(size, get_profile(profile).test_pictures).values():
                record = evaluate_deployed(reader, dataset, form)
                forms[form]["top1"][dataset.name] = record["metrics"]["top1"]
    return forms


def measure_latency(found: list[Candidate], models: Mapping[str, dict[str, Any]], rounds: int, bar: tqdm) -> None:
    """Enter into ``models`` the milliseconds of all candidates, in turns: 1 and 2 threads, 1 and 32 samples."""
    for count in (1, 2):
        for batch, turns, repeats in ((1, rounds, 3), (32, max(2, rounds // 5), 1)):
            calls = {(each.name, half): call for each in found for half, call in each.calls(batch).items()}
            with threads(count):
                for (name, half), numbers in latency(calls, turns, repeats).items():
                    key = f"{count} thread{'s' * (count > 1)}, batch {batch}"
                    models[name]["latency"].setdefault(key, {})[half] = numbers
            bar.update()


def models(rounds: int = 6) -> dict[str, Any]:
    """Costs and latency of :data:`MODELS`."""
    with tqdm(total=len(MODELS) + 4, desc="models", unit="part") as bar:
        found = []
        for name, form in MODELS:
            found.append(candidate(name, form))
            bar.update()
        measured = {each.name: costs(each) for each in found}
        measure_latency(found, measured, rounds, bar)
    return measured


def peak_memory(name: str, form: Form = "deployed", batch: int = 1) -> float | None:
    """MB (2^20 bytes) of the weights and of what a call of each encoder adds to them; None where not Linux.

    Measured in a process of its own. What building the model took, and what of it was never given back, such as
    the unfused copy or the ranges seen in calibration, is none of a device's business and not counted.
    """
    return in_new_process(_peak, name, form, batch) if Path("/proc/self/clear_refs").exists() else None


def _peak(name: str, form: Form, batch: int) -> float:
    torch.set_num_threads(1)
    each = candidate(name, form)
    calls = each.calls(batch)
    give_back_freed_memory()  # else what the calls need would be found in it, and the model would seem to need nothing
    built = psutil.Process().memory_info().rss / 2**20
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of building the model
    with torch.inference_mode():
        for call in calls.values():
            call()
    added = peak_megabytes() - built
    return 1e6 * each.megabytes / 2**20 + added  # last: it makes a copy of the weights


def give_back_freed_memory() -> None:
    """Return to the system what Python, and where it is glibc the allocator, has freed and kept."""
    gc.collect()
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "malloc_trim"):
        allocator.malloc_trim(0)


def memory() -> dict[str, float | None]:
    """Peak memory in MB of :data:`MODELS`, by the names that they have there."""
    return {candidate_name(name, form): peak_memory(name, form) for name, form in tqdm(MODELS, desc="memory")}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "models": models,
    "memory": memory,
    "stages": stage_times,
    "blocks": block_times,
    "int8": quantised,
}
UNTIMED = ("memory", "int8")
"""Parts that another day's machine, or a busy one, measures as well."""


def efficiency(only: list[str] | None = None) -> None:
    """Measure, about a quarter of an hour on two cores, and keep in data/results/efficiency.json.

    Each part is written when it is done; a part that is not measured keeps its old numbers.

    Args:
        only: parts to measure, all by default: models, memory, stages, blocks, int8.
    """
    for name in only or PARTS:
        require(name in PARTS, "only", name, closest(name, PARTS))
    record = read_json(FILE) if FILE.exists() else {}
    for name in only or PARTS:
        record |= {name: PARTS[name](), "versions": versions(), "caption": CAPTION}
        record |= {} if name in UNTIMED else {"machine": describe_machine()}
        write_json(FILE, record)
        print(f"{name}: measured, {FILE}", flush=True)
