"""The benchmark runs; how fast things are is for ``make bench`` to say."""

from pathlib import Path

import numpy as np
import pytest

from mclip.cli import main
from mclip.results import load_results
from mclip.study import bench


def test_the_steps_that_are_timed_run():
    assert bench.pairs_per_second("course", batch_size=8, count=6) > 0


def test_every_part_is_named_in_the_help():
    for name in bench.PARTS:
        assert name in bench.bench.__doc__


def test_the_parts_to_measure_are_named_one_after_the_other(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    parts = {name: lambda name=name: iter([bench.row(name, 2.0)]) for name in ("steps", "million", "memory")}
    monkeypatch.setattr(bench, "PARTS", parts)
    assert main.main(["bench", "--only", "million", "steps"]) == 0
    assert [record["dataset"] for record in load_results(tmp_path / "bench.json")] == ["million", "steps"]
    assert main.main(["bench", "--only", "memory", "--out", str(tmp_path / "other.json")]) == 0
    assert [record["metrics"] for record in load_results(tmp_path / "other.json")] == [{"memory": 2.0}]
    monkeypatch.setitem(bench.PARTS, "steps", lambda: pytest.fail("measured before the names were looked at"))
    assert main.main(["bench", "--only", "steps", "milion"]) == 2
    assert "million" in capsys.readouterr().err
    assert len(load_results(tmp_path / "bench.json")) == 2


@pytest.mark.skipif(not Path("/proc").exists(), reason="the peak of a process is known on Linux alone")
def test_a_new_process_does_not_inherit_the_peak_of_its_parent():
    large = np.ones(2**25)  # 256 MB beyond what both have imported
    assert bench.in_new_process(bench.peak_megabytes) < bench.peak_megabytes() - large.nbytes / 2**21
