"""Every figure shows the data it was given, and the same data gives the same file."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.image import imread
from matplotlib.text import Text
from PIL import Image

from mclip.files import DATA
from mclip.results import ResultError, make_result
from mclip.show import figures, style
from mclip.show.tables import by_model, zero_shot_table

SETS = {"shape": 12.5, "colour": 10.0, "relation": 50.0}
VALUES = {
    "base": (30.0, 90.0, 49.0),
    "clip": (25.0, 85.5, 50.0),
    "kd": (80.0, 99.0, 51.0),
    "teacher": (93.0, 100.0, 52.0),
}


def record(model: str, dataset: str, value: float, seed: int = 0) -> dict:
    low, high = max(0.0, value - 3), min(100.0, value + 2)
    interval = {"value": value, "low": low, "high": high}
    per_class = {f"class {i}": {**interval, "value": low + (i + len(model)) % 3} for i in range(4)}
    metrics = {"top1": interval, "chance": SETS[dataset], "per_class": per_class}
    described = {"name": model, "parameters": 1, "sha256": "0" * 64}
    return make_result("zero_shot", dataset, "test", 500, described, metrics, seed=seed)


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return [record(m, d, v) for m, values in VALUES.items() for d, v in zip(SETS, values, strict=True)]


def bars(ax) -> dict[str, list[float]]:
    """Lengths of the bars of each legend entry, from top to bottom."""
    groups = [c for c in ax.containers if isinstance(c, BarContainer)]
    return {group.get_label(): [bar.get_width() for bar in group] for group in groups}


def whiskers(ax) -> list[tuple[float, float]]:
    lines = [c.lines[2][0] for c in ax.containers if isinstance(c, ErrorbarContainer)]
    return [tuple(segment[:, 0]) for line in lines for segment in line.get_segments()]


def test_performance_bars_are_the_results_and_the_published_table(records):
    fig = figures.performance_comparison(records)
    ours, published = fig.axes
    assert bars(ours) == {style.LABELS[m]: list(values) for m, values in VALUES.items()}
    expected = [(max(0.0, v - 3), min(100.0, v + 2)) for values in VALUES.values() for v in values]
    np.testing.assert_allclose(whiskers(ours), expected)
    assert [tick.get_text() for tick in ours.get_yticklabels()] == list(SETS)
    assert "not measured here" in published.get_title(loc="left")
    assert "published" in published.get_title(loc="left").lower()
    assert bars(published)[style.LABELS["kd"]] == [36.1, 6.2, 0.8, 2.9, 2.9]
    assert bars(published)[style.LABELS["teacher"]] == [89.8, 64.2, 84.0, 19.5, 87.3]
    assert whiskers(published) == []  # no interval was published
    chance = [segment[0][0] for line in ours.collections[-3:] for segment in line.get_segments()]
    assert chance == list(SETS.values())


def test_performance_over_seeds_is_the_table(records):
    three = [
        record(m, d, v - seed / 2, seed)
        for seed in range(3)
        for m, values in VALUES.items()
        for d, v in zip(SETS, values, strict=True)
    ]
    table = zero_shot_table(three)
    fig = figures.performance_comparison(three)
    for model, label in style.LABELS.items():
        assert bars(fig.axes[0])[label] == [table[dataset][model]["value"] for dataset in SETS]
    expected = [(table[d][m]["low"], table[d][m]["high"]) for m in VALUES for d in SETS]
    np.testing.assert_allclose(whiskers(fig.axes[0]), expected)


def test_a_failure_is_shown_as_missing_not_as_zero(records):
    kept = [r for r in records if (r["model"]["name"], r["dataset"]) != ("clip", "colour")]
    model = {"name": "clip", "parameters": 1, "sha256": "0" * 64}
    failed = make_result("zero_shot", "colour", "test", None, model, error="out of memory")
    ax = figures.performance_comparison([*kept, failed]).axes[0]
    assert bars(ax)[style.LABELS["clip"]] == [25.0, 50.0]
    assert [text.get_text() for text in ax.texts].count("no result") == 1
    only_failures = figures.performance_comparison([failed]).axes[0]
    assert [text.get_text() for text in only_failures.texts] == ["no result"] * 4
    with pytest.raises(ResultError, match="no zero-shot record"):
        figures.performance_comparison([])


def test_a_mean_over_sets_is_of_all_of_them(records):
    means = figures.set_means(by_model(records))
    assert means["kd"] == {0: pytest.approx((80 + 99 + 51) / 3)}
    kept = [r for r in records if (r["model"]["name"], r["dataset"]) != ("kd", "relation")]
    lacking = figures.set_means(by_model(kept))
    assert lacking == {name: own for name, own in means.items() if name != "kd"}


def test_photographs_come_first_and_their_models_have_the_roles_of_the_course(records):
    photographs = []
    for model, top1, recall in (("photo", 35.0, 15.0), ("photo-teacher", 41.0, 32.0)):
        described = {"name": model, "parameters": 1, "sha256": "0" * 64}
        top1, recall = ({"value": value, "low": value - 2, "high": value + 2} for value in (top1, recall))
        metrics = {"image_to_text": {"r5": top1}, "text_to_image": {"r5": recall}}
        photographs.append(make_result("zero_shot", "cifar10", "test", 500, described, {"top1": top1}))
        photographs.append(make_result("retrieval", "flickr8k", "by a hash of the name", 500, described, metrics))
    fig = figures.performance_comparison(records, photographs)
    photos, published, scenes = fig.axes
    assert bars(photos) == {style.LABELS["kd"]: [35.0, 15.0], style.LABELS["teacher"]: [41.0, 32.0]}
    assert [tick.get_text() for tick in photos.get_yticklabels()] == ["cifar10", "flickr8k R@5, own split"]
    assert bars(scenes) == {style.LABELS[m]: list(values) for m, values in VALUES.items()}
    assert "not measured here" in published.get_title(loc="left")
    assert "trunk has learnt Imagenette's classes" in photos.get_title(loc="left")
    fig.draw_without_rendering()
    assert scenes.get_position().height < photos.get_position().height
    assert [text.get_text() for text in scenes.texts if text.get_text()] == []


def test_sets_that_not_everybody_can_have_are_shown_where_all_models_have_them():
    photographs = []
    for model, datasets in (("base", ("cifar10", "cifar100")), ("kd", ("cifar10", "cifar100", "oxford_pets"))):
        described = {"name": model, "parameters": 1, "sha256": "0" * 64}
        for number, dataset in enumerate(datasets):
            top1 = {"value": 10.0 + number, "low": 9.0, "high": 15.0}
            photographs.append(make_result("zero_shot", dataset, "test", 500, described, {"top1": top1}))
    assert list(figures.photograph_scores(photographs)) == ["cifar10", "cifar100"]


def test_published_table_names_its_sources():
    rows = [line.split(",") for line in (DATA / "published.csv").read_text().splitlines()]
    assert rows[0] == ["model", "dataset", "top1", "source"]
    assert len(rows) == 1 + 4 * 5
    for model, _, _, source in rows[1:]:
        assert ("open_clip" if model == "teacher" else "KLmobile") in source


def test_per_class_bars(records):
    ax = figures.per_class_recall(records, "shape", limit=2).axes[0]
    shown = [tick.get_text() for tick in ax.get_yticklabels()]
    assert len(shown) == 2
    for one in records:
        if one["dataset"] == "shape":
            expected = [one["metrics"]["per_class"][name]["value"] for name in shown]
            assert bars(ax)[style.LABELS[one["model"]["name"]]] == expected
    with pytest.raises(ResultError, match="did you mean 'shape'"):
        figures.per_class_recall(records, "shapes")


def training_log() -> list[dict]:
    log: list[dict] = []
    for step in range(60):
        phase = 1 + (step >= 10) + (step >= 40)
        names = ("original", "feature", "response")[:phase]
        terms, weights = dict.fromkeys(names, 4 / (step + 1)), dict.fromkeys(names, 1.0)
        log.append(
            {"step": step, "phase": phase, "lr": 1e-3, "terms": terms, "weights": weights, "temperature": 8 - step / 15}
        )
        if step % 20 == 19:
            log.append({"step": step, "validation": {"r1": float(step), "r5": 2.0 * step}})
    return log


def test_training_curves_are_the_log():
    log = training_log()
    fig = figures.training_curves(log)
    terms, weights, temperature, validation = fig.axes
    for ax, key in ((terms, "terms"), (weights, "weights")):
        for line in ax.get_lines():
            name = line.get_label()
            points = [(r["step"], r[key][name]) for r in log if name in r.get(key, {})]
            np.testing.assert_array_equal(line.get_xydata(), points)
        assert [line.get_label() for line in ax.get_lines()] == ["original", "feature", "response"]
    assert temperature.get_lines()[0].get_ydata()[-1] == pytest.approx(8 - 59 / 15)
    assert validation.get_lines()[0].get_xydata().tolist() == [[19, 19], [39, 39], [59, 59]]
    for ax in fig.axes:
        assert [(patch.get_x(), patch.get_width()) for patch in ax.patches] == [(0, 10), (10, 30), (40, 19)]
    without = [{k: v for k, v in r.items() if k not in ("weights", "temperature")} for r in log]
    assert len(figures.training_curves(without).axes) == 2
    base = [
        {**r, "phase": 1, "terms": {"original": 1.0}, "weights": {"original": 1.0}} if "terms" in r else r for r in log
    ]
    assert [ax.get_ylabel() for ax in figures.training_curves(base).axes] == ["loss (log scale)", "recall at 1 (%)"]


def test_runs_beside_each_other_are_their_logs():
    log = [{"step": step, "terms": {"original": float(step)}} for step in range(8)]
    log += [{"step": 8, "validation": {"r5": 30.0}}]
    loss, recall = figures.compare_runs({"base": log, "new": log[:-1]}).axes
    # A quarter of the steps is averaged: the first mean is that of steps 0 and 1.
    for line in loss.get_lines():
        assert line.get_xydata()[1:].tolist() == [[step, step - 0.5] for step in range(1, 8)]
    assert [line.get_xydata().tolist() for line in recall.get_lines()] == [[[8, 30]]]  # one has no validation yet


def test_lines_of_a_name_look_alike_and_phases_are_shaded():
    panels = {("a", "loss"): {"feature": ([0, 1], [2, 3]), "own": ([0, 1], [4, 5])}, ("b", "T"): {"own": ([0], [1])}}
    fig = style.line_charts(panels, "step", (0, 10, 30), ylim=(0, 9))
    left, right = fig.axes
    feature, own = left.get_lines()
    assert (feature.get_color(), feature.get_linestyle()) == (style.TERMS["feature"]["color"], "--")
    assert (own.get_color(), own.get_linestyle()) == (right.get_lines()[0].get_color(), "-")
    for ax, label in ((left, "loss"), (right, "T")):
        assert [(patch.get_x(), patch.get_width()) for patch in ax.patches] == [(0, 10), (10, 20)]
        assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_ylim()) == ("step", label, (0, 9))
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["feature", "own", "phase 1", "phase 2"]


def test_negative_losses_get_a_linear_axis():
    log = [{"step": s, "phase": 1, "terms": {"original": 1.0 - s}} for s in range(4)]
    assert figures.training_curves(log).axes[0].get_yscale() == "linear"
    assert figures.training_curves(training_log()).axes[0].get_yscale() == "log"


def test_similarity_matrices_share_one_scale():
    matrices = {"base": np.full((3, 3), 0.1), "teacher": np.eye(3)}
    fig = figures.similarity_matrices(matrices, ["a", "b", "c"])
    for ax, matrix in zip(fig.axes, matrices.values(), strict=False):
        np.testing.assert_array_equal(ax.images[0].get_array(), matrix)
        assert ax.images[0].get_clim() == (0, 1)
    assert fig.axes[1].get_title(loc="left") == "teacher:\n3 of 3"


def test_image_grid_and_temperatures():
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    fig = figures.image_grid(images, [f"caption {i}" for i in range(5)], columns=3)
    shown = [ax for ax in fig.axes if ax.images]
    assert len(shown) == 5
    for ax, image in zip(shown, images, strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), image.transpose(1, 2, 0))
    logits = np.array([30.0, 25.0, 10.0])
    fig = figures.temperature_effect(logits, [1, 8], ["a", "b", "c"])
    for ax, temperature in zip(fig.axes, (1, 8), strict=True):
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        np.testing.assert_allclose([bar.get_width() for bar in ax.patches], expected)
    fig = figures.temperature_effect([logits, logits[::-1]], [0, 8], ["a", "b", "c"], images[:2], [0, 1])
    for i, row in enumerate(np.reshape(fig.axes, (2, 3))):
        np.testing.assert_array_equal(row[0].images[0].get_array(), images[i].transpose(1, 2, 0))
        np.testing.assert_allclose([bar.get_width() for bar in row[1].patches[:3]], np.eye(3)[2 * i], atol=1e-9)
        assert row[2].patches[3].get_width() == row[2].patches[i].get_width()  # its own caption, drawn over its bar


def every_figure(records):
    similarity = np.random.default_rng(0).uniform(-1, 1, (9, 9))
    captions = [f"a large striped shape number {i} on a grey background" for i in range(9)]
    yield figures.performance_comparison(records)
    yield figures.per_class_recall(records, "shape")
    yield figures.training_curves(training_log())
    yield figures.compare_runs({"base": training_log(), "kd": training_log()})
    yield figures.similarity_matrices({"base": similarity, "kd": similarity, "teacher": similarity}, captions)
    yield figures.image_grid(np.zeros((7, 3, 8, 8), np.uint8), captions[:7])
    yield figures.temperature_effect(10 * similarity[0], [1, 4, 8], captions)
    probes = {"kd": {1: {"value": 40.0, "low": 35.0, "high": 45.0}, 50: {"value": 80.0, "low": 79.0, "high": 81.0}}}
    yield figures.probe_chart(probes, {"kd": {"value": 88.0}}, "names", 8.3)
    yield figures.pairs_on_their_way(0, np.eye(4), np.eye(4))


def test_pairs_on_their_way_lie_in_the_plane_of_their_goals():
    goals = np.eye(4)[[0, 1, 2, 0]]  # two pictures and their captions
    fig = figures.pairs_on_their_way(7, -goals, goals)
    for line in fig.axes[0].lines:
        start, end = line.get_xydata()
        np.testing.assert_allclose(start, -end, atol=1e-12)
    assert "Step 7: cosine to the goal -1.00 for pictures, -1.00 for captions" in fig.axes[0].get_title(loc="left")
    own = fig.axes[0].lines[0].get_xydata()[1]
    assert np.linalg.norm(own) <= 1 + 1e-12


def test_an_animation_holds_its_frames_and_ends_at_the_last():
    frames = [style.figure(1, 1) for _ in range(3)]
    for height, frame in enumerate(frames):
        frame.subplots().axhline(height)
    moving = Image.open(io.BytesIO(style.animation(frames, milliseconds=50)))
    assert moving.n_frames == 1 + 3  # the first is for viewers that show one picture
    shown = []
    for number in range(4):
        moving.seek(number)
        shown.append(np.asarray(moving.convert("RGB")).astype(int))
    np.testing.assert_array_equal(shown[0], shown[3])
    assert np.abs(shown[1] - shown[2]).max() > 50


def test_probe_chart_shows_each_count_and_the_names():
    rows = {count: {"value": 10.0 + count, "low": 5.0 + count, "high": 12.0 + count} for count in (1, 5, 50)}
    ax = figures.probe_chart({"kd": rows}, {"kd": {"value": 70.0}}, "names", 8.0).axes[0]
    curve, names, chance = (line for line in ax.lines if line.get_marker() not in ("|", "_"))
    assert dict(curve.get_xydata().tolist()) == {1: 11.0, 5: 15.0, 50: 60.0}
    assert (set(names.get_ydata()), set(chance.get_ydata())) == ({70.0}, {8.0})


def test_figures_are_reproducible_readable_and_do_not_overlap(records, tmp_path):
    for i, (fig, again) in enumerate(zip(every_figure(records), every_figure(records), strict=True)):
        first = style.save_figure(fig, tmp_path / f"{i}.png").read_bytes()
        assert first == again._repr_png_()  # what a notebook shows is what the file holds
        assert imread(tmp_path / f"{i}.png").shape[1] == pytest.approx(150 * fig.get_figwidth(), abs=1)
        texts = [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible()]
        assert min(text.get_fontsize() for text in texts) >= 9
        titles = [ax._left_title.get_window_extent() for ax in fig.axes if ax.get_title(loc="left")]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(titles, 2))
        for ax in fig.axes:
            for axis in (ax.xaxis, ax.yaxis):
                shown = [t for t in axis.get_ticklabels() if t.get_text() and t.get_visible()]
                boxes = [text.get_window_extent() for text in shown]
                assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    assert not list(tmp_path.glob(".*"))


def test_models_differ_without_colour():
    assert len(set(style.HATCHES.values())) == len(style.LABELS)
    assert len(set(map(to_rgb, style.COLOURS.values()))) == len(style.LABELS)
    assert len(set(map(str, style.DASHES.values()))) == len(style.DASHES)
