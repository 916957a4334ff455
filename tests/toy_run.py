"""A run of a toy model without BatchNorm, for several processes: ``torchrun tests/toy_run.py FOLDER [CASE ...]``."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mclip.config import ConfigError, DistillConfig, TrainConfig
from mclip.objectives import Distillation
from mclip.pairs import BatchSource, Pairs, Targets
from mclip.train import TrainResult, train

SETTINGS = TrainConfig(
    max_epochs=2, batch_size=9, learning_rate=0.01, progress=False, accelerator="cpu", clip_grad_norm=100.0
)
FIXED = DistillConfig(
    order=("original", "feature", "response"),
    aligner="mlp",
    phases=(0.0, 0.0, 0.5),
    ramp=0.0,
    balancers=("fixed",),
    similarity_weight=1.0,
)
CASES = {
    "info_nce": dataclasses.replace(FIXED, feature_weight=0.0, icl_weight=0.0, similarity_weight=0.0),
    "siglip": dataclasses.replace(FIXED, task="siglip"),
    "all_terms": FIXED,
    "balanced": dataclasses.replace(FIXED, balancers=("gradient_norm",), gradient_check_frequency=1),
    "learned": dataclasses.replace(FIXED, balancers=("uncertainty",)),
}
CASES["resumed"] = CASES["balanced"]
CASES["pieces"] = dataclasses.replace(FIXED, aligner="identity")  # dropout depends on the order of the rows


class Toy(nn.Module):
    """Pictures and token ids (B, T) -> open_clip's dict of outputs; 8 dimensions, dropout in one tower."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(3 * 4 * 4, 8), nn.EmbeddingBag(16, 8)
        self.drop = nn.Dropout(0.0)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-2.0))

    def forward(self, images, tokens):
        return {
            "image_features": F.normalize(self.image(images.flatten(1)), dim=-1),
            "text_features": F.normalize(self.drop(self.text(tokens)), dim=-1),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


class Interrupted(Toy):
    """A model that sends Ctrl-C to its own process while it computes step ``at``."""

    at, calls = 2, 0  # a class attribute, so that a test can set it

    def forward(self, images, tokens):
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        self.calls += 1
        return super().forward(images, tokens)


def settings_of(name: str) -> TrainConfig:
    """The settings of a case: in "pieces" a step has two pieces."""
    return dataclasses.replace(SETTINGS, accumulate_grad_batches=2 if name == "pieces" else 1)


def run(
    folder: str | Path, distill: DistillConfig, settings: TrainConfig = SETTINGS, student: type[Toy] = Toy
) -> TrainResult:
    """Two epochs over 36 pairs; ``folder`` receives log and checkpoints."""
    rng = np.random.default_rng(0)
    pairs = Pairs(rng.integers(0, 256, (36, 3, 4, 4), dtype=np.uint8), [[f"{i % 16}"] for i in range(36)], "toy", "toy")
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.standard_normal((2, 36, 8))]
    torch.manual_seed(0)
    model, objective = student(), Distillation(distill, (8, 8), 8, 10.0)
    batches = BatchSource(
        pairs,
        lambda texts: torch.tensor([[int(text), 1 + int(text) % 3, 5] for text in texts]),
        lambda images: images.float() / 255,
        settings.batch_size,
        settings.seed,
        Targets(unit[0], unit[1], 10.0, "toy"),
    )
    return train(model, batches, settings, objective=objective, out_dir=folder)


def run_by_several_clocks(folder: Path) -> None:
    """Ctrl-C on all processes in a step after which a checkpoint is due by the clock of process 1 alone."""
    rank = os.environ["RANK"]
    settings = dataclasses.replace(SETTINGS, checkpoint_minutes=1e-9 if rank == "1" else 1e9)
    try:
        run(folder, CASES["balanced"], settings, Interrupted)
    except KeyboardInterrupt:
        (folder / f"stopped-{rank}").touch()


def run_in_folders_of_their_own(folder: Path) -> None:
    """Each process has its own folder; only that of process 0 holds a run to go on with."""
    rank = os.environ["RANK"]
    try:
        run(folder / rank, CASES["balanced"])
    except ConfigError as error:
        (folder / f"refused-{rank}").write_text(str(error))


if __name__ == "__main__":
    for name in sys.argv[2:] or CASES:
        if name == "clocks":
            run_by_several_clocks(Path(sys.argv[1]) / name)
        elif name == "apart":
            run_in_folders_of_their_own(Path(sys.argv[1]) / name)
        else:
            run(Path(sys.argv[1]) / name, CASES[name], settings_of(name))
