"""Trials: what each replaces does what its row of the table says, and only while it is on."""

import pytest
import torch

from mclip import evaluate, locked_image, train
from mclip.balancing import Balancer, Schedule
from mclip.config import DistillConfig, TrainConfig
from mclip.recipes import load_model
from mclip.study.defects import switched_on
from mclip.study.table import BY_NAME, plan
from mclip.study.trials import TRIALS
from mclip.teacher import load_teacher


def test_every_trial_has_a_row_and_changes_no_setting_but_its_own():
    rows = {row.trial: row for row in BY_NAME.values() if row.trial}
    assert rows.keys() == TRIALS.keys()
    for name, row in rows.items():
        without = plan(BY_NAME[f"{row.study}/{row.against}"])
        assert plan(row) == without | {"trial": name}


@pytest.mark.parametrize(("name", "shares"), [("rate-falls", (1, 0.5, 0.25)), ("rate-rises", (1, 1.5, 2))])
def test_a_phase_has_its_share_of_the_rate(name, shares):
    config = TrainConfig()
    steps = (10, 499, 500, 699, 700, 999)
    before = [train.learning_rate(step, 1000, config) for step in steps]
    with switched_on(TRIALS[name]):
        during = [train.learning_rate(step, 1000, config) for step in steps]
    expected = [rate * shares[number // 2] for number, rate in enumerate(before)]
    assert during == pytest.approx(expected)
    assert [train.learning_rate(step, 1000, config) for step in steps] == before


@pytest.mark.parametrize(("name", "shares"), [("feature-fades", (1, 0.5, 0.25)), ("feature-grows", (1, 2, 4))])
def test_feature_has_its_share_of_the_prior_in_each_phase(name, shares):
    """Against the other terms, which are as heavy as one another where all are equally large."""
    config = DistillConfig(balancers=("fixed",))
    schedule = Schedule(config, 1000)
    with switched_on(TRIALS[name]):
        for step, share in zip((400, 650, 999), shares, strict=True):
            active = schedule.active(step)
            terms = {term: torch.tensor(1.0) for term in active}
            weights = Balancer(config).weights(terms, active, step, ())
            assert sum(weights.values()) == pytest.approx(len(active))
            for term in active.keys() - {"feature"}:
                assert weights["feature"] / weights[term] == pytest.approx(share)


def test_the_teachers_texts_judge_in_the_place_of_the_students():
    model, tokenizer = load_model("kd")
    teacher = load_teacher()
    texts = ["a red star", "a blue ring"]
    own = evaluate.embed_texts(model, tokenizer, texts)
    with switched_on(TRIALS["teacher-texts"]):
        taken = evaluate.embed_texts(model, tokenizer, texts)
    torch.testing.assert_close(taken, evaluate.embed_texts(teacher.model, teacher.tokenize, texts))
    assert not torch.allclose(taken, own, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "known", "means"), [("captions-alone", 0, 0), ("known-alone", 20, 0), ("means-alone", 0, 20)]
)
def test_a_teachers_batch_holds_that_many_rows_of_classes(name, known, means):
    """Where there are any, as many as the teacher that ships has, so that rows compare kinds and not amounts."""
    shipped = locked_image.CLASS_SHARES
    with switched_on(TRIALS[name]):
        assert tuple(8 * share for share in locked_image.CLASS_SHARES) == (known, means)
    assert known + means in (0, 8 * sum(shipped))
    assert shipped == locked_image.CLASS_SHARES
