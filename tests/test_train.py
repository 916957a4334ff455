"""The training loop, objectives and checkpoints, on a student of a few thousand parameters."""

import dataclasses
import errno
import json
import math

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3

from mclip.config import ConfigError, DistillConfig, ImageConfig, ModelConfig, TextConfig, TrainConfig
from mclip.model import MobileCLIP
from mclip.objectives import Contrastive, Distillation
from mclip.pairs import Batch, BatchSource, Pairs, Targets
from mclip.recipes import BASE, student_prepare
from mclip.show.figures import read_log
from mclip.steps import TrainError
from mclip.teacher import load_open_clip
from mclip.train import learning_rate, train

TINY = ModelConfig(
    "tiny",
    16,
    ImageConfig(width=0.25, image_size=32, bn_momentum=0.1),
    TextConfig(width=16, heads=2, kernels=(3,), feed_forward=16, embedding_rank=4, dropout=0.1, context_length=12),
)
ALL_TERMS = DistillConfig(
    aligner="mlp",
    similarity_weight=1.0,
    phases=(0.2, 0.4, 0.8),
    gradient_check_frequency=2,
    balancers=("gradient_norm", "magnitude"),
    plateau_patience=1,
)
SETTINGS = TrainConfig(max_epochs=3, batch_size=8, progress=False, accelerator="cpu")
WORDS = ["red star", "blue ring", "green heart", "black moon", "white box", "pink drop", "brown cross", "gold arrow"]


def toy_pairs(pictures=24):
    rng = np.random.default_rng(0)
    captions = [[f"a {WORDS[i % 8]}", f"the {WORDS[i % 8]} {i}"] for i in range(pictures)]
    return Pairs(rng.integers(0, 256, (pictures, 3, 32, 32), dtype=np.uint8), captions, "toy", "toy")


def run(
    tmp_path,
    distill=BASE,
    settings=SETTINGS,
    resume=True,
    validate=None,
    stop_after=None,
    pairs=None,
    config=TINY,
    teacher="teacher",
):
    torch.manual_seed(settings.seed)
    model, pairs = MobileCLIP(config), pairs or toy_pairs()
    targets, objective = None, Contrastive(distill)
    if distill.feature_weight:
        rng = np.random.default_rng(1)
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.standard_normal((2, 2 * len(pairs), 16))]
        targets = Targets(unit[0][: len(pairs)], unit[1], 20.0, teacher)
        objective = Distillation(distill, (16, 16), 16, 20.0)
    batches = BatchSource(pairs, model.tokenizer, student_prepare(TINY), settings.batch_size, settings.seed, targets)

    def stop(record):
        if stop_after is not None and record.get("step") == stop_after:
            raise KeyboardInterrupt

    return train(
        model,
        batches,
        settings,
        objective=objective,
        out_dir=tmp_path,
        resume=resume,
        validate=validate,
        on_record=stop,
    )


def state(result):
    return result.model.state_dict()


