"""What is read from the records of ablations and defects: intervals, verdicts, tables and figures."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict

import numpy as np
import pytest
from defects_on import DEFECTS
from scipy import stats

from mclip.config import DistillConfig, get_profile
from mclip.files import DATA
from mclip.results import ResultError, load_results, make_result
from mclip.show import ablations as ablation_figures
from mclip.show.ablations import difference, effects, means_of, paired_difference, pooled_deviation, recipe_figure
from mclip.sources.zero_shot import EXCERPTS
from mclip.study.table import BY_NAME

MODEL = {"name": "kd", "parameters": 1, "sha256": "0" * 64}


def described(name: str, configuration: dict | None = None) -> dict:
    row = BY_NAME.get(f"defects/{name}") or BY_NAME[f"ablations/{name}"]
    return {"experiment": row.described(), "configuration": {"defect": row.defect} | (configuration or {})}


def record(name: str, seed: int, mean: float, **configuration) -> dict:
    metrics = {"mean": mean, "sets": {"shape": {"value": mean, "low": mean, "high": mean}}}
    details = described(name, {**configuration, "seed": seed})
    model = {**MODEL, "name": name}
    return make_result("ablation", "scenes", "test", 10, model, metrics, seed=seed, details=details)


def failure(name: str, seed: int, error: str = "diverged at step 3 | nan") -> dict:
    model = {**MODEL, "name": name}
    return make_result("ablation", "scenes", "test", None, model, error=error, seed=seed, details=described(name))


def effect(means: dict, name: str) -> dict:
    return difference(means, name, BY_NAME[f"ablations/{name}"].against)


def toy_records(rng: np.random.Generator) -> list[dict]:
    names = ("base", "kd", "feature", "response", "icl", "similarity")
    return [
        record(name, seed, float(30 + 5 * row + rng.normal())) for row, name in enumerate(names) for seed in range(3)
    ]


def test_pooled_intervals_against_an_analysis_of_variance():
    records = toy_records(np.random.default_rng(0))
    means = means_of(records)
    table = np.array([[means[name][seed] for seed in range(3)] for name in means])  # balanced: closed form
    residuals = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    deviation, freedom, unlike = pooled_deviation(means)
    assert freedom == (6 - 1) * (3 - 1)
    assert not unlike
    assert deviation == pytest.approx((2 * (residuals**2).sum() / freedom) ** 0.5)
    found = effect(means, "icl")
    half = stats.t.ppf(0.975, freedom) * deviation / 3**0.5
    assert found["high"] - found["value"] == pytest.approx(half)


def test_pooled_intervals_hold_the_truth_as_often_as_they_say():
    """All differences share the runs of their counterpart, whose luck is in all of them at once."""
    rng, held = np.random.default_rng(0), []
    for _ in range(200):
        seeds = rng.normal(0, 3, 3)
        means = {f"run {number}": dict(enumerate(50 + seeds + rng.normal(0, 2, 3))) for number in range(20)}
        for name in list(means)[1::4]:
            found = difference(means, name, "run 0")
            held.append(found["low"] <= 0 <= found["high"])
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_a_configuration_that_scatters_far_more_is_not_pooled():
    rng = np.random.default_rng(1)
    means = {f"run {number}": dict(enumerate(50 + rng.normal(0, 1, 3))) for number in range(20)}
    deviation, freedom, unlike = pooled_deviation(means)
    assert not unlike
    wild = {**means, "wild": {0: 20.0, 1: 49.0, 2: 80.0}}
    assert pooled_deviation(wild) == (pytest.approx(deviation), freedom, {"wild"})
    assert difference(wild, "run 1", "run 0") == pytest.approx(difference(means, "run 1", "run 0"))
    assert difference(wild, "wild", "run 0") == paired_difference(wild, "wild", "run 0")
    # Six runs of one scatter: one in a thousand tables may lose a row.
    tables = (dict(enumerate(rng.normal(0, 1, (6, 3)))) for _ in range(100))
    lost = [pooled_deviation({str(row): dict(enumerate(own)) for row, own in each.items()})[2] for each in tables]
    assert sum(map(bool, lost)) <= 1


def test_the_paired_interval_is_that_of_a_t_test():
    rng = np.random.default_rng(6)
    means = {f"run {number}": dict(enumerate(rng.normal(50, 2, 3))) for number in range(4)}
    one, other = ([means[name][seed] for seed in range(3)] for name in ("run 1", "run 0"))
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    found = paired_difference(means, "run 1", "run 0")
    assert (found["low"], found["high"]) == pytest.approx(expected)
    assert found["value"] == difference(means, "run 1", "run 0")["value"]
    assert paired_difference({**means, "run 1": {0: 1.0}}, "run 1", "run 0").keys() == {"value", "n", "verdict"}


def test_the_claims_are_those_of_the_committed_records():
    names = ("scenes", "recipes", "photographs")
    records = {name: load_results(DATA / "results" / f"{name}.json") for name in names}
    table = ablation_figures.claims_table(records)
    top1: dict[str, list[list[float]]] = {}
    for r in records["scenes"]:
        if r["task"] == "zero_shot":
            seeds = top1.setdefault(r["model"]["name"], [[], [], []])
            seeds[r["seed"]].append(r["metrics"]["top1"]["value"])
    base, kd, teacher = np.array(top1["base"]), np.array(top1["kd"]), np.array(top1["teacher"][0])
    assert kd.shape == (3, 7)
    low, high = stats.ttest_rel(kd.mean(1), base.mean(1)).confidence_interval(0.95)
    assert f"| kd - base | scenes, mean top-1 | 3 | +{(low + high) / 2:.1f} (+{low:.1f} to +{high:.1f}) |" in table
    shares = 100 * kd[:, :6].mean(1) / teacher[:6].mean()
    assert f"without relation: {shares.mean():.1f} % ({shares.min():.1f} to {shares.max():.1f} over 3 seeds)." in table
    chosen = [r for r in records["photographs"] if r["task"] == "choice"]
    for where, datasets in {"R@5": ["flickr8k"], "mean top-1 of four sets": [*EXCERPTS]}.items():
        scores = {
            name: [
                np.mean([score["value"] for key, score in r["metrics"]["sets"].items() if key in datasets])
                for r in chosen
                if r["model"]["name"] == name
            ]
            for name in ("kd", "kd-feature")
        }
        low, high = stats.ttest_rel(*scores.values()).confidence_interval(0.95)
        row = f"photographs to choose by, {where} | 3 | {(low + high) / 2:+.1f} ({low:+.1f} to {high:+.1f}) |"
        assert f"| three phases - feature alone | {row}" in table


def test_verdicts_follow_the_interval():
    rng = np.random.default_rng(1)
    records = toy_records(rng) + [record("base-jsd", seed, 30.0 - 9 * (seed >= 0)) for seed in range(3)]
    for found in effects(records).values():
        expected = "helps" if found["low"] > 0 else "hurts" if found["high"] < 0 else "undecided"
        assert found["verdict"] == expected
    assert effects(records)["base-jsd"]["verdict"] == "hurts"


def test_failures_and_missing_seeds_are_no_zeros():
    records = toy_records(np.random.default_rng(2))
    failed = failure("kd", 3)
    single = record("fixed", 0, 10.0)
    means = means_of([*records, failed, single])
    assert sorted(means["kd"]) == [0, 1, 2]
    assert effect(means, "fixed")["n"] == 1
    assert (
        effect(means, "fixed")["high"] - effect(means, "fixed")["low"]
        > effect(means, "icl")["high"] - effect(means, "icl")["low"]
    )
    with pytest.raises(ResultError, match="mclip study"):
        effect(means, "uncertainty")
    assert pooled_deviation(means_of([record("base", 0, 1.0), record("kd", 0, 2.0)]))[1] == 0


def test_records_of_different_settings_are_not_pooled():
    means_of([record("kd", seed, 1.0, max_epochs=3) for seed in range(3)])
    with pytest.raises(ResultError, match="kd: its records differ in more than the seed"):
        means_of([record("kd", 0, 1.0, max_epochs=3), record("kd", 1, 9.0, max_epochs=1)])


def test_a_configuration_that_always_failed_has_its_row():
    records = toy_records(np.random.default_rng(3)) + [failure("uncertainty", seed) for seed in range(3)]
    lines = ablation_figures.ablation_table(records, "mean top-1").splitlines()
    row = next(line for line in lines if "| uncertainty |" in line)
    assert row == r"| balancing | uncertainty | 0 | failed: diverged at step 3 \| nan |  |  |"
    left = ablation_figures.ablation_figure(records).axes[0]
    names = [tick.get_text() for tick in left.get_yticklabels()]
    assert [(text.get_text().strip(), text.get_position()[1]) for text in left.texts] == [
        ("failed: diverged at step 3 | nan", names.index("uncertainty"))
    ]
    partly = ablation_figures.ablation_table([*records, record("uncertainty", 3, 50.0)], "mean top-1")
    assert "| uncertainty | 1 | 50.0 |" in partly


def test_recipes_are_judged_by_retrieval_new_pairs_and_all_sets():
    rng, records = np.random.default_rng(5), []
    for name in ("feature", "original-first", "turned"):
        for seed in range(2):
            held_out, mean, r10 = rng.uniform(50, 58, 3)
            about = {"experiment": BY_NAME[f"recipes/{name}"].described(), "configuration": {"seed": seed}}
            sets = {"held-out": {"value": held_out, "low": held_out, "high": held_out}}
            metrics = {"mean": mean, "sets": sets, "retrieval": {"r10": r10}}
            model = {**MODEL, "name": name}
            records.append(make_result("recipe", "scenes", "x", 10, model, metrics, seed=seed, details=about))
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in ablation_figures.ablation_table(records, *ablation_figures.MEASURES).splitlines()
    ]
    assert rows[0][3:6] == ["R@10", "held-out", "mean top-1"]
    metrics = [record["metrics"] for record in records]
    for column, value in enumerate((lambda m: m["retrieval"]["r10"], lambda m: m["sets"]["held-out"]["value"])):
        mine, other = ([value(m) for m in metrics[first : first + 2]] for first in (4, 0))
        assert rows[4][3 + column] == f"{statistics.fmean(mine):.1f}"
        assert rows[4][7 + column].split(" ")[0] == f"{statistics.fmean(mine) - statistics.fmean(other):+.1f}"
    points = [line.get_xydata()[0] for line in recipe_figure(records).axes[0].lines if line.get_marker() != "None"]
    gains = [means_of(records, measure) for measure in ("mean top-1", "R@10")]
    for point, name in zip(points, ("original-first", "turned"), strict=True):
        expected = [np.mean([mean[name][s] - mean["feature"][s] for s in range(2)]) for mean in gains]
        assert point == pytest.approx(expected)


def test_one_seed_gives_points_without_intervals():
    records = [r for r in toy_records(np.random.default_rng(4)) if r["seed"] == 0]
    means = means_of(records)
    points = means["icl"][0] - means["base"][0]
    assert effect(means, "icl") == {"value": points, "n": 1, "verdict": "undecided"}
    assert f"| student alone | {points:+.1f} |" in ablation_figures.ablation_table(records, "mean top-1")
    drawn = ablation_figures.ablation_figure(records).axes[1].containers
    assert points in [container.lines[0].get_xdata()[0] for container in drawn]
    assert not any(container.has_xerr for container in drawn)
    with pytest.raises(ResultError, match="mclip study"):
        ablation_figures.ablation_figure([])


@pytest.fixture(scope="module")
def committed() -> tuple[list[dict], list[dict]]:
    return tuple(load_results(DATA / "results" / f"{name}.json") for name in ("ablations", "defects"))


def test_the_figure_shows_the_committed_records(committed):
    left, right = ablation_figures.ablation_figure(committed[0]).axes
    means = means_of(committed[0])
    diamonds = [line for line in left.get_lines() if line.get_marker() == "D"]
    names = list(means)
    assert [line.get_xdata()[0] for line in diamonds] == [statistics.fmean(means[name].values()) for name in names]
    assert [tick.get_text() for tick in left.get_yticklabels()] == [
        BY_NAME[f"ablations/{name}"].title for name in names
    ]
    drawn = {int(c.lines[0].get_ydata()[0]): c.lines[0].get_xdata()[0] for c in right.containers}
    expected = effects(committed[0])
    assert drawn == {names.index(name): found["value"] for name, found in expected.items()}


def test_every_defect_has_its_line(committed):
    means = means_of(committed[0])
    lines = ablation_figures.defect_table(committed[1], means).splitlines()[2:]
    assert [int(line.split("|")[1]) for line in lines] == list(DEFECTS)
    costs = ablation_figures.defect_costs(committed[1], means)
    for defect, line in zip(DEFECTS.values(), lines, strict=True):
        assert all(f"`{check}`" in line for check in defect.checks)
        assert defect.title in line
        if defect.name in costs:
            assert f"{statistics.fmean(costs[defect.name]):.1f} points" in line


def test_curves_of_the_defects_are_the_logs(committed):
    fig = ablation_figures.defect_curves(committed[1], committed[0])
    own = {
        r["details"]["configuration"]["defect"]: r for r in committed[1] if r["seed"] == 0 and "loss" in r["details"]
    }
    drawn = [ax for ax in fig.axes if ax.get_title(loc="left") or ax.get_title()]
    assert len(drawn) == len(own)
    for ax, number in zip(drawn, sorted(own), strict=True):
        defective = ax.get_lines()[0]
        assert list(defective.get_ydata()) == [loss for _, loss in own[number]["details"]["loss"]]
    for records in ([], [failure("defect-01", 0)]):
        with pytest.raises(ResultError, match="seeds 1"):
            ablation_figures.defect_curves(records, committed[0])


def test_a_healthy_run_that_diverged_takes_only_its_own_panels(committed):
    healthy = [r for r in committed[0] if (r["model"]["name"], r["seed"]) != ("kd", 0)] + [failure("kd", 0)]
    axes = ablation_figures.defect_curves(committed[1], healthy).axes
    shown = [int((ax.get_title() or ax.get_title(loc="left")).split(":")[0]) for ax in axes]
    assert shown == [number for number, defect in DEFECTS.items() if defect.against not in ("", "kd")]


def test_a_defect_costs_what_the_healthy_run_has_more():
    defective = [record("defect-01", seed, 20.0 + seed) for seed in range(2)]
    healthy = {DEFECTS[1].against: {0: 50.0, 1: 45.0}}
    assert ablation_figures.defect_costs(defective, healthy) == {"defect-01": [30.0, 24.0]}


def test_the_ring_is_around_the_recipe_of_the_defaults_and_no_trial():
    training = get_profile("cpu").training()
    settings = {key: getattr(training, key) for key in ("learning_rate", "crop_scale", "views")}
    settings |= json.loads(json.dumps(asdict(DistillConfig())))
    changes = {"feature": {"original_weight": 0.0}, "the default": {}, "warm": {"max_temperature": 2.0}}
    changes |= {"large": {"crop_scale": 1.0}, "a trial": {"trial": "rate-falls"}}
    records = []
    for place, (name, own) in enumerate(changes.items()):
        about = {"title": name, "group": "x", "question": "", "against": "", "student": "kd"}
        details = {"experiment": about, "configuration": settings | own}
        metrics = {"mean": 50.0 + place, "sets": {"shape": 50.0}, "retrieval": {"r10": 60.0 - place}}
        model = {**MODEL, "name": name}
        records.append(make_result("recipe", "scenes", "x", 10, model, metrics, seed=0, details=details))
    rings = recipe_figure(records).axes[0].collections
    assert [ring.get_offsets().tolist() for ring in rings] == [[[1.0, -1.0]]]
