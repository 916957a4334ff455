"""The results schema: what is written can be read back, and nothing that misleads can be written."""

from __future__ import annotations

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from scipy import stats
from torch import nn

from mclip import results
from mclip.results import ResultError, load_results, make_result, save_result, validate_result, weights_sha256
from mclip.show import tables

MODEL = {"name": "kd", "parameters": 10, "sha256": "0" * 64}
TOP1 = {"value": 50.0, "low": 40.0, "high": 60.0}


def record(dataset: str = "shape", name: str = "kd", seed: int = 0, value: float = 50.0, **more) -> dict:
    metrics = {"top1": {"value": value, "low": value - 1, "high": value + 1}, "chance": 12.5, **more}
    return make_result("zero_shot", dataset, "test", 100, {**MODEL, "name": name}, metrics, seed=seed)


def test_a_record_says_everything_and_comes_back_unchanged(tmp_path):
    made = make_result(
        "zero_shot",
        "shape",
        "test",
        100,
        MODEL,
        {"top1": TOP1, "chance": 12.5},
        templates=["a photo of a {}"],
        seed=3,
        seconds=1.25,
        details={"data_size": 0.1},
    )
    assert made["schema"] == 1
    assert made["details"] == {"data_size": 0.1}
    assert set(made["versions"]) == {"python", "torch", "torchvision", "open_clip", "mclip"}
    save_result(tmp_path / "deep" / "a.json", made)
    assert load_results(tmp_path / "deep") == [made]
    assert load_results(tmp_path / "deep" / "a.json") == [made]
    assert [p.name for p in (tmp_path / "deep").iterdir() if not p.name.startswith(".")] == ["a.json"]


def test_a_record_is_added_or_takes_the_place_of_its_like(tmp_path):
    file, others = tmp_path / "study.json", [record(seed=1), record("colour"), record(name="base")]
    save_result(file, record(value=50.0), *others)
    save_result(file, record(value=60.0))
    found = load_results(file)
    assert [r["metrics"]["top1"]["value"] for r in found] == [60.0, 50.0, 50.0, 50.0]
    assert found[1:] == others
    save_result(file, order=lambda r: r["model"]["name"])
    assert [r["model"]["name"] for r in load_results(file)] == ["base", "kd", "kd", "kd"]
    save_result(file, record() | {"templates": ["a photo of a {}"]})
    assert len(load_results(file)) == 5, "other prompts are another measurement"


def test_a_record_that_stands_alone_in_a_file_is_read_too(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(record(), indent=1))
    assert len(load_results(tmp_path / "a.json")) == 1
    save_result(tmp_path / "a.json", record(seed=1))
    assert [r["seed"] for r in load_results(tmp_path / "a.json")] == [0, 1]


def _save_ten(folder: str, number: int) -> None:
    for seed in range(10):
        save_result(f"{folder}/shared.json", record(name=f"model {number}", seed=seed))


def test_many_may_save_at_once_and_nothing_is_lost(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(partial(_save_ten, str(tmp_path)), range(4)))
    assert len(load_results(tmp_path / "shared.json")) == 40


def test_a_damaged_file_is_not_overwritten(tmp_path):
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(ResultError, match=r"a\.json"):
        save_result(tmp_path / "a.json", record())
    assert (tmp_path / "a.json").read_text() == "["


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": 2}, "schema=2"),
        ({"n": 0}, "n=0"),
        ({"n": None}, "n=None"),
        ({"task": " "}, "task="),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
        ({"seconds": math.nan}, "seconds=nan"),
        ({"templates": "a photo of a {}"}, "templates="),
        ({"model": {**MODEL, "sha256": "abc"}}, "model.sha256='abc'"),
        ({"model": {"name": "kd", "parameters": 10}}, "sha256"),
        ({"metrics": {}}, "metrics={}"),
        ({"metrics": {"top1": 50.0}}, "metrics.top1=50.0"),
        ({"metrics": {"top1": {"value": math.nan, "low": 0.0, "high": 1.0}}}, "metrics.top1.value=nan"),
        ({"metrics": {"top1": {"value": 50.0, "low": 60.0, "high": 70.0}}}, "low <= value <= high"),
        ({"metrics": {"top1": {"value": 50.0}}}, "metrics.top1="),
        ({"metrics": {"top1": {"value": 99.0, "low": 98.0, "high": 101.0}}}, "percentage"),
        ({"metrics": {"top1": TOP1, "top5": None}}, "metrics.top5=None"),
        ({"details": 1}, "details=1"),
        ({"top1": 50.0}, "top1=50.0"),
        ({"sead": 1}, "did you mean 'seed'"),
    ],
)
def test_what_breaks_the_schema_is_named(change, named):
    broken = {**record(), **change}
    with pytest.raises(ResultError) as raised:
        validate_result(broken)
    assert named in str(raised.value)


