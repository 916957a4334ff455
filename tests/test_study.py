"""The table of experiments and its runner: equal samples, finished work, interruption, and what may ship."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import asdict

import numpy as np
import pytest

from mclip.cli.main import main
from mclip.config import PRESETS, ConfigError, get_profile
from mclip.files import DATA
from mclip.recipes import BASE, load_data, load_model
from mclip.results import load_results, make_result, weights_sha256
from mclip.scenes.test_sets import scene_sets
from mclip.scenes.world import SceneConfig, make_scenes
from mclip.steps import TrainError
from mclip.study import measures, run
from mclip.study.table import BY_NAME, STUDENTS, STUDIES, Experiment, choose, plan

ABLATIONS = {row.name: row for row in BY_NAME.values() if row.study == "ablations"}
TERMS = ("feature", "response", "similarity", "icl")
MODEL = {"name": "toy", "parameters": 1, "sha256": "0" * 64}


def test_all_see_equally_many_samples():
    seen = []
    for row in ABLATIONS.values():
        settings = plan(row)
        batches = round(settings["data_size"] * 10_000) // settings["batch_size"]
        seen.append(settings["max_epochs"] * batches * settings["batch_size"])
    assert max(seen) / min(seen) < 1.02


def whole(row):
    """The plan of a row, and for a student alone what its plan leaves out: no weights, and the study's schedule."""
    schedule = {key: value for key, value in STUDIES[row.study].recipe.items() if not key.endswith("_weight")}
    return json.loads(json.dumps(asdict(BASE) | schedule)) | plan(row)


def test_only_what_a_name_says_differs():
    """Terms change weights, order and phases, and nothing else; and so on for each question.

    A student alone and a distilled one are each trained with the rate and the crops that were best for them.
    """
    terms, tuned = (
        {f"{name}_weight" for name in TERMS} | {"order", "phases", "task", "student"},
        {"learning_rate", "views"},
    )
    allowed = {
        "terms": terms,
        "feature": {"aligner", "feature_form", "feature_source"},
        "balancing": {"balancers"},
        "temperature": {"min_temperature", "max_temperature"},
        "rate": {"learning_rate"},
        "crops": {"crop_scale", "views"},
        "noise": {"noise"},
        "data": {"data_size", "max_epochs", "validate_every", "batch_size"},
        "size": {"preset"},
        "teacher": {"teacher_model"},
    }
    for name, row in ABLATIONS.items():
        own, other = whole(row), whole(ABLATIONS[row.against])
        apart = tuned if own["student"] != other["student"] else set()
        assert {key for key in own if own[key] != other[key]} <= allowed[row.group] | apart, name
    assert len({str(plan(row)) for row in ABLATIONS.values()}) == len(ABLATIONS), "a row repeats another one"


def test_a_student_of_another_width_has_its_widths_multiplied_and_all_else_as_it_was():
    for name, factor in {"course-half": 0.5, "course-double": 2.0}.items():
        course, other = asdict(PRESETS["course"]), asdict(STUDENTS[name])
        for half, key in (("image", "width"), ("text", "width"), ("text", "feed_forward")):
            assert other[half].pop(key) == factor * course[half].pop(key)
        assert other | {"name": "course"} == course


def test_the_plan_holds_every_question():
    runs = [whole(row) for row in ABLATIONS.values()]
    for term in TERMS:
        assert {term} in [{name for name in TERMS if each[f"{name}_weight"]} for each in runs], term
    assert {each["feature_source"] for each in runs} == {"embedding", "penultimate"}
    assert {each["feature_form"] for each in runs} >= {"cosine", "mse"}
    assert len({tuple(each["phases"]) for each in runs}) >= 2
    alone = {("fixed",), ("magnitude",), ("gradient_norm",), ("uncertainty",)}
    assert {tuple(each["balancers"]) for each in runs} >= alone
    temperatures = {(each["max_temperature"], each["min_temperature"]) for each in runs}
    assert temperatures >= {(1.0, 1.0), (4.0, 4.0), (4.0, 1.0)}
    assert {each["noise"] for each in runs} == {0.0, 0.3}
    assert {each["data_size"] for each in runs} == {0.1, 1.0}


