"""Checkpoints of a run: all that it takes to go on as if nothing had happened, and never half a file.

A checkpoint holds weights, aligners, balancer, optimiser, moving average and counters. The teacher is not in it:
training reads cached embeddings. The order of the data and the random numbers need no state, because they are
functions of seed, step and process; so a run may go on with another number of processes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mclip.config import ConfigError, DistillConfig, TrainConfig
from mclip.files import atomic_path, write_json
from mclip.pairs import BatchSource
from mclip.results import weights_sha256

KEEP = 2
LEFTOVERS = (".checkpoint-*.part", ".log.jsonl.*.part", ".settings.json.*.part", "model/.*.part")
"""What a run that was killed while it wrote a file leaves in its folder; the file itself is whole or absent."""


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix[:-1]} was {old!r} and is now {new!r}"]


def run_identity(model: nn.Module, batches: BatchSource, config: TrainConfig, distill: DistillConfig) -> dict[str, Any]:
    """Everything that decides how a run ends; a checkpoint serves only a run that agrees in all of it."""
    architecture = getattr(model, "config", None)
    settings = dataclasses.asdict(config)
    for key in ("progress", "checkpoint_minutes", "accelerator"):
        del settings[key]
    return {
        "model": dataclasses.asdict(architecture) if dataclasses.is_dataclass(architecture) else None,
        "starting_weights": weights_sha256(model)[:16],
        "train": settings,
        # Without a teacher, phases and balancers decide nothing.
        "distill": dataclasses.asdict(distill) if batches.targets else {"task": distill.task},
        "data": batches.pairs.key,
        "teacher_targets": batches.targets.key if batches.targets else None,
    }


class Checkpoints:
    """The checkpoints, the log and the counters of one run in ``folder``.

    Args:
        settings: identify the run; a checkpoint of another is refused.
        parts: what is saved and restored: anything with ``state_dict`` and ``load_state_dict``, by name.
        writes: False for all but one of several processes, which read only.
        on_record: called with each new record of the log.

    Attributes:
        state: counters: optimiser steps done, best validation, evaluations since then, and whether the run ended.
        log: all records so far.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any],
        parts: dict[str, Any],
        writes: bool = True,
        on_record: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.folder, self.parts, self.writes, self.on_record = Path(folder), parts, writes, on_record
        # Through JSON, so that tuples and lists compare equal with what is read back.
        self.settings = json.loads(json.dumps(settings))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_path, self.settings_path = self.folder / "log.jsonl", self.folder / "settings.json"
        self.state: dict[str, Any] = {"step": 0, "best": -math.inf, "stale": 0, "finished": False}
        self.log: list[dict[str, Any]] = []
        self.saved = time.monotonic()

    def _files(self) -> list[Path]:
        """Checkpoint files, newest first."""
        return sorted(self.folder.glob("checkpoint-*.pt"), reverse=True)

    def describe_last(self) -> str:
        """A sentence that names the last good checkpoint."""
        files = self._files()
        return f"The last good checkpoint is {files[0]}." if files else "No checkpoint has been written yet."

    def minutes_since_save(self) -> float:
        """Minutes since the run began or the last checkpoint was written."""
        return (time.monotonic() - self.saved) / 60

    def record(self, record: dict[str, Any]) -> None:
        """Append one line to the log."""
        self.log.append(record)
        if self.writes:
            with self.log_path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
            if self.on_record is not None:
                self.on_record(record)

    def save(self) -> None:
        """Write a checkpoint; keep the last two."""
        self.saved = time.monotonic()
        if not self.writes:
            return
        content = {"parts": {name: part.state_dict() for name, part in self.parts.items()}, "state": self.state}
        with atomic_path(self.folder / f"checkpoint-{self.state['step']:08d}.pt") as temporary:
            torch.save(content, temporary)
        for file in self._files()[KEEP:]:
            file.unlink()

    def begin(self, resume: bool = True) -> None:
        """Go on from the newest readable checkpoint; without one, or without ``resume``, begin anew.

        Raises: ConfigError if the folder holds a run with other settings.
        """
        files = self._files() if resume else []
        stored = json.loads(self.settings_path.read_text(encoding="utf-8")) if self.settings_path.exists() else None
        if files and (changed := _differences(stored, self.settings)):
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
            for name, part in self.parts.items():
                part.load_state_dict(content["parts"][name])
            self.state.update(content["state"])
            self.log = self._log_until(self.state["step"])
            break
        if self.writes:
            self._write_beginning()

    def _write_beginning(self) -> None:
        """Settings, and the log up to the checkpoint; of a run that begins anew, no checkpoints."""
        for file in [file for pattern in LEFTOVERS for file in self.folder.glob(pattern)]:
            file.unlink()
        for file in self._files() if not self.state["step"] else ():
            file.unlink()
        write_json(self.settings_path, self.settings)
        with atomic_path(self.log_path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.log), encoding="utf-8")

    def _log_until(self, step: int) -> list[dict[str, Any]]:
        """The records of the first ``step`` steps, so that a resumed log equals an unbroken one."""
        kept: list[dict[str, Any]] = []
        lines = self.log_path.read_text(encoding="utf-8").splitlines() if self.log_path.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            # A validation bears the number of the steps before it.
            if record["step"] >= step + ("validation" in record):
                break
            kept.append(record)
        return kept
