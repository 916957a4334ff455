"""The command ``efficiency``: what every preset and its rivals cost, all in one run."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from mclip.deploy.cost import CAPTION, RIVALS, Form, candidate, candidate_name, latency, threads
from mclip.files import DATA
from mclip.results import load_results, make_result, save_result
from mclip.study.bench import NO_MODEL, choose, describe_machine, in_new_process, peak_megabytes

FILE = DATA / "results" / "efficiency.json"
MODELS: tuple[tuple[str, Form], ...] = (
    *((name, "deployed") for name in ("mobile-256", "mobile-512", "klmobile", *RIVALS)),
    *((name, "trained") for name in ("mobile-256", "MobileCLIP2-S0")),
    *(("mobile-256", form) for form in ("ONNX", "int8")),
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


def peak_memory(name: str, form: Form = "deployed", batch: int = 1) -> float:
    """MB (2^20 bytes) of the weights and of what a call of each encoder adds to them; call it in a process of its own.

    What building the model took, and what of it was never given back, such as the unfused copy or the ranges seen
    in calibration, is not counted, because a device never builds it. Linux only.
    """
    torch.set_num_threads(1)
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


def memory() -> dict[str, float]:
    """Peak memory in MB of :data:`MODELS`, by the names that they have there; each in a process of its own."""
    return {candidate_name(name, form): in_new_process(peak_memory, name, form) for name, form in MODELS}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"models": models, "memory": memory}


def efficiency(only: list[str] | None = None, out: str = "") -> None:
    """Measure, about a quarter of an hour on two cores; a part that is not measured keeps its old numbers.

    Args:
        only: parts to measure, all by default: models, memory.
        out: file of the record; data/results/efficiency.json if empty.
    """
    file = Path(out or FILE)
    for name in choose(only, PARTS):
        kept = [record for record in load_results(file) if record["dataset"] == "costs"] if file.exists() else []
        metrics, details = (kept[0]["metrics"], kept[0]["details"]) if kept else ({}, {})
        metrics = metrics | {name: PARTS[name]()}
        details = details | {"caption": CAPTION} | ({"machine": describe_machine()} if name == "models" else {})
        save_result(file, make_result("efficiency", "costs", "none", len(MODELS), NO_MODEL, metrics, details=details))
        print(f"{name}: measured, {file}", flush=True)
