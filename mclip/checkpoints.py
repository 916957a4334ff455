"""The folder of a run: its log, and checkpoints from which it goes on as if nothing had happened.

A checkpoint holds weights, aligners, balancer, optimiser, moving average, gradient scaler, counters and log, and not
the teacher. The order of the data and the random numbers are functions of seed, step and process, and need no state.
So a run may go on with another number of processes.
"""

import json
import math
import pickle
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path

import torch
from torch import nn

from mclip.config import ConfigError, DistillConfig, TrainConfig, differences
from mclip.files import atomic_path, read_json, write_json
from mclip.pairs import BatchSource
from mclip.results import weights_sha256
from mclip.steps import Record

STATE = ("step", "seconds", "best", "stale", "finished", "log")
KEPT = 2  # checkpoints: the older one serves where the newer one is damaged


def run_identity(model: nn.Module, batches: BatchSource, config: TrainConfig, distill: DistillConfig) -> Record:
    """Everything that decides how a run ends. A checkpoint serves only a run that agrees in all of it."""
    architecture, free = getattr(model, "config", None), ("progress", "checkpoint_minutes", "accelerator")
    identity = {
        "model": asdict(architecture) if is_dataclass(architecture) else None,
        "starting_weights": weights_sha256(model)[:16],
        "train": {key: value for key, value in asdict(config).items() if key not in free},
        # Without a teacher, phases and balancers decide nothing.
        "distill": asdict(distill) if batches.targets else {"task": distill.task},
        "data": batches.pairs.key,
        "teacher_targets": batches.targets.key if batches.targets else None,
    }
    return json.loads(json.dumps(identity))  # tuples become lists, as in the file that it is compared with


@dataclass
class RunState:
    """How far a run has come, its log and its checkpoints, kept in ``folder``."""

    folder: Path
    identity: Record  # from run_identity: a checkpoint of another run is refused
    parts: Record  # what is saved and restored, by name: anything with state_dict and load_state_dict
    writes: bool  # False for all but one of several processes, which only read
    on_record: Callable[[Record], None] | None = None  # called with each new record of the log
    step: int = 0  # optimiser steps done
    seconds: float = 0.0  # that they took
    best: float = -math.inf  # validation so far, by a metric where higher is better
    stale: int = 0  # validations since the best
    finished: bool = False
    log: list[Record] = field(default_factory=list)
    saved: float = field(default_factory=time.monotonic)  # when the last checkpoint was written

    def checkpoints(self) -> list[Path]:
        """The files of the checkpoints, newest first."""
        return sorted(self.folder.glob("checkpoint-*.pt"), reverse=True)

    def begin(self, resume: bool = True) -> None:
        """Go on from the newest readable checkpoint, if any; ConfigError if the folder holds another run."""
        files, settings = self.checkpoints() if resume else [], self.folder / "settings.json"
        if files and (changed := differences(read_json(settings), self.identity)):
            remedy = "Choose another folder, or delete this one to train anew."
            raise ConfigError(f"{self.folder} holds a run with other settings: {'; '.join(changed)}. {remedy}")
        for file in files:
            try:
                content = torch.load(file, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
                print(f"{file} is damaged ({type(error).__name__}); going back to the checkpoint before.")
                continue
            for name in self.parts.keys() & content["parts"].keys():  # a scaler of 16-bit floats is a GPU's alone
                self.parts[name].load_state_dict(content["parts"][name])
            vars(self).update(content["state"])
            break
        if not self.writes:
            return
        # A process that was killed while it wrote a file leaves half of it under another name.
        stale = [file for pattern in (".*.part", "model/.*.part") for file in self.folder.glob(pattern)]
        for file in stale + (self.checkpoints() if self.step == 0 else []):
            file.unlink()
        write_json(settings, self.identity)
        with atomic_path(self.folder / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.log), encoding="utf-8")

    def record(self, record: Record) -> None:
        """Append one line to the log."""
        self.log.append(record)
        if self.writes:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
            if self.on_record:
                self.on_record(record)

    def save(self) -> None:
        """Write a checkpoint; keep the last two."""
        self.saved = time.monotonic()
        if not self.writes:
            return
        content = {"parts": {name: part.state_dict() for name, part in self.parts.items()}}
        content["state"] = {name: getattr(self, name) for name in STATE}
        with atomic_path(self.folder / f"checkpoint-{self.step:08d}.pt") as temporary:
            torch.save(content, temporary)
        for file in self.checkpoints()[KEPT:]:
            file.unlink()
