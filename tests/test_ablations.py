"""The plan of the ablations, their interruption, and what is read from their records."""

from __future__ import annotations

import itertools
import statistics
import sys

import numpy as np
import pytest
from scipy import stats

from mclip.cli.main import main
from mclip.config import ConfigError
from mclip.files import DATA
from mclip.results import ResultError, load_results, make_result
from mclip.show import ablations as ablation_figures
from mclip.show.ablations import effect, effects, means_of, pooled_deviation
from mclip.study import ablations, defect_runs, jobs
from mclip.study.ablations import ABLATIONS, TERMS, distinct, plan
from mclip.study.defects import DEFECTS
from mclip.study.jobs import Job, work_off

MODEL = {"name": "kd", "parameters": 1, "sha256": "0" * 64}


def record(name: str, seed: int, mean: float, **details) -> dict:
    metrics = {"mean": mean, "sets": {"shape": {"value": mean, "low": mean, "high": mean}}}
    return make_result("ablation", "scenes", "test", 10, {**MODEL, "name": name}, metrics, seed=seed, details=details)


def test_all_see_equally_many_samples():
    seen = []
    for name in ABLATIONS:
        run = plan(name)
        pictures = round(run.data_size * 10_000)
        seen.append(run.train.max_epochs * (pictures // run.train.batch_size) * run.train.batch_size)
    assert max(seen) / min(seen) < 1.02


def test_only_what_a_name_says_differs():
    """Terms change weights and phases, and nothing else; and so on for each question."""
    allowed = {
        "terms": {"distill"},
        "feature": {"distill"},
        "phases": {"distill"},
        "balancing": {"distill"},
        "temperature": {"distill"},
        "rate": {"train"},
        "crops": {"train"},
        "noise": {"noise"},
        "data": {"data_size", "train"},
    }
    for name, one in ABLATIONS.items():
        own, other = plan(name).as_json(), plan(one.against).as_json()
        assert {key for key in own if own[key] != other[key]} <= allowed[one.group], name


def test_the_plan_holds_every_question():
    runs = {name: plan(name) for name in ABLATIONS}
    kd = [run.distill for run in runs.values()]
    for term in TERMS:
        used = [{name for name in TERMS if getattr(each, f"{name}_weight")} for each in kd]
        alone = {term} in used
        assert alone, term
    assert {d.feature_source for d in kd} == {"embedding", "penultimate"}
    assert {d.feature_form for d in kd} >= {"cosine", "mse"}
    assert len({d.phases for d in kd}) >= 4
    assert {d.balancers for d in kd} >= {("fixed",), ("magnitude",), ("gradient_norm",), ("uncertainty",)}
    assert {(d.max_temperature, d.min_temperature) for d in kd} >= {(1.0, 1.0), (4.0, 4.0), (8.0, 4.0)}
    base_rates = {run.train.learning_rate for name, run in runs.items() if ABLATIONS[name].student == "base"}
    assert len(base_rates) >= 3, "the baseline is tuned too"
    assert {run.noise for run in runs.values()} == {0.0, 0.1, 0.3}
    assert {run.data_size for run in runs.values()} == {0.1, 0.3, 1.0}
    assert len(distinct()) == len(set(distinct())) <= len(ABLATIONS)
    with pytest.raises(ConfigError, match="did you mean 'feature'"):
        plan("featur")


def test_seeds_differ_in_the_seed_alone():
    first, second = plan("kd", 0).as_json(), plan("kd", 1).as_json()
    assert first["train"].pop("seed") == 0
    assert second["train"].pop("seed") == 1
    assert first == second


def test_finished_work_is_not_repeated_and_what_was_killed_goes_on(tmp_path):
    done, alive = [], [True]

    def job(number: int) -> Job:
        settings = {"number": number}

        def work(folder):
            if number == 2 and alive[0]:
                folder.mkdir()
                (folder / "checkpoint").touch()
                raise KeyboardInterrupt
            assert number != 2 or (folder / "checkpoint").exists(), "the checkpoints of the killed run are gone"
            done.append(number)
            return record(f"run {number}", 0, 1.0, configuration=settings)

        return Job(tmp_path / f"{number}.json", settings, work)

    planned = [job(number) for number in range(4)]
    with pytest.raises(KeyboardInterrupt):
        work_off(planned, tmp_path / "runs", "toy")
    assert done == [0, 1]
    alive[0] = False
    work_off(planned, tmp_path / "runs", "toy")
    assert done == [0, 1, 2, 3]
    work_off(planned, tmp_path / "runs", "toy")
    assert done == [0, 1, 2, 3]
    other = Job(tmp_path / "1.json", {"number": 1, "new": True}, planned[1].work)
    assert not other.is_finished(), "a record of other settings is not this job's"
    assert not [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]


def test_the_command_trains_each_configuration_and_keeps_its_record(monkeypatch, tmp_path, tmp_path_factory):
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(ablations, "RESULTS", tmp_path / "ships")
    monkeypatch.setattr(ablations, "distinct", lambda: ["base", "kd-noise-30"])
    arguments = [
        "ablations",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--profile",
        "smoke",
        "--out_dir",
        str(tmp_path / "runs"),
    ]
    assert main(arguments) == 0
    found = {r["model"]["name"]: r for r in load_results(tmp_path / "runs" / "results")}
    assert not (tmp_path / "ships").exists(), "records of other settings took the place of those that ship"
    assert found.keys() == {"base", "kd-noise-30"}
    assert found["kd-noise-30"]["details"]["configuration"] == plan("kd-noise-30", 0, 1, "smoke").as_json()
    sets = [top1["value"] for top1 in found["base"]["metrics"]["sets"].values()]
    assert len(sets) == 7
    assert found["base"]["metrics"]["mean"] == pytest.approx(statistics.fmean(sets))
    monkeypatch.setattr(ablations, "run_ablation", lambda *_: pytest.fail("trained again"))
    assert main(arguments) == 0  # all is there: nothing is trained


@pytest.mark.parametrize("command", [ablations.ablations, defect_runs.defects])
def test_only_records_of_the_settings_that_ship_lie_beside_them(command, monkeypatch, tmp_path):
    module, planned = sys.modules[command.__module__], []
    monkeypatch.setattr(module, "work_off", lambda jobs, *_: planned.append({job.path.parent for job in jobs}))
    for settings in ({}, {"seeds": 1}, {"epochs": 1}, {"profile": "smoke"}):
        command(out_dir=str(tmp_path), **settings)
    assert planned == [{module.RESULTS}] * 2 + [{tmp_path / "results"}] * 2


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
    deviation, freedom = pooled_deviation(means)
    assert freedom == (6 - 1) * (3 - 1)
    assert deviation == pytest.approx((2 * (residuals**2).sum() / freedom) ** 0.5)
    found = effect(means, "icl")
    half = stats.t.ppf(0.975, freedom) * deviation / 3**0.5
    assert found["high"] - found["value"] == pytest.approx(half)


def test_pooled_intervals_hold_the_truth_as_often_as_they_say():
    """All differences share the runs of their counterpart, whose luck is in all of them at once."""
    rng, names = np.random.default_rng(0), list(ABLATIONS)[:20]
    held = []
    for _ in range(200):
        seeds = rng.normal(0, 3, 3)
        means = {name: dict(enumerate(50 + seeds + rng.normal(0, 2, 3))) for name in names}
        held += [found["low"] <= 0 <= found["high"] for found in effects(means).values()]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_verdicts_follow_the_interval():
    rng = np.random.default_rng(1)
    records = toy_records(rng) + [record("base-jsd", seed, 30.0 - 9 * (seed >= 0)) for seed in range(3)]
    for found in effects(means_of(records)).values():
        expected = "helps" if found["low"] > 0 else "hurts" if found["high"] < 0 else "undecided"
        assert found["verdict"] == expected
    assert effects(means_of(records))["base-jsd"]["verdict"] == "hurts"


def test_failures_and_missing_seeds_are_no_zeros():
    records = toy_records(np.random.default_rng(2))
    failed = make_result("ablation", "scenes", "test", None, {**MODEL, "name": "kd"}, error="diverged", seed=3)
    single = record("fixed", 0, 10.0)
    means = means_of([*records, failed, single])
    assert sorted(means["kd"]) == [0, 1, 2]
    assert effect(means, "fixed")["n"] == 1
    assert (
        effect(means, "fixed")["high"] - effect(means, "fixed")["low"]
        > effect(means, "icl")["high"] - effect(means, "icl")["low"]
    )
    with pytest.raises(ResultError, match="run the ablations"):
        effect(means, "magnitude")
    with pytest.raises(ResultError, match="seeds 2"):
        pooled_deviation(means_of([record("base", 0, 1.0), record("kd", 0, 2.0)]))


def failure(name: str, seed: int, error: str = "diverged at step 3 | nan") -> dict:
    return make_result("ablation", "scenes", "test", None, {**MODEL, "name": name}, error=error, seed=seed)


def test_records_of_different_settings_are_not_pooled():
    configuration = plan("kd", 0).as_json()
    short = plan("kd", 1, epochs=1).as_json()
    means_of([record("kd", s, 1.0, configuration=plan("kd", s).as_json()) for s in range(3)])
    with pytest.raises(ResultError, match="kd: its records differ in more than the seed"):
        means_of([record("kd", 0, 1.0, configuration=configuration), record("kd", 1, 9.0, configuration=short)])
    with pytest.raises(ResultError, match=r"'gradient_norm' is not valid.*did you mean 'gradient-norm'"):
        means_of([record("gradient_norm", 0, 1.0)])


def test_a_configuration_that_always_failed_has_its_row():
    records = toy_records(np.random.default_rng(3)) + [failure("magnitude", seed) for seed in range(3)]
    row = next(line for line in ablation_figures.ablation_table(records).splitlines() if "| magnitude |" in line)
    assert row == r"| balancing | magnitude | 0 | failed: diverged at step 3 \| nan |  |  |  |"
    left = ablation_figures.ablation_figure(records).axes[0]
    names = [tick.get_text() for tick in left.get_yticklabels()]
    assert [(text.get_text().strip(), text.get_position()[1]) for text in left.texts] == [
        ("failed: diverged at step 3 | nan", names.index("magnitude"))
    ]
    partly = ablation_figures.ablation_table([*records, record("magnitude", 3, 50.0)])
    assert "| magnitude | 1 | 50.0 |" in partly


def test_one_seed_gives_points_without_intervals():
    records = [r for r in toy_records(np.random.default_rng(4)) if r["seed"] == 0]
    means = means_of(records)
    points = means["icl"][0] - means["base"][0]
    assert effect(means, "icl") == {"value": points, "n": 1, "verdict": "undecided"}
    assert f"| student alone | {points:+.1f} | undecided |" in ablation_figures.ablation_table(records)
    drawn = ablation_figures.ablation_figure(records).axes[1].containers
    assert points in [container.lines[0].get_xdata()[0] for container in drawn]
    assert not any(container.has_xerr for container in drawn)
    with pytest.raises(ResultError, match="mclip ablations"):
        ablation_figures.ablation_figure([])


@pytest.fixture(scope="module")
def committed() -> tuple[list[dict], list[dict]]:
    return load_results(DATA / "results" / "ablations"), load_results(DATA / "results" / "defects")


def test_the_committed_records_are_of_the_plan(committed):
    for one in committed[0]:
        assert one["details"]["configuration"] == plan(one["model"]["name"], one["seed"]).as_json()
    assert {one["model"]["name"] for one in committed[0]} == set(distinct())


def test_the_figure_shows_the_committed_records(committed):
    left, right = ablation_figures.ablation_figure(committed[0]).axes
    means = means_of(committed[0])
    diamonds = [line for line in left.get_lines() if line.get_marker() == "D"]
    names = [name for name in ABLATIONS if name in means]
    assert [line.get_xdata()[0] for line in diamonds] == [statistics.fmean(means[name].values()) for name in names]
    assert [tick.get_text() for tick in left.get_yticklabels()] == [ABLATIONS[name].title for name in names]
    drawn = {int(c.lines[0].get_ydata()[0]): c.lines[0].get_xdata()[0] for c in right.containers}
    expected = effects(means)
    assert drawn == {names.index(name): found["value"] for name, found in expected.items()}


def test_every_defect_has_its_line(committed):
    means = means_of(committed[0])
    lines = ablation_figures.defect_table(committed[1], means).splitlines()[2:]
    assert [int(line.split("|")[1]) for line in lines] == list(DEFECTS)
    costs = ablation_figures.defect_costs(committed[1], means)
    for number, line in zip(DEFECTS, lines, strict=True):
        assert all(f"`{check}`" in line for check in DEFECTS[number].checks)
        if number in costs:
            assert f"{statistics.fmean(costs[number]):.1f} points" in line


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
    for records in ([], [failure("kd", 0)]):
        with pytest.raises(ResultError, match="seeds 1"):
            ablation_figures.defect_curves(records, committed[0])


def test_a_healthy_run_that_diverged_takes_only_its_own_panels(committed):
    healthy = [r for r in committed[0] if (r["model"]["name"], r["seed"]) != ("kd", 0)] + [failure("kd", 0)]
    axes = ablation_figures.defect_curves(committed[1], healthy).axes
    shown = [int((ax.get_title() or ax.get_title(loc="left")).split(":")[0]) for ax in axes]
    assert shown == [number for number, defect in DEFECTS.items() if defect.recipe not in ("", "kd")]


def test_a_defect_costs_what_the_healthy_run_has_more():
    defective = [record("defect 1", seed, 20.0 + seed, configuration={"defect": 1}) for seed in range(2)]
    assert ablation_figures.defect_costs(defective, {DEFECTS[1].recipe: {0: 50.0, 1: 45.0}}) == {1: [30.0, 24.0]}


def test_jobs_share_what_is_left(tmp_path):
    """A job that another process holds is left to it, and taken up once that process has died."""
    planned = [Job(tmp_path / f"{number}.json", {"n": number}, lambda folder: {}) for number in range(3)]
    (tmp_path / "runs").mkdir()
    turns = jobs._turns(planned, tmp_path / "runs", jobs.tqdm(disable=True))
    with jobs.FileLock(tmp_path / "runs" / ".0.lock"):
        first = [job.settings["n"] for job in itertools.islice(turns, 2)]
    assert first + [job.settings["n"] for job in turns] == [1, 2, 0]