def test_rows_are_chosen_by_study_name_or_pattern():
    assert {row.study for row in choose(["scenes", "examples"])} == {"scenes", "examples"}
    assert [row.name for row in choose(["ablations/kd", "ablations/base-*-*"])] == [
        "kd",
        "base-noise-30",
        "base-data-10",
    ]
    with pytest.raises(ConfigError, match="did you mean 'ablations'"):
        choose(["ablation"])
    with pytest.raises(ConfigError, match="feature_wait"):
        plan(Experiment("ablations", "x", "x", changes={"feature_wait": 1.0}))


def test_seeds_differ_in_the_seed_alone():
    first, second = plan(ABLATIONS["kd"], 0), plan(ABLATIONS["kd"], 1)
    assert (first.pop("seed"), second.pop("seed")) == (0, 1)
    assert first == second


@pytest.mark.parametrize("study", STUDIES)
def test_the_committed_records_are_finished_work(study, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "work", lambda job: pytest.fail(f"{job.row.full_name}-{job.seed} would be done again"))
    assert main(["study", study, "--out_dir", str(tmp_path)]) == 0


def toy_jobs(folder, count: int = 4) -> list[run.Job]:
    rows = [Experiment("examples", f"toy {number}", "a toy", student="", measure="toy") for number in range(count)]
    return [run.Job(row, 0, {"n": row.name}, folder / "toy.json", folder / row.name) for row in rows]


def toy_record(row: Experiment) -> list[dict]:
    return [make_result("toy", "none", "test", 1, {**MODEL, "name": row.name}, {"one": 1.0})]


def test_finished_work_is_not_repeated_and_what_was_killed_goes_on(tmp_path, monkeypatch):
    done, alive = [], [True]

    def measure(row, settings):
        if row.name == "toy 2" and alive[0]:
            raise KeyboardInterrupt
        done.append(row.name)
        return toy_record(row)

    monkeypatch.setattr(measures, "toy", measure, raising=False)
    jobs = toy_jobs(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.work_off(jobs, tmp_path / "runs")
    assert done == ["toy 0", "toy 1"]
    alive[0] = False
    for _ in range(2):
        run.work_off(jobs, tmp_path / "runs")
        assert done == ["toy 0", "toy 1", "toy 2", "toy 3"]
    other = run.Job(jobs[1].row, 0, {"n": "toy 1", "new": True}, jobs[1].file, jobs[1].folder)
    assert not other.is_finished(), "a record of other settings is not this job's"


@pytest.mark.parametrize("name", ["ablations/kd", "recipes/feature", "photographs/base", "scenes/kd"])
def test_a_training_that_diverges_leaves_its_failure_on_record(name, tmp_path, monkeypatch):
    def diverge(job):
        raise TrainError("step 3: the loss is nan")

    monkeypatch.setattr(run, "train", diverge)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "CHECKPOINTS", tmp_path / "checkpoints")
    row = BY_NAME[name]
    jobs = [run.Job(row, seed, plan(row, seed), tmp_path / "records.json", tmp_path / str(seed)) for seed in range(2)]
    run.work_off(jobs, tmp_path / "runs")
    records = load_results(tmp_path / "records.json")
    assert [(record["model"]["name"], record["seed"]) for record in records] == [(row.name, 0), (row.name, 1)]
    for record in records:
        assert record["error"] == "step 3: the loss is nan"
        assert "metrics" not in record
        assert record["details"]["experiment"]["title"] == row.title
        assert record["details"]["configuration"]["seed"] == record["seed"]
    assert all(job.is_finished() for job in jobs), "a failure is a result, and is not tried again"
    assert not (tmp_path / "checkpoints").exists(), "no model ships that was not trained"


