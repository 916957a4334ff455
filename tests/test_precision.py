"""16-bit floats with a gradient scaler: a step that overflows is skipped, and the scale is part of the checkpoint.

Fabric has this precision for GPUs alone. Here its own plugin runs on the CPU, in float16, with the scaler of PyTorch.
"""

import dataclasses
import math

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from toy_run import CASES, SETTINGS, Interrupted, Toy, run

from mclip.steps import TrainError

HALF = dataclasses.replace(SETTINGS, precision="16-mixed", max_epochs=4, batch_size=12)


@pytest.fixture
def scaled(monkeypatch) -> None:
    """Runs begin with a scale that overflows at once, and that grows again after three good steps."""

    def fabric(config):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-6, growth_interval=3)
        made = Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        made.launch()
        return made

    monkeypatch.setattr("mclip.train.make_fabric", fabric)


def state(folder):
    return torch.load(max(folder.glob("checkpoint-*.pt")), weights_only=True)


@pytest.mark.parametrize("pieces", [1, 3])
def test_an_overflow_skips_the_step_and_the_run_goes_on(tmp_path, scaled, pieces):
    settings = dataclasses.replace(HALF, accumulate_grad_batches=pieces, max_epochs=4 * pieces)
    result = run(tmp_path, CASES["all_terms"], settings)
    skipped = [record.get("skipped", False) for record in result.log]
    assert result.steps == len(skipped) == 12
    assert skipped[0]
    assert 0 < sum(skipped) < 4
    assert result.log[-1]["terms"]["original"] < result.log[0]["terms"]["original"]
    assert all(value.isfinite().all() for value in result.model.state_dict().values())


def test_a_skipped_step_leaves_the_weights_alone(tmp_path, scaled):
    torch.manual_seed(0)
    before = Toy().state_dict()
    settings = dataclasses.replace(HALF, max_epochs=1, batch_size=36)
    after = run(tmp_path, CASES["info_nce"], settings)
    assert after.log[0]["skipped"]
    assert all(torch.equal(value, before[name]) for name, value in after.model.state_dict().items())


@pytest.mark.parametrize("step", [0, 2, 7])
def test_the_scale_is_in_the_checkpoint_and_a_run_resumes_bit_for_bit(tmp_path, scaled, monkeypatch, step):
    run(tmp_path / "whole", CASES["balanced"], HALF)
    monkeypatch.setattr(Interrupted, "at", step)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", CASES["balanced"], HALF, Interrupted)
    assert state(tmp_path / "cut")["parts"]["scaler"]["scale"] < 2.0**24
    run(tmp_path / "cut", CASES["balanced"], HALF)
    whole, cut = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert whole["parts"]["scaler"] == cut["parts"]["scaler"]
    for name, value in whole["parts"]["modules"].items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, cut["parts"]["modules"][name]), name
    assert (tmp_path / "cut" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_a_gradient_that_no_scale_makes_finite_stops_the_run(tmp_path, scaled):
    class Broken(Toy):
        def forward(self, images, tokens):
            output = super().forward(images, tokens)
            output["image_features"].register_hook(lambda gradient: gradient * math.nan)
            return output

    with pytest.raises(TrainError, match=r"step \d: the gradient of .*original.* is not finite"):
        run(tmp_path, CASES["info_nce"], HALF, Broken)
