"""Paired comparisons against scipy, closed forms and what luck alone does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from mclip.cli.main import main
from mclip.config import PRESETS
from mclip.evaluate import ZeroShotSet, evaluate_zero_shot
from mclip.files import DATA
from mclip.metrics import answers
from mclip.model import MobileCLIP
from mclip.recipes import compare, correct_of, describe, mcnemar
from mclip.results import ResultError, load_results, make_result, validate_result
from mclip.show.tables import zero_shot_table
from mclip.study.figures import paired_markdown

NAMES = ["red circle", "blue square", "green star"]


def record(name: str, hits: np.ndarray, dataset: str = "shape", truth: list | None = None, **more) -> dict:
    share = 100 * float(np.mean(hits))
    model = {"name": name, "parameters": 1, "sha256": "0" * 64}
    details = {"metric": "top1", **answers(hits, list(range(len(hits))) if truth is None else truth)}
    metrics = {"top1": {"value": share, "low": share, "high": share}}
    return make_result("zero_shot", dataset, "test", len(hits), model, metrics, details=details, **more)


@given(st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_mcnemar_is_the_binomial_test(first_only, second_only):
    expected = binomtest(first_only, first_only + second_only).pvalue if first_only + second_only else 1.0
    assert mcnemar(first_only, second_only) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand_and_for_many_pictures():
    assert mcnemar(0, 5) == 2 / 32
    assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1.0
    large = mcnemar(10_300, 9_700)
    z = (10_300 - 9_700 - 1) / math.sqrt(20_000)  # normal approximation with continuity correction
    assert large == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)
    assert mcnemar(5_000, 0) == 0.0  # below the smallest float


@pytest.mark.parametrize("n", [1, 8, 13, 2000])
def test_answers_come_back_from_a_record(n):
    hits = np.random.default_rng(n).random(n) < 0.4
    one = record("kd", hits)
    assert (correct_of(one) == hits).all()
    assert len(one["details"]["correct"]) <= 4 * math.ceil(n / 24)


def test_the_interval_of_the_difference_is_the_paired_one():
    rng, n = np.random.default_rng(0), 4000
    hard = rng.random(n) < 0.3
    first, second = ~hard & (rng.random(n) < 0.95), ~hard & (rng.random(n) < 0.9)
    found = compare(record("kd", first), record("base", second))
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    metrics = found["metrics"]
    assert (metrics["first_only"], metrics["second_only"]) == (b, c)
    assert metrics["difference"]["value"] == pytest.approx(100 * (first.mean() - second.mean()))
    half = 196 * math.sqrt(b + c - (b - c) ** 2 / n) / n  # of the difference of two paired proportions
    assert metrics["difference"]["high"] - metrics["difference"]["low"] == pytest.approx(2 * half, rel=0.1)
    apart = 196 * math.sqrt((first.var() + second.var()) / n)
    assert half < 0.6 * apart  # what pairing is for
    assert metrics["p_value"] == pytest.approx(binomtest(b, b + c).pvalue)
    validate_result(found)
    assert found["details"]["against"]["name"] == "base"


def test_equal_models_differ_as_often_as_the_p_value_says():
    rng, small = np.random.default_rng(0), 0
    for _ in range(400):
        difficulty = rng.random(300)
        first, second = (rng.random(300) < difficulty for _ in range(2))
        small += mcnemar(int((first & ~second).sum()), int((second & ~first).sum())) <= 0.05
    assert small / 400 <= 0.07  # an exact test keeps below its level


def test_what_cannot_be_compared_is_named():
    hits = np.array([True, False, True])
    kd = record("kd", hits)
    others = {
        "n=3 against 2": record("base", hits[:2]),
        "dataset='shape' against 'colour'": record("base", hits, "colour"),
        "another order": record("base", hits, truth=[2, 1, 0]),
        "templates": record("base", hits, templates=["a {}"]),
        "nothing of single pictures": {**kd, "details": {}},
    }
    for named, other in others.items():
        with pytest.raises(ResultError, match=named):
            compare(kd, other)


def test_tables_keep_to_their_task():
    rng = np.random.default_rng(0)
    records = [record(m, rng.random(50) < 0.5, d) for m in ("base", "kd", "clip") for d in ("shape", "colour")]
    records.append(make_result("zero_shot", "pets", "test", None, records[0]["model"], error="no files"))
    records.append(record("kd", rng.random(50) < 0.5, "pets"))
    found = [compare(records[2 + place], records[place]) for place in range(2)]
    assert zero_shot_table(records + found) == zero_shot_table(records)
    later = [{**found[0], "seed": 1}]
    rows = paired_markdown([*found, *later, *records]).splitlines()
    assert rows[0] == "| kd - base | seed 0 | seed 1 |"
    assert rows[2:] == [
        f"| shape | {describe(found[0])} | {describe(found[0])} |",
        f"| colour | {describe(found[1])} |  |",
    ]


def test_a_line_says_what_was_found():
    hits = np.array([True] * 30 + [False] * 10)
    text = describe(compare(record("kd", hits), record("base", ~hits)))
    assert text.startswith("+50.0 points (+")
    assert text.endswith("p = 0.002, n=40 (30 against 10)")


def test_real_models_are_compared_picture_by_picture():
    images = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    toy = ZeroShotSet("toy", images, torch.arange(40) % 3, NAMES, ["a {}"])
    records = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = MobileCLIP(PRESETS["course"]).eval()
        records.append(evaluate_zero_shot(model, model.tokenizer, toy, f"model-{seed}"))
        assert correct_of(records[-1]).mean() * 100 == pytest.approx(records[-1]["metrics"]["top1"]["value"])
    tops = [r["metrics"]["top1"]["value"] for r in records]
    assert compare(*records)["metrics"]["difference"]["value"] == pytest.approx(tops[0] - tops[1])


def test_the_command_compares_two_models(tmp_path, capsys):
    arguments = ["evaluate", "--model_checkpoint", "kd", "--profile", "smoke", "--save_results", str(tmp_path)]
    assert main([*arguments, "--dataset", "shape", "--compare_with", "base"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["kd", "base", "shape,"]
    [paired] = [r for r in load_results(tmp_path) if r["task"] == "paired"]
    assert printed[2] == f"shape, kd - base: {describe(paired)}"
    assert main([*arguments, "--dataset", "relation", "--compare_with", "kd"]) == 2
    assert "compare_with='kd'" in capsys.readouterr().err


def test_committed_comparisons_are_of_the_models_that_ship():
    scenes = load_results(DATA / "results" / "scenes.json")
    found = [r for r in scenes if r["task"] == "paired" and r["seed"] == 0]
    assert {r["dataset"] for r in found} == set(zero_shot_table(scenes))
    assert {(r["model"]["name"], r["details"]["against"]["name"]) for r in found} == {("kd", "base")}