def test_a_missing_field_is_named():
    for key in record():
        broken = record()
        del broken[key]
        with pytest.raises(ResultError, match=key):
            validate_result(broken)


def test_other_tasks_nest_plain_numbers():
    metrics = {"latency_ms": {"median": 107.0, "p95": 120.0}, "flops": 4e9, "r1": TOP1}
    validate_result(make_result("efficiency", "none", "test", 1, MODEL, metrics))


def defective_failure(reason: str) -> dict:
    """Defect 10: a failure or a time-out goes into the results as 0.0 %."""
    failed = make_result("zero_shot", "pets", "test", None, MODEL, error=reason)
    return failed | {"metrics": {"top1": {"value": 0.0, "low": 0.0, "high": 0.0}}}


def test_defect_10_a_failure_is_never_a_zero(tmp_path):
    with pytest.raises(ResultError, match='either "metrics" or "error"'):
        save_result(tmp_path / "a.json", defective_failure("download timed out"))
    silent = defective_failure("download timed out")
    del silent["error"]  # the zero alone, with no sample behind it
    with pytest.raises(ResultError, match="n=None"):
        validate_result(silent)
    with pytest.raises(ResultError, match="error"):
        make_result("zero_shot", "pets", "test", None, MODEL, error="")
    failed = make_result("zero_shot", "pets", "test", None, MODEL, error="download timed out")
    save_result(tmp_path / "b.json", failed)
    save_result(tmp_path / "c.json", record("pets", "base", value=7.0))
    loaded = load_results(tmp_path)
    assert "metrics" not in loaded[0]
    table = tables.zero_shot_table(loaded)
    assert set(table["pets"]) == {"base"}  # the failed model has no entry


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ResultError, match="no such file or folder"):
        load_results(tmp_path / "none")
    (tmp_path / "half.json").write_text('{"schema": 1,')
    with pytest.raises(ResultError, match=r"half\.json"):
        load_results(tmp_path)
    (tmp_path / "half.json").write_text(json.dumps({**record(), "n": -1}))
    with pytest.raises(ResultError, match=r"half\.json.*n=-1"):
        load_results(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ResultError, match="cannot be written"):
        save_result(blocked / "a.json", record())


def test_weights_sha256_follows_every_value_and_nothing_else():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    digest = weights_sha256(model)
    assert len(digest) == 64
    assert weights_sha256(copy.deepcopy(model).eval().requires_grad_(False)) == digest
    assert weights_sha256(copy.deepcopy(model).half()) != digest
    for name in model.state_dict():  # also running statistics and the scalar counter
        other = copy.deepcopy(model)
        other.state_dict()[name].add_(1)
        assert weights_sha256(other) != digest, name


def test_commit_is_null_outside_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "PACKAGE", tmp_path / "site-packages" / "mclip")
    assert results.git_commit() is None


def test_table_over_seeds_uses_students_interval():
    table = tables.zero_shot_table([record(seed=s, value=v) for s, v in enumerate((50.0, 53.0, 56.0))])
    entry = table["shape"]["kd"]
    half = stats.t.ppf(0.975, 2) * 3 / math.sqrt(3)  # of standard deviation 3
    assert entry == pytest.approx({"value": 53.0, "low": 53 - half, "high": 53 + half})
    single = tables.zero_shot_table([record(value=50.0)])["shape"]["kd"]
    assert single == {"value": 50.0, "low": 49.0, "high": 51.0}
    with pytest.raises(ResultError, match="two records"):
        tables.zero_shot_table([record(), record()])
