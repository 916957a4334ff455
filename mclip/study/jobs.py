"""Many trainings, one record each: finished work is not repeated, and several processes share what is left.

A record is finished work only for a job that agrees with it in all settings. A job that was killed goes on from the
checkpoints in its folder, which is deleted when the record is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from mclip.files import content_key
from mclip.results import save_result


@dataclass(frozen=True)
class Job:
    """One record to be made.

    Attributes:
        path: the record's file.
        settings: plain data, all that decides the record; ``work`` puts it into ``details.configuration``.
        work: makes the record, given a folder for checkpoints.
    """

    path: Path
    settings: dict[str, Any]
    work: Callable[[Path], dict[str, Any]]

    def is_finished(self) -> bool:
        """Whether the file holds the record of just this job."""
        if not self.path.exists():
            return False
        return json.loads(self.path.read_text(encoding="utf-8"))["details"]["configuration"] == self.settings


def results_folder(committed: Path, out_dir: str | Path, shipped: bool) -> Path:
    """Where records go: ``committed`` for the settings of those that ship, below ``out_dir`` for all others.

    A short trial must not take the place of a record that figures and prose are read from.
    """
    if shipped:
        return committed
    folder = Path(out_dir) / "results"
    print(f"not the settings of the records that ship: these go to {folder}")
    return folder


def work_off(jobs: Sequence[Job], out_dir: str | Path, label: str) -> None:
    """Do what is not finished, in order, and show progress and the time left.

    Start it in several processes at once, with the same ``out_dir``, to use several processors.
    """
    out = Path(out_dir)
    left = [job for job in jobs if not job.is_finished()]
    print(f"{label}: {len(jobs)} in all, {len(left)} left, {torch.get_num_threads()} threads")
    with tqdm(total=len(left), unit="run", desc=label, smoothing=0.1) as bar:
        for job in _turns(left, out, bar):
            name = job.path.stem
            bar.set_postfix_str(name)
            folder = out / f"{name}-{content_key(job.settings)}"
            record = job.work(folder)
            save_result(job.path, record)
            shutil.rmtree(folder, ignore_errors=True)
            bar.write(f"{name}: {record.get('error', 'done')} ({record['seconds']:.0f} s)")


def _turns(jobs: Sequence[Job], out: Path, bar: tqdm) -> Iterator[Job]:
    """The jobs nobody else works on, each held by a lock meanwhile; then those of processes that died."""
    out.mkdir(parents=True, exist_ok=True)
    left = list(jobs)
    for patience in (0, -1):
        for job in list(left):
            try:
                with FileLock(out / f".{job.path.stem}.lock", timeout=patience):
                    if not job.is_finished():  # another process may have been faster
                        yield job
            except Timeout:
                continue
            left.remove(job)
            bar.update()
