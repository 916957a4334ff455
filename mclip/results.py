"""Results files: one JSON record per measurement, in one schema, validated when written and when read.

A record says what was measured, on what, with which weights, prompts, seed and versions, and how exactly.
A measurement that failed is recorded as a failure (``"error"`` in place of ``"metrics"``), never as a number.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mclip import __version__
from mclip.config import closest
from mclip.files import atomic_path

SCHEMA = 1
PERCENT_TASKS = ("zero_shot", "retrieval")


class ResultError(ValueError):
    """A record that breaks the schema; the message names the key, the value and what would be right."""


def _require(condition: bool, key: str, value: object, remedy: str) -> None:
    if not condition:
        shown = repr(value)
        raise ResultError(f"{key}={shown if len(shown) < 80 else shown[:77] + '...'} is not valid: {remedy}.")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "schema": (lambda v: v == SCHEMA, f"this version of mclip reads schema {SCHEMA}"),
    "task": (_text, 'name the task, for example "zero_shot" or "retrieval"'),
    "dataset": (_text, "name the dataset"),
    "split": (_text, 'name the split, for example "test"'),
    "n": (lambda v: v is None or (_count(v) and v > 0), "give the number of samples (null in a failure)"),
    "model": (lambda v: isinstance(v, Mapping), 'give {"name", "parameters", "sha256"}'),
    "templates": (lambda v: isinstance(v, list) and all(map(_text, v)), "give a list of templates, or []"),
    "seed": (_count, "give a whole number, 0 or more"),
    "versions": (lambda v: isinstance(v, Mapping) and all(map(_text, v.values())), "map names to versions"),
    "device": (_text, 'name the device, for example "cpu"'),
    "seconds": (lambda v: _number(v) and v >= 0, "give the measured seconds"),
    "git_commit": (lambda v: v is None or _text(v), "give the commit, or null outside a checkout"),
    "created": (_text, "give the time in ISO 8601"),
}
OUTCOMES = ("metrics", "error")
OPTIONAL = ("details",)
MODEL_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_text, 'name the model, for example "kd"'),
    "parameters": (_count, "give the number of parameters"),
    "sha256": (lambda v: _text(v) and len(v) == 64, "give the 64 digits of weights_sha256(model)"),
}


def _check_fields(values: Mapping[str, Any], fields: Mapping, prefix: str, also: Iterable[str] = ()) -> None:
    known = [*fields, *also]
    for key in values:
        _require(key in known, prefix + str(key), values[key], f"no such field; {closest(str(key), known)}")
    for key, (valid, remedy) in fields.items():
        _require(key in values, prefix + key, None, f"the field is missing; {remedy}")
        _require(valid(values[key]), prefix + key, values[key], remedy)


def _check_metrics(metrics: object, key: str, percent: bool) -> None:
    if _number(metrics):
        return
    remedy = 'give a finite number, {"value", "low", "high"}, or a mapping of these; a failure is an "error"'
    _require(isinstance(metrics, Mapping) and len(metrics) > 0, key, metrics, remedy)
    if "value" not in metrics:
        for name, inner in metrics.items():
            _check_metrics(inner, f"{key}.{name}", percent)
        return
    numbers = [metrics.get(k) for k in ("low", "value", "high")]
    ordered = len(metrics) == 3 and all(map(_number, numbers)) and sorted(numbers) == numbers
    _require(ordered, key, dict(metrics), "an interval is three finite numbers with low <= value <= high")
    inside = not percent or (numbers[0] >= 0 and numbers[2] <= 100)
    _require(inside, key, dict(metrics), "a percentage lies in [0, 100]")


def validate_result(record: Mapping[str, Any]) -> None:
    """Raise :class:`ResultError`, naming key, value and remedy, unless ``record`` follows the schema."""
    _require(isinstance(record, Mapping), "record", record, "a record is a mapping")
    _check_fields(record, FIELDS, "", (*OUTCOMES, *OPTIONAL))
    _check_fields(record["model"], MODEL_FIELDS, "model.")
    outcomes = [key for key in OUTCOMES if key in record]
    _require(len(outcomes) == 1, "metrics", outcomes, 'give either "metrics" or "error"')
    _require(isinstance(record.get("details", {}), Mapping), "details", record.get("details"), "give a mapping")
    if outcomes == ["error"]:
        _require(_text(record["error"]), "error", record["error"], "say what failed")
        return
    _require(record["n"] is not None, "n", None, "metrics are measured on at least one sample")
    _check_metrics(record["metrics"], "metrics", record["task"] in PERCENT_TASKS)
    if record["task"] == "zero_shot":
        top1 = record["metrics"].get("top1") if isinstance(record["metrics"], Mapping) else None
        _require(isinstance(top1, Mapping), "metrics.top1", top1, 'give {"value", "low", "high"}')


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of ``module.state_dict()``; the same on every device."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        for part in value if isinstance(value, tuple) else (value,):  # an int8 layer keeps weight and bias as a pair
            if not isinstance(part, torch.Tensor):
                digest.update(f"{name}|{part}|".encode())
                continue
            tensor = (part.dequantize() if part.is_quantized else part.detach()).cpu().contiguous()
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_model(name: str, module: nn.Module) -> dict[str, Any]:
    """The ``model`` field of a record: name, number of parameters, int8 ones too, and the weights' SHA-256."""
    methods = [getattr(layer, part, None) for layer in module.modules() for part in ("weight", "bias")]
    packed = [method() for method in methods if callable(method)]  # an int8 layer's, where others have parameters
    parameters = sum(tensor.numel() for tensor in [*module.parameters(), *packed] if tensor is not None)
    return {"name": name, "parameters": parameters, "sha256": weights_sha256(module)}


