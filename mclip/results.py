"""Results files: JSON lists of records in one schema, validated when written and when read.

A record says what was measured, on what, with which weights, prompts, seed and versions, and how exactly.
A measurement that failed is recorded as a failure (``"error"`` in place of ``"metrics"``), never as a number.
"""

import hashlib
import importlib.metadata
import json
import math
import operator
import platform
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mclip import __version__
from mclip.config import ConfigError, from_mapping, require
from mclip.files import PACKAGE, atomic_path, lock

Record = Mapping[str, Any]


class ResultError(ValueError):
    """A record that breaks the schema; the message names the key, the value and what would be right."""


@dataclass(frozen=True)
class _Model:
    name: str
    parameters: int
    sha256: str


@dataclass(frozen=True)
class _Result:
    """The schema: one field for each key of a record; :func:`make_result` says what they mean."""

    schema: int
    task: str
    dataset: str
    split: str
    n: int | None
    model: _Model
    templates: tuple[str, ...]
    seed: int  # of the run that made the model, and of the bootstrap
    versions: dict
    device: str
    seconds: float
    git_commit: str | None
    created: str
    metrics: dict | None = None
    error: str | None = None  # what failed, in place of metrics
    details: dict | None = None

    def __post_init__(self) -> None:
        require(self.schema == 1, "schema", self.schema, "this version of mclip reads schema 1")
        digest = self.model.sha256
        require(len(digest) == 64, "model.sha256", digest, "give the 64 digits of weights_sha256(model)")
        for key in ("task", "dataset", "split", "error"):
            value = getattr(self, key)
            require(value is None or value.strip() != "", key, value, "give a text that says it")
        require(self.seed >= 0, "seed", self.seed, "give a whole number, 0 or more")
        require(0 <= self.seconds < math.inf, "seconds", self.seconds, "give the measured seconds")
        either = (self.metrics is None) != (self.error is None)
        require(either, "metrics", self.metrics, 'give either "metrics" or "error"')
        failed = self.metrics is None and self.n is None
        require(failed or (self.n or 0) > 0, "n", self.n, "metrics are measured on at least one sample")
        if self.metrics is not None:
            _check_metrics(self.metrics, "metrics", self.task in ("zero_shot", "retrieval"))
            top1, remedy = self.metrics.get("top1"), 'give {"value", "low", "high"}'
            require(self.task != "zero_shot" or isinstance(top1, dict), "metrics.top1", top1, remedy)


def _check_metrics(metrics: Any, key: str, percent: bool) -> None:
    if isinstance(metrics, int | float) and not isinstance(metrics, bool) and math.isfinite(metrics):
        return
    remedy = 'give a finite number, {"value", "low", "high"}, or a mapping of these; a failure is an "error"'
    require(isinstance(metrics, Mapping) and len(metrics) > 0, key, metrics, remedy)
    for name, inner in metrics.items():
        _check_metrics(inner, f"{key}.{name}", percent)
    if "value" in metrics:
        low, value, high = (metrics.get(k, math.nan) for k in ("low", "value", "high"))
        ordered = len(metrics) == 3 and low <= value <= high
        require(ordered, key, metrics, "an interval is three finite numbers with low <= value <= high")
        require(not percent or (low >= 0 and high <= 100), key, metrics, "a percentage lies in [0, 100]")


def validate_result(record: Record) -> None:
    """Raise :class:`ResultError`, naming key, value and remedy, unless ``record`` follows the schema."""
    try:
        from_mapping(_Result, record)
    except (ConfigError, TypeError) as error:  # the latter: a field is missing
        raise ResultError(str(error)) from error


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of ``module.state_dict()``; the same on every device."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_model(name: str, module: nn.Module) -> dict[str, Any]:
    """The ``model`` field of a record: name, number of parameters, and the weights' SHA-256."""
    return {"name": name, "parameters": sum(p.numel() for p in module.parameters()), "sha256": weights_sha256(module)}


def versions() -> dict[str, str]:
    """Versions of Python, of mclip and of the libraries that decide a number."""
    packages = {"torch": "torch", "torchvision": "torchvision", "open_clip": "open_clip_torch"}
    installed = {name: importlib.metadata.version(package) for name, package in packages.items()}
    return {"python": platform.python_version(), **installed, "mclip": __version__}


def git_commit() -> str | None:
    """The commit of the checkout that holds this package, or None when it is installed elsewhere."""
    command = ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):
        if (PACKAGE.parent / ".git").exists():
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def make_result(
    task: str, dataset: str, split: str, n: int | None, model: Record, metrics: Record | None = None, **more: Any
) -> dict[str, Any]:
    """A validated record: what is given, plus schema, versions, commit and time.

    ``n`` is the number of samples (None in a failure) and ``model`` as :func:`describe_model` gives it. ``metrics``
    is a nested mapping of numbers and ``{"value", "low", "high"}``, in percent for "zero_shot" and "retrieval".
    ``more`` holds other fields of the schema, with ``device`` a torch device.
    """
    record = {"schema": 1, "task": task, "dataset": dataset, "split": split, "n": n, "model": dict(model)}
    record |= {"templates": [], "seed": 0, "versions": versions(), "device": "cpu", "seconds": 0.0}
    record |= {"git_commit": git_commit(), "created": datetime.now(UTC).isoformat(timespec="seconds")}
    record |= {key: value for key, value in {"metrics": metrics, **more}.items() if value is not None}
    device = torch.device(record["device"])
    own_name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    record["device"] = own_name or f"{device.type} ({torch.get_num_threads()} threads)"
    record["seconds"] = round(record["seconds"], 3)
    validate_result(record)
    return record


def save_result(path: str | Path, *records: Record, order: Callable[[Any], Any] | None = None) -> Path:
    """Add ``records`` to a JSON file; each takes the place of one with equal task, data, prompts, seed and model.

    ``order`` is a key that sorts the list. Several processes may save at once. Raises: ResultError.
    """
    path = Path(path)
    for record in records:
        validate_result(record)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path), atomic_path(path) as temporary:
            kept = load_results(path) if path.exists() else []
            keys = operator.itemgetter("task", "dataset", "split", "seed")
            merged = {(*keys(r), r["model"]["name"], *r["templates"]): r for r in [*kept, *records]}.values()
            lines = [json.dumps(record, ensure_ascii=False) for record in sorted(merged, key=order or (lambda _: 0))]
            temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    except OSError as error:
        raise ResultError(f"{path}: cannot be written ({error.strerror}); choose another folder.") from error
    return path


def load_results(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file, or of every ``*.json`` of a folder by name, validated; errors name the file."""
    path, records = Path(path), []
    if not path.exists():
        raise ResultError(f"{path}: no such file or folder; give the results file, or the folder that holds some.")
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            for record in content if isinstance(content, list) else [content]:
                validate_result(record)
                records.append(record)
        except (json.JSONDecodeError, UnicodeDecodeError, ResultError) as error:
            raise ResultError(f"{file}: {error}") from error
    return records
