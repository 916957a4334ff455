"""SIGKILL at random steps, twenty times in one run: it resumes each time and ends as the unbroken run, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mclip.show.figures import read_log

MODEL = """\
name: tiny
embed_dim: 16
image: {width: 0.25, image_size: 32, bn_momentum: 0.1}
text: {width: 16, heads: 2, kernels: [3], feed_forward: 16, embedding_rank: 1, dropout: 0.1, context_length: 12}
"""
TERMS = """\
aligner: mlp
phases: [0.25, 0.6, 0.9]
balancers: [gradient_norm, uncertainty]
gradient_check_frequency: 2
plateau_patience: 2
"""
PER_EPOCH, EPOCHS = 4, 6
STEPS = PER_EPOCH * EPOCHS
OPTIONS = {
    "profile": "smoke",
    "data_size": "0.125",
    "batch_size": "8",
    "max_epochs": str(EPOCHS),
    "learning_rate": "0.003",
    "progress": "false",
    "accelerator": "cpu",
}
INSIDE = ("between", "gradient", "line")
WITH_CHECKPOINT = ("half", "whole", "named")


class Killable:
    """The process of killable.py."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        environment = os.environ | {"MCLIP_CACHE": str(self.cache), "OMP_NUM_THREADS": "1"}
        script = Path(__file__).with_name("killable.py")
        environment["PYTHONPATH"] = str(script.parents[1])
        self.errors = (folder / "errors.txt").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        assert self._answer() == "ready"

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        return json.loads(line) if line else pytest.fail(self.printed())

    def printed(self) -> str:
        """The end of what the commands have printed."""
        return Path(self.errors.name).read_text(encoding="utf-8")[-3000:]

    def attempt(self, arguments: list[str], **request: Any) -> int:
        """The exit status of one command, killed as ``request`` says."""
        self.process.stdin.write(json.dumps({"arguments": arguments, **request}) + "\n")
        self.process.stdin.flush()
        return self._answer()


@pytest.fixture(scope="module")
def killable(tmp_path_factory) -> Iterator[Killable]:
    server = Killable(tmp_path_factory.mktemp("killable"))
    yield server
    server.process.stdin.close()
    assert server.process.wait(timeout=60) == 0


def last_place(log: Path) -> tuple[int, int]:
    """Phase and step of the last whole record of a step; (0, -1) without one."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    steps = [(record["phase"], record["step"]) for record in records if "loss" in record]
    return steps[-1] if steps else (0, -1)


def moments(within_epochs: bool, seed: int = 0) -> list[dict[str, Any]]:
    """Twenty moments at random steps in rising order, at places in turn."""
    rng, plan = random.Random(seed), []
    for number, step in enumerate(sorted(rng.sample(range(STEPS - 1), 20))):
        ends_epoch = (step + 1) % PER_EPOCH == 0
        places = INSIDE + (WITH_CHECKPOINT if within_epochs or ends_epoch else ())
        if step < STEPS - 2 * PER_EPOCH:  # the process that kills may be late, and the run must not have ended
            places += ("any",)
        place = "validation" if ends_epoch and number % 2 else rng.choice(places)
        plan.append({"place": place, "step": step, "delay": rng.uniform(0, 0.05) if place == "any" else 0.0})
    return plan


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested dicts of tensors and plain values are not the same, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys(), key=str)
        return [d for key in keys for d in differences(one.get(key), other.get(key), f"{where}.{key}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    return [] if one == other else [where]


def run_differences(one: Path, other: Path) -> list[str]:
    """What two runs' folders disagree in: log, model, settings, and all that is in the newest checkpoint."""
    files = ("log.jsonl", "model/model.safetensors", "model/config.json", "settings.json")
    newest = [max(folder.glob("checkpoint-*.pt")) for folder in (one, other)]
    found = [name for name in files if (one / name).read_bytes() != (other / name).read_bytes()]
    found += [path.name for path in newest if path.name != newest[0].name]
    contents = [torch.load(path, weights_only=True) for path in newest]
    assert min(content["state"].pop("seconds") for content in contents) > 0
    return found + differences(*contents, "checkpoint")


@pytest.mark.parametrize(("command", "within_epochs"), [("train", False), ("distill", True)])
def test_twenty_kills_lose_nothing(killable, tmp_path, command, within_epochs):
    """Base with checkpoints at the end of each epoch alone, the three phases with one after each step."""
    (tmp_path / "tiny.yaml").write_text(MODEL, encoding="utf-8")
    (tmp_path / "terms.yaml").write_text(TERMS, encoding="utf-8")
    options = OPTIONS | {"config_path": str(tmp_path / "tiny.yaml"), "checkpoint_dir": str(tmp_path)}
    if command == "train":
        options["ema_decay"] = "0.9"
    else:
        options["auto_kd_config"] = str(tmp_path / "terms.yaml")
    arguments = [command] + [word for key, value in options.items() for word in (f"--{key}", value)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    minutes = "0.000001" if within_epochs else "10"
    cut_arguments = [*arguments, "--checkpoint_filename", "cut", "--checkpoint_minutes", minutes]
    log, phases = cut / "log.jsonl", []

    start = ["drawing"] if command == "train" else ["targets", "beginning"]
    middle = moments(within_epochs)
    middle.insert(len(middle) // 2, {"place": "beginning"})
    for moment in [*({"place": place} for place in start), *middle, {"place": "model"}]:
        status = killable.attempt(cut_arguments, **moment, log=str(log))
        assert status == -signal.SIGKILL, (moment, status, killable.printed())
        phase, step = last_place(log)
        print(command, moment, phase, step)
        assert step >= moment.get("step", 0) - 1 or "step" not in moment, (moment, step)
        phases.append(phase)
    assert len(phases) > 20
    reached = {0, 1, 2, 3} if command == "distill" else {0, 1}
    assert set(phases) == reached
    assert all(phases.count(phase) >= 4 for phase in reached - {0})

    assert killable.attempt(cut_arguments) == 0, killable.printed()
    assert killable.attempt([*arguments, "--checkpoint_filename", "whole"]) == 0, killable.printed()
    assert len([record for record in read_log(log) if "loss" in record]) == STEPS
    assert not run_differences(cut, whole)
    left = [path for path in (*cut.rglob(".*"), *killable.cache.rglob(".*/")) if path.suffix != ".lock"]
    assert not left, "files that were being written when the process died"