@pytest.mark.parametrize("distill", [BASE, ALL_TERMS], ids=["base", "distillation"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, distill):
    settings = dataclasses.replace(SETTINGS, ema_decay=0.9)
    metric = lambda model: {"r1": 1.0}  # noqa: E731
    whole = run(tmp_path / "whole", distill, settings, validate=metric)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", distill, settings, validate=metric, stop_after=7)
    resumed = run(tmp_path / "cut", distill, settings, validate=metric)
    assert resumed.steps == whole.steps == 9
    for key, value in state(whole).items():
        assert torch.equal(value, state(resumed)[key]), key
    assert (tmp_path / "cut" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_after=7)
    newest = max((tmp_path / "cut").glob("checkpoint-*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    resumed = run(tmp_path / "cut")
    assert "damaged" in capsys.readouterr().out
    assert all(torch.equal(value, state(resumed)[key]) for key, value in state(whole).items())


def test_a_folder_with_another_run_is_refused_with_the_difference(tmp_path):
    run(tmp_path)
    with pytest.raises(ConfigError, match=r"learning_rate was 0\.001 and is now 0\.01"):
        run(tmp_path, settings=dataclasses.replace(SETTINGS, learning_rate=0.01))
    other = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, dropout=0.0))
    with pytest.raises(ConfigError, match=r"model\.text\.dropout was 0\.1 and is now 0\.0"):
        run(tmp_path, config=other)


def test_a_finished_run_is_not_passed_off_as_one_with_another_teacher(tmp_path):
    run(tmp_path, ALL_TERMS, teacher="one")
    with pytest.raises(ConfigError, match="teacher_targets was 'one' and is now 'another'"):
        run(tmp_path, ALL_TERMS, teacher="another")


def test_a_finished_run_is_returned_at_once(tmp_path):
    first, second = run(tmp_path), run(tmp_path, settings=dataclasses.replace(SETTINGS, progress=True))
    assert second.log == first.log
    assert all(torch.equal(value, state(second)[key]) for key, value in state(first).items())


def test_the_log_holds_every_term_weight_and_temperature(tmp_path):
    result = run(tmp_path, ALL_TERMS, validate=lambda model: {"r1": 2.0, "r5": 3.0})
    steps = [record for record in read_log(tmp_path / "log.jsonl") if "loss" in record]
    assert [record["step"] for record in steps] == list(range(9))
    assert [record["phase"] for record in steps] == [1, 1, 2, 2, 3, 3, 3, 3, 3]
    assert set(steps[0]["terms"]) == {"feature", "similarity"}
    assert set(steps[-1]["terms"]) == {"original", "feature", "similarity", "response", "icl"}
    for record in steps:
        assert sum(record["weights"].values()) == pytest.approx(len(record["weights"]))
        assert record["loss"] == pytest.approx(
            sum(record["weights"][k] * v for k, v in record["terms"].items()), rel=1e-4
        )
        measured = record["step"] % ALL_TERMS.gradient_check_frequency == 0
        assert record.get("pulls", {}).keys() == (record["terms"].keys() if measured else set())
    assert (steps[0]["temperature"], steps[-1]["temperature"]) == (4.0, 1.0)
    assert len(result.validations()) == 3


def test_a_small_set_is_learnt_by_heart(tmp_path):
    settings = dataclasses.replace(SETTINGS, max_epochs=40, learning_rate=3e-3, batch_size=8)
    log = run(tmp_path, settings=settings, pairs=toy_pairs(8)).log
    assert log[0]["loss"] > 1.5
    assert log[-1]["loss"] < 1.0


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Broken(Contrastive):
        def _original(self, output, batch, temperature):
            good = super()._original(output, batch, temperature)
            return good if batch.index.sum() % 2 == 0 else good * math.nan

    model, pairs = MobileCLIP(TINY), toy_pairs()
    batches = BatchSource(pairs, model.tokenizer, student_prepare(TINY), 8, 0)
    with pytest.raises(TrainError, match=r"step \d+: the term 'original' is nan.*start in another folder"):
        train(model, batches, SETTINGS, objective=Broken(BASE), out_dir=tmp_path)


def test_early_stopping_counts_evaluations_without_improvement(tmp_path):
    settings = dataclasses.replace(SETTINGS, max_epochs=9, early_stopping_patience=2)
    scores = iter([5.0, 6.0, 6.0, 5.0, 9.0])
    result = run(tmp_path, settings=settings, validate=lambda model: {"r1": next(scores)})
    assert result.steps == 4 * 3
    assert len(result.validations()) == 4


def test_accumulation_takes_fewer_larger_steps(tmp_path):
    result = run(tmp_path, settings=dataclasses.replace(SETTINGS, accumulate_grad_batches=3))
    assert result.steps == 3


def test_the_moving_average_is_what_is_returned(tmp_path):
    plain = run(tmp_path / "plain")
    averaged = run(tmp_path / "averaged", settings=dataclasses.replace(SETTINGS, ema_decay=0.5))
    key = "image_projection.shortcut.weight"
    assert not torch.equal(state(plain)[key], state(averaged)[key])


def test_a_slow_average_of_a_short_run_has_forgotten_the_start(tmp_path):
    torch.manual_seed(SETTINGS.seed)
    start, end = MobileCLIP(TINY).state_dict(), state(run(tmp_path / "plain"))
    average = state(run(tmp_path / "averaged", settings=dataclasses.replace(SETTINGS, ema_decay=0.999)))
    key = "image_projection.shortcut.weight"
    assert (average[key] - end[key]).norm() < (average[key] - start[key]).norm() / 2


def test_a_moving_average_against_the_closed_form():
    """The share of the old average rises as 1 - n^(-2/3) (timm), and stays at the decay that is asked for."""
    model = torch.nn.Linear(1, 1, bias=False)
    average, expected = ModelEmaV3(model, 0.5, use_warmup=True), 0.0
    for step, weight in enumerate((1.0, 2.0, 4.0, 8.0), 1):
        torch.nn.init.constant_(model.weight, weight)
        average.update(model, step)
        share = min(0.5, 1 - step ** (-2 / 3))
        expected = share * expected + (1 - share) * weight
        assert average.module.weight.item() == pytest.approx(expected)


def test_a_moving_average_of_weights_beside_a_mask():
    """The model of open_clip has a mask of -inf in its text tower."""
    model, _ = load_open_clip("clip")
    average = ModelEmaV3(model, 0.5, use_warmup=True)
    for step in (1, 2, 3):
        average.update(model, step)
    for (name, one), (_, other) in zip(model.named_buffers(), average.module.named_buffers(), strict=True):
        assert torch.equal(one, other), name


def test_an_unwritable_folder_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OSError, match="file"):
        run(tmp_path / "file" / "run")


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    save, calls = torch.save, iter(range(100))

    def full(content, path):
        save(content, path)
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut").glob("*checkpoint*")] == ["checkpoint-00000003.pt"]
    resumed = run(tmp_path / "cut")
    assert all(torch.equal(value, state(resumed)[key]) for key, value in state(whole).items())