def describe_device(device: torch.device | str) -> str:
    """``"cpu (2 threads)"``, or the accelerator's own name."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def describe_machine() -> dict[str, Any]:
    """Processor and cores; and how many processes wanted to run in the last minute: 1 is this one alone."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text(encoding="utf-8")) if file.exists() else []
    processor = names[0] if names else platform.processor()
    return {"processor": processor, "cores": os.cpu_count(), "load": os.getloadavg()[0]}


def versions() -> dict[str, str]:
    """Versions of Python, of mclip and of the libraries that decide a number."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "open_clip_torch")}
    found["open_clip"] = found.pop("open_clip_torch")
    return {"python": platform.python_version(), **found, "mclip": __version__}


def git_commit() -> str | None:
    """The commit of the checkout that holds this package, or None when it is installed elsewhere."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    checkout, commit = answer.stdout.splitlines()
    return commit if Path(checkout).resolve() == root else None


def make_result(
    task: str,
    dataset: str,
    split: str,
    n: int | None,
    model: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    *,
    error: str | None = None,
    templates: Iterable[str] = (),
    seed: int = 0,
    seconds: float = 0.0,
    device: torch.device | str = "cpu",
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A validated record: what is given, plus schema, versions, commit and time.

    Args:
        n: number of samples measured; None is allowed in a failure.
        model: see :func:`describe_model`.
        metrics: nested mapping of numbers and ``{"value", "low", "high"}``; percent in PERCENT_TASKS.
        error: what failed; given instead of ``metrics``.
        seed: seed of the run that made the model, and of the bootstrap.
        seconds: duration of the measurement.
        details: settings worth keeping that the schema does not name.
    """
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "task": task,
        "dataset": dataset,
        "split": split,
        "n": n,
        "model": dict(model),
        "templates": list(templates),
        "seed": seed,
        "versions": versions(),
        "device": describe_device(device),
        "seconds": round(seconds, 3),
        "git_commit": git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    given = {"metrics": metrics, "error": error, "details": details}
    record |= {key: value for key, value in given.items() if value is not None}
    validate_result(record)
    return record


def save_result(path: str | Path, record: Mapping[str, Any]) -> Path:
    """Validate ``record`` and write it as JSON; a file is complete or absent, never half written."""
    validate_result(record)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ResultError(f"{path}: cannot be written ({error.strerror}); choose another folder.") from error
    return Path(path)


def load_results(folder: str | Path) -> list[dict[str, Any]]:
    """Every ``*.json`` of ``folder``, by file name, validated; errors name the file."""
    folder, records = Path(folder), []
    if not folder.is_dir():
        raise ResultError(f"{folder}: no such folder; give the folder that holds the results files.")
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            validate_result(record)
        except (json.JSONDecodeError, UnicodeDecodeError, ResultError) as error:
            raise ResultError(f"{path}: {error}") from error
        records.append(record)
    return records
