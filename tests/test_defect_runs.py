"""What the measurements of the defects call healthy is healthy, and their records say so."""

from __future__ import annotations

import pytest

from mclip import train
from mclip.config import TrainConfig
from mclip.files import DATA
from mclip.results import load_results
from mclip.study import measures
from mclip.study.defects import PATCHES

BETTER_WITHOUT = {9: 1, 10: 1, 12: -1, 13: -1, 14: -1}
"""Whether a measurement is larger without the defect (1) or smaller (-1)."""


def test_healthy_is_what_is_measured_without_the_defect():
    settings = TrainConfig(max_epochs=2)
    found = measures.both(PATCHES[8], lambda: {"rate": train.learning_rate(99, 100, settings)})["rate"]
    assert found["healthy"] == train.learning_rate(99, 100, settings) < 1e-4 < found["defective"]


def test_words_are_damaged_by_the_defect():
    found = measures.measure_words(PATCHES[14], "smoke")
    assert found["tokens of “bright”"] == {"healthy": 1.0, "defective": 2.0}
    assert found["words of the vocabulary that are damaged"]["healthy"] == 0.0


def test_a_failed_set_counts_as_zero_with_the_defect_alone(monkeypatch):
    """Six sets of 60 %, one of which failed: five of them have a mean of 60, with a zero it is 50."""
    states: list[bool] = []

    def evaluated(*_, **__):
        from mclip import metrics

        states.append(metrics.first_hit_ranks is PATCHES[10][0][2])
        top1 = {"top1": {"value": 60.0}, "top5": {"value": 80.0 if states[-1] else 90.0}}
        return [{"dataset": f"set {number}", "metrics": top1} for number in range(6)]

    monkeypatch.setattr(measures, "evaluate_all", evaluated)
    monkeypatch.setattr(measures, "shipped", lambda _: None)
    found = measures.measure_ranks(PATCHES[10], "smoke")
    assert found["top-5 of set 0, %"] == {"healthy": 90.0, "defective": 80.0}
    mean = found["mean top-1 where one of six sets failed, %"]
    assert (mean["healthy"], mean["defective"]) == pytest.approx((60.0, 50.0))


@pytest.mark.parametrize("number", measures.MEASURES)
def test_the_committed_measurements_are_no_better_with_the_defect(number):
    records = load_results(DATA / "results" / "defects.json")
    (record,) = [r for r in records if r["details"]["configuration"]["defect"] == number]
    pairs = [(each["healthy"], each["defective"]) for each in record["metrics"].values()]
    differences = [BETTER_WITHOUT[number] * (healthy - defective) for healthy, defective in pairs]
    if number == 12:  # the step at which a killed run goes on is the one number that should be large
        differences[1] *= -1
    assert min(differences) > -0.1
    assert max(differences) > 0


def test_the_two_halves_of_defect_9_are_measured_apart():
    found = measures.measure_preparation(PATCHES[9], "smoke")
    prompts, pictures = found.values()
    assert prompts["healthy"] != prompts["defective"]
    assert pictures["healthy"] > pictures["defective"] + 10
