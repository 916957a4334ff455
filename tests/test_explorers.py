"""The explorers without a browser: what they draw against the losses and the balancer, and their controls."""

from __future__ import annotations

import ipywidgets
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from mclip import losses
from mclip.balancing import STRATEGIES
from mclip.config import ConfigError, DistillConfig
from mclip.files import DATA
from mclip.recipes import BASE
from mclip.show import widgets
from mclip.show.figures import read_log, training_curves
from mclip.show.style import figure
from mclip.show.widgets import (
    TEMPERATURES,
    ablation_explorer,
    circle_chart,
    circle_explorer,
    kernel_chart,
    kernel_explorer,
    loss_chart,
    loss_explorer,
    pair_chart,
    replay,
    response_and_gradient,
    schedule_explorer,
)

CAPTIONS = ["a red star", "a $ heart", "a blue ring", "a thing"]


@pytest.fixture(scope="module")
def student() -> tuple[torch.Tensor, torch.Tensor, float]:
    return *embeddings(0, 8), 12.0


@pytest.fixture(scope="module")
def teacher() -> tuple[torch.Tensor, torch.Tensor, float]:
    return *embeddings(1, 16), 20.0


def embeddings(seed: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(4, width, generator=generator), dim=1) for _ in range(2))


@pytest.fixture(scope="module")
def log() -> list[dict]:
    return read_log(DATA / "results" / "logs" / "kd.jsonl")


def steps_of(log: list[dict]) -> list[dict]:
    return [record for record in log if "terms" in record]


def controls_of(explorer: ipywidgets.VBox) -> tuple[tuple, ipywidgets.HTML, ipywidgets.Image]:
    above, message, chart, _errors = explorer.children
    return above.children, message, chart


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_gradient_of_the_response_is_its_slope(student, teacher, temperature):
    """The norm against the closed form of the gradient, (q - p) / T times T^2 at the logits, both ways averaged."""
    loss, norm = response_and_gradient(student, teacher, temperature)
    assert loss == pytest.approx(losses.response(*student[:2], *teacher[:2], 12.0, 20.0, temperature).item())
    ours, theirs = 12.0 * student[0] @ student[1].T, 20.0 * teacher[0] @ teacher[1].T
    across = (ours / temperature).softmax(1) - (theirs / temperature).softmax(1)
    down = (ours / temperature).softmax(0) - (theirs / temperature).softmax(0)
    at_logits = temperature * (across + down) / (2 * len(ours))
    at_embeddings = 12.0 * torch.cat([at_logits @ student[1], at_logits.T @ student[0]])
    assert norm == pytest.approx(at_embeddings.norm().item(), rel=1e-4)


def test_loss_chart_shows_what_the_losses_say(student, teacher):
    fig = loss_chart(student, teacher, CAPTIONS, temperature=2.0, row=1)
    left, right, rows, curves, _colours = fig.axes
    for ax, (image, text, scale) in ((left, teacher), (right, student)):
        expected = F.softmax(scale * image @ text.T / 2.0, dim=1).numpy()
        np.testing.assert_allclose(ax.images[0].get_array(), expected, atol=1e-6)
    widths = np.array([bar.get_width() for bar in rows.patches])
    drawn = np.concatenate([left.images[0].get_array()[1], right.images[0].get_array()[1]])
    assert widths == pytest.approx(drawn)
    lines = {line.get_label(): line for line in curves.lines if not line.get_label().startswith("_")}
    for i in (0, 12, 24):
        loss = losses.response(*student[:2], *teacher[:2], 12.0, 20.0, TEMPERATURES[i]).item()
        assert lines["KL times T²"].get_ydata()[i] == pytest.approx(loss, rel=1e-5)
        assert lines["KL"].get_ydata()[i] == pytest.approx(loss / TEMPERATURES[i] ** 2, rel=1e-5)
    assert [label.get_text()[:4] for label in rows.get_yticklabels()] == ["a re", r"a \$", "a bl", "a th"]


def test_nothing_to_learn_at_the_teachers_own_place(teacher):
    loss, norm = response_and_gradient(teacher, teacher, 4.0)
    assert (loss, norm) == pytest.approx((0, 0), abs=1e-4)


def test_loss_explorer_follows_each_control(student, teacher):
    controls, message, chart = controls_of(loss_explorer(student, teacher, CAPTIONS))
    assert all(control.description and not control.continuous_update for control in controls)
    seen = {bytes(chart.value)}
    for control, value in zip(controls, (1.0, 40.0, 4), strict=True):
        control.value = value
        seen.add(bytes(chart.value))
    assert len(seen) == 4
    assert message.value == ""
    expected = loss_chart((*student[:2], 40.0), teacher, CAPTIONS, 1.0, 3)._repr_png_()
    assert bytes(chart.value) == expected


