"""The folder of a run: its log, and checkpoints from which it goes on as if nothing had happened.

A checkpoint holds weights, aligners, balancer, optimiser, moving average, gradient scaler and progress. The teacher is
not in it, because training reads cached embeddings. The order of the data and the random numbers need no state: they
are functions of seed, step and process. So a run may go on with another number of processes.
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

COUNTERS = ("step", "best", "stale", "finished")
KEPT = 2  # checkpoints: the older one serves where the newer one is damaged
UNREADABLE = (RuntimeError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError)


def run_identity(model: nn.Module, batches: BatchSource, config: TrainConfig, distill: DistillConfig) -> dict[str, Any]:
    """Everything that decides how a run ends. A checkpoint serves only a run that agrees in all of it."""
    architecture = getattr(model, "config", None)
    settings = dataclasses.asdict(config)
    for key in ("progress", "checkpoint_minutes", "accelerator"):
        del settings[key]
    identity = {
        "model": dataclasses.asdict(architecture) if dataclasses.is_dataclass(architecture) else None,
        "starting_weights": weights_sha256(model)[:16],
        "train": settings,
        # Without a teacher, phases and balancers decide nothing.
        "distill": dataclasses.asdict(distill) if batches.targets else {"task": distill.task},
        "data": batches.pairs.key,
        "teacher_targets": batches.targets.key if batches.targets else None,
    }
    return json.loads(json.dumps(identity))  # tuples become lists, as in the file that it is compared with


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """A sentence for each setting in which two nested dicts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{name}.{key}".strip("."))]
    return [] if old == new else [f"{name} was {old!r} and is now {new!r}"]


class RunState:
    """How far a run has come, its log and its checkpoints, kept in ``folder``.

    Args:
        identity: from :func:`run_identity`. A checkpoint of another run is refused.
        parts: what is saved and restored: anything with ``state_dict`` and ``load_state_dict``, or None, by name.
        writes: False for all but one of several processes, which only read.
        on_record: called with each new record of the log.

    Attributes:
        step: optimiser steps done.
        best: the best validation, by a metric where higher is better.
        stale: validations since then.
        finished: whether the run is over.
        log: all records so far.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: dict[str, Any],
        parts: dict[str, Any],
        writes: bool = True,
        on_record: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.folder, self.identity, self.writes, self.on_record = Path(folder), identity, writes, on_record
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.step, self.best, self.stale, self.finished = 0, -math.inf, 0, False
        self.log: list[dict[str, Any]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_path, self.settings_path = self.folder / "log.jsonl", self.folder / "settings.json"
        self.saved = time.monotonic()

    def checkpoints(self) -> list[Path]:
        """The files of the checkpoints, newest first."""
        return sorted(self.folder.glob("checkpoint-*.pt"), reverse=True)

    def last_checkpoint(self) -> str:
        """A sentence that names the newest checkpoint."""
        files = self.checkpoints()
        return f"The last good checkpoint is {files[0]}." if files else "No checkpoint has been written yet."

    def begin(self, resume: bool = True) -> None:
        """Go on from the newest readable checkpoint; without one, or without ``resume``, begin anew.

        Raises: ConfigError if the folder holds a run with other settings.
        """
        files = self.checkpoints() if resume else []
        stored = json.loads(self.settings_path.read_text(encoding="utf-8")) if self.settings_path.exists() else None
        if files and (changed := differences(stored, self.identity)):
            raise ConfigError(
                f"{self.folder} holds a run with other settings: {'; '.join(changed)}. "
                "Choose another folder, or delete this one to train anew."
            )
        any(self._restore(file) for file in files)  # stops at the first that is readable
        if self.writes:
            self._write_beginning()

    def record(self, record: dict[str, Any]) -> None:
        """Append one line to the log."""
        self.log.append(record)
        if self.writes:
            with self.log_path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
            if self.on_record is not None:
                self.on_record(record)

    def observe(self, metric: float) -> None:
        """Count one validation."""
        self.stale = 0 if metric > self.best else self.stale + 1
        self.best = max(self.best, metric)

    def due(self, minutes: float) -> bool:
        """Whether the process that writes has written no checkpoint for ``minutes``; False on all others."""
        return self.writes and time.monotonic() - self.saved > 60 * minutes

    def save(self) -> None:
        """Write a checkpoint; keep the last two."""
        self.saved = time.monotonic()
        if not self.writes:
            return
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        counters = {name: getattr(self, name) for name in COUNTERS}
        with atomic_path(self.folder / f"checkpoint-{self.step:08d}.pt") as temporary:
            torch.save({"parts": parts, "state": counters}, temporary)
        for file in self.checkpoints()[KEPT:]:
            file.unlink()

    def _restore(self, file: Path) -> bool:
        """Load a checkpoint and the log up to it; False if the file is damaged."""
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            print(f"{file} is damaged ({type(error).__name__}); going back to the checkpoint before.")
            return False
        for name, part in self.parts.items():
            part.load_state_dict(content["parts"][name])
        vars(self).update({name: content["state"][name] for name in COUNTERS})
        self.log = self._log_until(self.step)
        return True

    def _write_beginning(self) -> None:
        """Write the settings, and the log up to the checkpoint; remove what the run does not go on from."""
        # A process that was killed while it wrote a file leaves half of it under another name.
        stale = [file for pattern in (".*.part", "model/.*.part") for file in self.folder.glob(pattern)]
        for file in stale + (self.checkpoints() if self.step == 0 else []):
            file.unlink()
        write_json(self.settings_path, self.identity)
        with atomic_path(self.log_path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.log), encoding="utf-8")

    def _log_until(self, step: int) -> list[dict[str, Any]]:
        """The records of the first ``step`` steps, so that a resumed log equals an unbroken one."""
        kept: list[dict[str, Any]] = []
        for line in self.log_path.read_text(encoding="utf-8").splitlines() if self.log_path.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # half a line, the last that a killed process wrote
                break
            # A validation bears the number of the steps before it.
            if record["step"] >= step + ("validation" in record):
                break
            kept.append(record)
        return kept
