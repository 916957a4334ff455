"""Checkpoints of a run: all that it takes to go on as if nothing had happened, and never half a file.

A checkpoint holds weights, aligners, balancer, optimiser, moving average, counters and the random state. The
teacher is not in it: training reads cached embeddings. The order of the data needs no state, because it is a
function of seed and epoch.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import ConfigError, DistillConfig, TrainConfig
from .data import BatchSource
from .files import atomic_path, write_json
from .results import weights_sha256

KEEP = 2


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix[:-1]} was {old!r} and is now {new!r}"]


def run_identity(model: nn.Module, batches: BatchSource, config: TrainConfig, distill: DistillConfig) -> dict[str, Any]:
    """Everything that decides how a run ends; a checkpoint serves only a run that agrees in all of it."""
    architecture = getattr(model, "config", None)
    settings = dataclasses.asdict(config)
    del settings["progress"]
    return {
        "model": dataclasses.asdict(architecture) if dataclasses.is_dataclass(architecture) else None,
        "starting_weights": weights_sha256(model)[:16],
        "train": settings,
        "distill": dataclasses.asdict(distill),
        "data": batches.pairs.key,
        "teacher_targets": batches.targets.key if batches.targets else None,
    }


class Checkpoints:
    """The checkpoints and the log of one run in ``folder``; ``settings`` identify the run."""

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        # Through JSON, so that tuples and lists compare equal with what is read back.
        self.settings = json.loads(json.dumps(settings))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_path, self.settings_path = self.folder / "log.jsonl", self.folder / "settings.json"

    def _files(self) -> list[Path]:
        """Checkpoint files, newest first."""
        return sorted(self.folder.glob("checkpoint-*.pt"), reverse=True)

    def describe_last(self) -> str:
        """A sentence that names the last good checkpoint."""
        files = self._files()
        return f"The last good checkpoint is {files[0]}." if files else "No checkpoint has been written yet."

    def clear(self) -> list[dict[str, Any]]:
        """Forget an earlier run in this folder and begin a new log."""
        for file in self._files():
            file.unlink()
        self.log_path.unlink(missing_ok=True)
        write_json(self.settings_path, self.settings)
        return []

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to the log."""
        with self.log_path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")

    def save(self, parts: dict[str, Any], state: dict[str, Any]) -> None:
        """Write ``parts`` (anything with ``state_dict``) and the counters ``state``; keep the last two checkpoints."""
        random = {"cpu": torch.get_rng_state()} | (
            {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
        )
        content = {"parts": {name: part.state_dict() for name, part in parts.items()}, "state": state, "random": random}
        with atomic_path(self.folder / f"checkpoint-{state['epoch']:05d}.pt") as temporary:
            torch.save(content, temporary)
        for file in self._files()[KEEP:]:
            file.unlink()

    def restore(self, parts: dict[str, Any], state: dict[str, Any]) -> list[dict[str, Any]]:
        """Load the newest readable checkpoint into ``parts`` and ``state``; returns the log up to there.

        Without one, the run begins anew. ConfigError if the folder holds a run with other settings.
        """
        files = self._files()
        if not files:
            return self.clear()
        stored = json.loads(self.settings_path.read_text(encoding="utf-8")) if self.settings_path.exists() else None
        if changed := _differences(stored, self.settings):
            raise ConfigError(
                f"{self.folder} holds a run with other settings: {'; '.join(changed)}. "
                "Choose another folder, or delete this one to train anew."
            )
        for file in files:
            try:
                content = torch.load(file, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
                print(f"{file} is damaged ({type(error).__name__}); going back to the checkpoint before.")
                continue
            for name, part in parts.items():
                part.load_state_dict(content["parts"][name])
            state.update(content["state"])
            torch.set_rng_state(content["random"]["cpu"])
            if "cuda" in content["random"] and torch.cuda.is_available():
                torch.cuda.set_rng_state(content["random"]["cuda"])
            return self._trim_log(state["epoch"])
        return self.clear()

    def _trim_log(self, epochs: int) -> list[dict[str, Any]]:
        """Drop what was logged after the checkpoint, so that a resumed log equals an unbroken one."""
        kept: list[dict[str, Any]] = []
        lines = self.log_path.read_text(encoding="utf-8").splitlines() if self.log_path.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if record["epoch"] >= epochs:
                break
            kept.append(record)
        with atomic_path(self.log_path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        return kept