def test_replay_of_the_recorded_settings_is_the_record(log):
    steps, replayed = steps_of(log), replay(log, DistillConfig())
    assert len(replayed) == len(steps)
    for step, again in zip(steps, replayed, strict=True):
        assert again["weights"] == pytest.approx(step["weights"], rel=1e-6)
        for key in ("step", "phase", "temperature", "terms", "strategy"):
            assert again[key] == step[key]


def test_magnitude_gives_every_term_its_prior_in_the_end(log):
    """With no memory, weight times loss is proportional to the prior: the definition, by hand."""
    settings = {"adaptation_rate": 1.0, "gradient_check_frequency": 1, "feature_weight": 5.0}
    last = replay(log, DistillConfig(balancers=("magnitude",), **settings))[-1]
    products = {name: weight * last["terms"][name] for name, weight in last["weights"].items()}
    assert products["feature"] == pytest.approx(5 * products["original"])
    assert products["response"] == pytest.approx(products["original"])
    assert products["icl"] == pytest.approx(products["original"])


def test_gradient_norm_weighs_by_the_norms_that_were_recorded(log):
    """With no memory, weight times norm is the same for all terms, where all have been measured."""
    replayed = replay(log, DistillConfig(balancers=("gradient_norm",), adaptation_rate=1.0))
    measured = [record for record in steps_of(log) if "pulls" in record][-1]
    weights = replayed[measured["step"]]["weights"]
    products = [weight * measured["pulls"][name] for name, weight in weights.items()]
    assert len(products) == 4
    assert products == pytest.approx(products[:1] * 4, rel=1e-4)


def test_uncertainty_moves_towards_small_losses(log):
    last = replay(log, DistillConfig(balancers=("uncertainty",)))[-1]
    assert last["weights"]["feature"] > last["weights"]["original"]
    assert sum(last["weights"].values()) == pytest.approx(4)


def test_an_earlier_phase_takes_the_first_recorded_loss(log):
    first = next(record for record in steps_of(log) if "response" in record["terms"])
    replayed = replay(log, DistillConfig(phases=(0.1, 0.7, 0.9)))
    joined = next(record for record in replayed if "response" in record["terms"])
    assert joined["step"] == round(0.1 * len(replayed)) < first["step"]
    assert joined["terms"]["response"] == first["terms"]["response"]


def test_a_log_without_gradient_norms_is_named():
    steps = [{"step": s, "terms": {"original": 1.0}, "weights": {"original": 1.0}, "strategy": "fixed"} for s in (0, 1)]
    with pytest.raises(ConfigError, match="no gradient norms of all terms"):
        replay(steps, BASE)


def test_schedule_explorer_draws_the_replay_of_its_controls(log, monkeypatch):
    drawn = []
    monkeypatch.setattr(widgets, "training_curves", lambda replayed: drawn.append(replayed) or figure(1, 1))
    controls, message, _ = controls_of(schedule_explorer(log))
    assert drawn == [replay(log, DistillConfig())]
    changes = {
        "starts": ((0.2, 0.4), {"phases": (0.2, 0.4, 0.9)}),
        "end": (0.7, {"phases": (0.2, 0.4, 0.7)}),
        "ramp": (0.1, {"ramp": 0.1}),
        "heat": ((2.0, 6.0), {"min_temperature": 2.0, "max_temperature": 6.0}),
        "balancer": (("fixed",), {"balancers": ("fixed",)}),
    }
    chosen = {}
    for control, (value, settings) in zip(controls, changes.values(), strict=True):
        control.value, chosen = value, chosen | settings
        assert drawn[-1] == replay(log, DistillConfig(**chosen)) != drawn[-2]
    assert {name for row in controls[-1].options.values() for name in row} == set(STRATEGIES)
    assert message.value == ""


def test_bounds_out_of_order_are_a_sentence_under_the_controls(log):
    controls, message, chart = controls_of(schedule_explorer(log))
    assert bytes(chart.value) == training_curves(replay(log, DistillConfig()))._repr_png_()
    assert all(control.description for control in controls)
    controls[1].value = 0.1
    assert "rising order" in message.value
    assert bytes(chart.value) == b""


