"""Tables of results records: what is averaged, and what is not."""

from __future__ import annotations

import pytest

from mclip.results import ResultError, make_result
from mclip.show.tables import bench_table, reached, retrieval_table

MODEL = {"name": "kd", "parameters": 1, "sha256": "0" * 64}


def recall(value: float, dataset: str = "coco", seed: int = 0) -> dict:
    metrics = {"image_to_text": {"r1": {"value": value, "low": value - 1, "high": value + 1}}}
    return make_result("retrieval", dataset, "val", 10, MODEL, metrics, seed=seed)


def test_datasets_are_not_averaged_as_if_they_were_seeds():
    table = retrieval_table([recall(20.0), recall(60.0, "flickr8k")])
    assert {row: cells["kd"]["value"] for row, cells in table.items()} == {
        "coco, image to text, R@1": 20.0,
        "flickr8k, image to text, R@1": 60.0,
    }
    seeds = retrieval_table([recall(20.0), recall(24.0, seed=1)])
    assert seeds["image to text, R@1"]["kd"]["value"] == 22.0


def test_one_seed_twice_is_no_second_run():
    with pytest.raises(ResultError, match="kd on coco has two records"):
        retrieval_table([recall(20.0), recall(20.0)])


def test_a_failed_retrieval_has_no_entry():
    failed = make_result("retrieval", "coco", "val", None, {**MODEL, "name": "base"}, error="out of memory")
    assert set(retrieval_table([failed, recall(20.0)])["image to text, R@1"]) == {"kd"}
    assert retrieval_table([failed]) == {}


def test_an_aim_is_reached_or_not():
    rows = [
        {"what": name, "value": value, "unit": "times", "bar": bar}
        for name, value, bar in (
            ("fast", 20.0, "at least 20"),
            ("slow", 19.9, "at least 20"),
            ("small", 1.3, "at most 1.3"),
            ("large", 1.31, "at most 1.3"),
            ("open", 5.0, ""),
        )
    ]
    lines = bench_table({"part": rows}).splitlines()
    assert [line.split("|")[-2].strip() for line in lines] == ["reached", "---", "yes", "no", "yes", "no", ""]
    with pytest.raises(KeyError):
        reached(1.0, "about 2")
