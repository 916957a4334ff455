"""Tables of results records: what is averaged, and what is not."""

from __future__ import annotations

import pytest

from mclip.results import ResultError, make_result
from mclip.show.tables import markdown, reached, retrieval_table, zero_shot_table
from mclip.study.figures import bench_markdown, replace_block, scores_markdown

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
    with pytest.raises(ResultError, match="kd on coco has records of 'val' and 'own split'"):
        retrieval_table([recall(20.0), recall(24.0, seed=1) | {"split": "own split"}])


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
    lines = bench_markdown([{"details": {"rows": rows}}]).splitlines()
    assert [line.split("|")[-2].strip() for line in lines] == ["reached", "---", "yes", "no", "yes", "no", ""]
    with pytest.raises(KeyError):
        reached(1.0, "about 2")


def test_cells_hold_mean_and_interval_and_a_model_without_a_number_has_none():
    table = retrieval_table([recall(20.0), recall(24.0, seed=1)])
    value = table["image to text, R@1"]["kd"]
    expected = f"| image to text, R@1 | {value['value']:.1f} ({value['low']:.1f}-{value['high']:.1f}) |  |"
    assert scores_markdown(table, ("kd", "absent")).splitlines()[2] == expected
    top1 = {"top1": {"value": 50.0, "low": 49.0, "high": 51.0}}
    record = make_result("zero_shot", "shape", "test", 10, MODEL, top1)
    assert scores_markdown(zero_shot_table([record]), ["kd"]).splitlines()[2] == "| shape | 50.0 (49.0-51.0) |"


def test_a_bar_in_a_cell_ends_no_column():
    assert markdown(("a", "b"), [("x|y", 1)]).splitlines() == ["| a | b |", "|---|---|", r"| x\|y | 1 |"]


def test_a_block_is_replaced_and_nothing_else():
    text = "before\n<!-- a -->\nold\n<!-- end -->\nbetween\n<!-- b -->\n<!-- end -->\nafter\n"
    assert replace_block(text, "a", "new") == text.replace("old", "new")
    assert replace_block(replace_block(text, "b", "x"), "b", "y") == replace_block(text, "b", "y")
    with pytest.raises(ResultError, match="<!-- c -->"):
        replace_block(text, "c", "new")