def on_circle(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_circle_chart_shows_the_slope_of_the_loss():
    """The matrix against autograd at the logits, the arrows against small turns of each picture."""
    angles, text = [0.0, 40.0, 170.0], on_circle(35, 55, 205)
    circle, matrix, curve, _colours = circle_chart(on_circle(*angles), text, 5.0).axes
    logits = (5.0 * on_circle(*angles) @ text.T).requires_grad_()
    target = torch.arange(3)
    ((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2).backward()
    np.testing.assert_allclose(matrix.images[0].get_array(), logits.grad, atol=1e-6)

    def loss(turned: int, degrees: float) -> float:
        turns = [angle + degrees * (i == turned) for i, angle in enumerate(angles)]
        return losses.info_nce(on_circle(*turns), text, 5.0).item()

    slopes = np.array([(loss(i, 0.1) - loss(i, -0.1)) / np.deg2rad(0.2) for i in range(3)])
    tangents = np.array([(-np.sin(angle), np.cos(angle)) for angle in np.deg2rad(angles)])
    arrows = np.array([(arrow.U[0], arrow.V[0]) for arrow in circle.collections])
    np.testing.assert_allclose(arrows, -slopes[:, None] * tangents, atol=1e-4)
    assert curve.lines[1].get_ydata()[0] == pytest.approx(loss(0, 0.0))


def test_kernel_chart_shows_the_convolution_of_its_impulse():
    left, right = kernel_chart(list("abcdefg"), 1, (2.0, 0.0, 0.0, -1.0, 0.0)).axes
    weights = np.exp([2.0, 0.0, 0.0, -1.0, 0.0])
    weights /= weights.sum()
    assert [bar.get_height() for bar in left.patches] == pytest.approx(weights)
    expected = np.convolve(np.eye(7)[1], weights[::-1], "same")  # numpy turns a kernel round, a network does not
    assert [bar.get_height() for bar in right.patches[7:]] == pytest.approx(expected, abs=1e-6)


EXPLORERS = {
    "circle": lambda: circle_explorer((0, 40), (35, 55), 5.0),
    "kernel": lambda: kernel_explorer(list("abcde"), (0.0, 1.0, 0.5)),
}


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_control_changes_the_chart(name):
    controls, message, chart = controls_of(EXPLORERS[name]())
    seen = {bytes(chart.value)}
    moves = [(control, 3) for control in controls if not isinstance(control.value, list)]
    for points in (control for control in controls if isinstance(control.value, list)):
        moves += [(points, [*points.value[:i], 200.0, *points.value[i + 1 :]]) for i in range(len(points.value))]
    for control, value in moves:
        control.value = value
        seen.add(bytes(chart.value))
    assert len(seen) == 1 + len(moves)
    assert message.value == ""


def run_of(name: str, seed: int, mean: float, recall: float | None = None) -> dict:
    """A record as the studies make it, with made-up scores; the held-out score is half the mean."""
    experiment = {"title": f"the {name}", "group": "order", "question": "", "against": "old", "student": "kd"}
    metrics = {"mean": mean, "sets": {"held-out": {"value": mean / 2}}, "retrieval": {"r10": recall}}
    if recall is None:
        del metrics["retrieval"]
    details = {"experiment": experiment, "configuration": {"seed": seed}}
    return {"model": {"name": name}, "seed": seed, "details": details, "metrics": metrics}


RUNS = [
    *(run_of("old", seed, 50.0 + seed, 40.0) for seed in range(3)),
    *(run_of("new", seed, 57.0 + seed + (seed == 2), 40.0) for seed in range(3)),
    run_of("late", 7, 50.0, 40.0),
]


def test_pair_chart_shows_seeds_and_their_difference():
    """Top-1 rises by 7, 7 and 8 points; the interval is that of scipy's paired t-test, the two being all there is."""
    fig = pair_chart(RUNS[:6], "new", "old")
    (*above, low, middle, high) = fig.axes
    assert [ax.get_title("left") for ax in above] == ["R@10", "held-out", "mean top-1"]
    assert [list(line.get_xdata()) for line in above[2].lines] == [[57, 50], [58, 51], [60, 52]]
    assert [name.get_text() for name in above[0].get_yticklabels()] == ["the new", "the old"]
    expected = scipy.stats.ttest_rel([57, 58, 60], [50, 51, 52]).confidence_interval()
    spread = high.collections[0].get_segments()[0][:, 0]
    assert list(spread) == pytest.approx(list(expected))
    titles = [ax.get_title("left").split("\n") for ax in (low, middle, high)]
    assert titles[0][1] == "the same run"
    assert titles[2] == [f"+7.3 ({expected.low:+.1f} to {expected.high:+.1f})", "better"]


def test_ablation_explorer_says_where_a_pair_shares_no_seed():
    controls, message, chart = controls_of(ablation_explorer(RUNS, "new", "old"))
    assert [control.value for control in controls] == ["new", "old"]
    first = bytes(chart.value)
    assert first == pair_chart(RUNS, "new", "old")._repr_png_()
    controls[0].value, controls[1].value = "old", "new"
    assert bytes(chart.value) == pair_chart(RUNS, "old", "new")._repr_png_() != first
    controls[1].value = "late"
    assert "no seed has a record" in message.value
    assert bytes(chart.value) == b""


def test_records_without_retrieval_have_a_column_less():
    fig = pair_chart([run_of("new", 0, 51.0), run_of("old", 0, 50.0)], "new", "old")
    assert [ax.get_title("left") for ax in fig.axes[:2]] == ["held-out", "mean top-1"]
    assert fig.axes[3].get_title("left") == "+1.0\nno interval: one seed each"