def fake_output(batch=6, width=16):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.nn.functional.normalize(torch.randn(batch, width, generator=generator), dim=-1)  # noqa: E731
    output = {
        "image_features": draw(),
        "text_features": draw(),
        "logit_scale": torch.tensor(10.0),
        "logit_bias": torch.tensor(-10.0),
    }
    return output, Batch(torch.zeros(batch, 1), torch.zeros(batch, 1), torch.arange(batch), draw(), draw())


def test_defect_01_every_active_term_is_delivered_and_not_zero():
    """The existing loop read keys that the model never returned: each distillation term was 0."""
    output, batch = fake_output()
    objective = Distillation(ALL_TERMS, (16, 16), 16, 20.0)
    names = {"original", "feature", "similarity", "response", "icl"}
    terms = objective(output, batch, names, 4.0)
    assert set(terms) == names
    assert all(term.item() > 0 for term in terms.values())
    with pytest.raises(AttributeError):
        objective(output, batch, {"image_distillation_loss"}, 4.0)
    defective = {name: output.get(f"{name}_loss", torch.tensor(0.0)) for name in names}
    assert not all(term.item() > 0 for term in defective.values())  # the check above rejects it


def test_defect_08_the_rate_decays_to_zero_whatever_the_length():
    """A cosine stepped once an epoch with T_max in steps hardly moves; ours is a function of the step."""
    config = dataclasses.replace(SETTINGS, max_epochs=10, warmup=0.1)
    for total in (20, 1000):
        rates = [learning_rate(step, total, config) for step in range(total)]
        assert max(rates) == pytest.approx(config.learning_rate)
        assert rates[-1] < 0.02 * config.learning_rate
        peak = rates.index(max(rates))
        assert all(a >= b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
    for _ in range(config.max_epochs):  # the defective form: stepped per epoch
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] > 0.99 * config.learning_rate


def test_learning_rate_against_torch():
    config = dataclasses.replace(SETTINGS, warmup=0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=99)
    for step in range(1, 100):
        assert learning_rate(step, 100, config) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_defect_12_a_checkpoint_holds_the_phase_and_never_the_teacher(tmp_path):
    """The existing checkpoints held the frozen teacher but not the phase, and were unpickled whatever they were."""
    run(tmp_path, ALL_TERMS)
    file = max(tmp_path.glob("checkpoint-*.pt"))
    content = torch.load(file, weights_only=True)
    keys = set(content["parts"]["modules"])
    assert not [key for key in keys if "teacher" in key]
    assert content["state"]["step"] == 9
    assert {"index", "best", "stale", "log_factors"} <= set(content["parts"]["modules"]["balancer._extra_state"])
    assert any("aligner" in key for key in keys)
    settings = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))
    assert settings["distill"]["phases"] == [0.2, 0.4, 0.8]


def test_task_losses_are_selectable(tmp_path):
    losses = {
        task: run(tmp_path / task, dataclasses.replace(BASE, task=task), resume=False).log[0]["loss"]
        for task in ("info_nce", "jsd")
    }
    assert losses["info_nce"] != losses["jsd"]