def test_processes_share_what_is_left(tmp_path):
    """A job that another process holds is left to it, and taken up once that process has died."""
    jobs = toy_jobs(tmp_path, 3)
    turns = run._turns(jobs, tmp_path / "runs", run.tqdm(disable=True))
    (tmp_path / "runs").mkdir()
    with run.FileLock(tmp_path / "runs" / ".examples-toy 0.lock"):
        first = [job.row.name for job in itertools.islice(turns, 2)]
    assert first + [job.row.name for job in turns] == ["toy 1", "toy 2", "toy 0"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Records and folder of a study whose settings are not those that ship."""
    folder = tmp_path_factory.mktemp("study")
    names = ["scenes", "ablations/base", "ablations/kd-noise-30", "defects/defect-08", "grounding", "examples/kd"]
    names += ["recipes/turned-icl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr(run, "RESULTS", folder / "ships")
        patch.setattr(run, "CHECKPOINTS", folder / "ships")
        arguments = ["study", *names, "--seeds", "1", "--epochs", "1", "--profile", "smoke"]
        arguments += ["--out_dir", str(folder / "runs")]
        assert main(arguments) == 0
        patch.setattr(run, "work", lambda job: pytest.fail("done again"))
        assert main(arguments) == 0
    return folder


def test_a_trial_writes_nothing_that_ships(smoke):
    assert not (smoke / "ships").exists()
    results = smoke / "runs" / "results"
    assert {path.name for path in results.glob("*.json")} == {
        f"{name}.json" for name in ("scenes", "ablations", "defects", "grounding", "examples", "recipes")
    }


def test_a_recipe_is_chosen_on_other_scenes_than_the_test_sets(smoke):
    (record,) = load_results(smoke / "runs" / "results" / "recipes.json")
    assert (record["task"], record["split"]) == ("recipe", "other scenes, to choose by")
    assert record["metrics"]["retrieval"].keys() == {"r1", "r5", "r10"}
    assert record["details"]["configuration"]["order"] == ["feature", "response", "original"]
    tests, others = (scene_sets(64, 8, seed)["shape"].images for seed in (0, 1))
    assert not (tests == others).all()


def test_shares_of_weight_times_loss_are_percentages_of_each_phase():
    log = [
        {"step": 0, "phase": 1, "terms": {"feature": 0.5}, "weights": {"feature": 1.0}},
        {
            "step": 1,
            "phase": 2,
            "terms": {"feature": 1.0, "response": 2.0},
            "weights": {"feature": 1.5, "response": 0.25},
        },
        {
            "step": 2,
            "phase": 2,
            "terms": {"feature": 3.0, "response": 1.0},
            "weights": {"feature": 1.0, "response": 1.0},
        },
        {"step": 2, "validation": {"r1": 1.0}},
        {"step": 3, "phase": 3, "terms": {"feature": 0.0}, "weights": {"feature": 1.0}},
    ]
    expected = {"1": {"feature": 100.0}, "2": {"feature": 75.0, "response": 25.0}, "3": {"feature": 0.0}}
    assert run.shares_of(log) == expected


def test_the_scenes_of_a_row_are_what_is_trained_on(tmp_path, monkeypatch):
    """The control with clean captions: the same pictures as otherwise, under captions that always name the shape."""
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path))
    changes = BY_NAME["baselines/base-clean"].changes["scenes"]
    usual, clean = (load_data("smoke", 64, progress=False, **more)[0] for more in ({}, {"scenes": changes}))
    expected = make_scenes(SceneConfig(get_profile("smoke").pictures, 64, "train", captions="clean"), progress=False)
    assert (np.asarray(clean.images) == np.asarray(usual.images)).all()
    assert clean.captions == expected.captions != usual.captions


def test_every_recipe_of_the_search_is_another_one():
    rows = [row for row in BY_NAME.values() if row.study == "recipes"]
    assert len(rows) >= 20
    assert len({str(plan(row)) for row in rows}) == len(rows)
    assert all(row.against in STUDIES["recipes"].rows for row in rows if row.against)


def test_a_summed_up_record_holds_the_mean_of_its_sets(smoke):
    records = {r["model"]["name"]: r for r in load_results(smoke / "runs" / "results" / "ablations.json")}
    assert records.keys() == {"base", "kd-noise-30"}
    sets = [top1["value"] for top1 in records["base"]["metrics"]["sets"].values()]
    assert len(sets) == 7
    assert records["base"]["metrics"]["mean"] == pytest.approx(statistics.fmean(sets))
    assert records["kd-noise-30"]["details"]["configuration"]["noise"] == 0.3
    assert records["kd-noise-30"]["details"]["experiment"]["against"] == "kd"
    (defect,) = load_results(smoke / "runs" / "results" / "defects.json")
    assert (defect["task"], defect["details"]["configuration"]["defect"]) == ("defect", 8)


def test_scenes_are_evaluated_set_by_set_and_compared_picture_by_picture(smoke):
    records = load_results(smoke / "runs" / "results" / "scenes.json")
    counted = {name: sum(r["model"]["name"] == name for r in records) for name in ("teacher", "base", "clip", "kd")}
    assert counted == {"teacher": 7, "base": 7, "clip": 7, "kd": 14}
    assert sum(r["task"] == "paired" for r in records) == 7
    assert load_model(smoke / "runs" / "scenes" / "kd-0" / "model")
    assert not list((smoke / "runs" / "ablations").iterdir()), "checkpoints of finished ablations are kept"


def test_only_the_settings_of_records_that_ship_write_beside_them(tmp_path):
    for options in ({}, {"seeds": 1}, {"epochs": 1}, {"profile": "smoke"}, {"anew": True}):
        chosen = {"seeds": None, "epochs": None, "profile": "cpu"} | options
        rows = [BY_NAME[name] for name in ("ablations/kd", "grounding/kd", "examples/kd", "defects/defect-09")]
        found = [job.file.parent for job in run.jobs_of(rows, tmp_path, **chosen)]
        ships = options in ({}, {"seeds": 1})
        assert set(found) == {run.RESULTS if ships else tmp_path / "results"} or options == {"epochs": 1}


def test_the_models_of_seed_0_ship_with_their_logs(smoke, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "CHECKPOINTS", tmp_path / "checkpoints")
    for name in ("base", "clip", "kd"):
        row = BY_NAME[f"scenes/{name}"]
        folder = smoke / "runs" / "scenes" / f"{name}-0"
        job = run.Job(row, 0, {}, tmp_path / "results" / "scenes.json", folder)
        run.save(
            job, [r for r in load_results(smoke / "runs" / "results" / "scenes.json") if r["model"]["name"] == name]
        )
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()} == {"base", "clip", "kd"}
    assert {path.name for path in (tmp_path / "results" / "logs").iterdir()} == {"base.jsonl", "kd.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scenes", "--seeds", "0"], "seeds=0"),
        (["scenes", "--epochs", "0"], "epochs=0"),
        (["scene"], "did you mean 'scenes'"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_trained(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(run, "work", lambda job: pytest.fail("something was trained"))
    assert main(["study", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_names_everything_is_worked_off(monkeypatch, tmp_path):
    given: list[list] = []
    monkeypatch.setattr(run, "work_off", lambda jobs, out: given.append(jobs))
    run.study(out_dir=str(tmp_path))
    assert {job.row.study for job in given[0]} == set(STUDIES)


def test_the_list_names_every_row(capsys):
    assert main(["study", "--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(BY_NAME)
    assert {row.study for row in BY_NAME.values()} == set(STUDIES)


def test_what_was_measured_of_the_student_that_ships_names_its_weights():
    models = [
        record["model"]
        for record in load_results(DATA / "results" / "defects.json")
        if "checks" and not record["details"]["experiment"]["against"]
    ]
    for name in ("grounding", "examples"):
        models += [r["model"] for r in load_results(DATA / "results" / f"{name}.json") if r["model"]["name"] == "kd"]
    assert len(models) == 7
    assert {model["sha256"] for model in models} == {weights_sha256(load_model("kd")[0])}
