"""The benchmark compares forms that do the same work; how fast they are is for ``make bench`` to say."""

import numpy as np
import pytest
import torch

from mclip.cli import main
from mclip.deploy.cost import random_model
from mclip.results import load_results
from mclip.study import bench


def test_a_ratio_is_of_medians_and_leaves_the_first_call_of_a_turn_out(monkeypatch):
    now, seconds = [0.0], {"slow": [50.0, 3.0, 60.0, 9.0, 50.0, 3.5], "fast": [70.0, 0.5, 1.0, 1.0, 2.0, 2.0]}
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def form(name):
        def work():
            now[0] += seconds[name].pop(0)

        return work

    row = bench.ratio("what", {name: form(name) for name in seconds}, 3)
    assert row["milliseconds"] == {"slow": 3500.0, "fast": 1000.0}
    assert row["value"] == 3.5


def test_the_steps_that_are_compared_run_and_leave_no_gradient():
    rows = [*bench.distillation(batch_size=8, rounds=1), *bench.forms(rounds=1)]
    assert all(row["value"] > 0 and row["unit"] == "times" for row in rows)
    assert bench.pairs_per_second("course", batch_size=8, count=6) > 0
    model, _ = random_model("course")
    seen = []
    loss = lambda: seen.append(model.encode_text(model.tokenizer(["a dog"])).sum()) or seen[0]  # noqa: E731
    with torch.inference_mode():
        bench.backward(model, loss)()
    assert seen[0].requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_part_is_named_in_the_help():
    for name in bench.PARTS:
        assert name in bench.bench.__doc__


def test_the_parts_to_measure_are_named_one_after_the_other(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "FILE", tmp_path / "bench.json")
    parts = {name: lambda name=name: iter([bench.row(name, 2.0)]) for name in ("steps", "forms", "memory")}
    monkeypatch.setattr(bench, "PARTS", parts)
    assert main.main(["bench", "--only", "forms", "steps"]) == 0
    assert [record["dataset"] for record in load_results(tmp_path / "bench.json")] == ["forms", "steps"]
    assert main.main(["bench", "--only", "memory", "--out", str(tmp_path / "other.json")]) == 0
    assert [record["metrics"] for record in load_results(tmp_path / "other.json")] == [{"memory": 2.0}]
    monkeypatch.setitem(bench.PARTS, "steps", lambda: pytest.fail("measured before the names were looked at"))
    assert main.main(["bench", "--only", "steps", "form"]) == 2
    assert "forms" in capsys.readouterr().err
    assert len(load_results(tmp_path / "bench.json")) == 2


def test_a_new_process_does_not_inherit_the_peak_of_its_parent():
    large = np.ones(2**25)  # 256 MB beyond what both have imported
    assert bench.in_new_process(bench.peak_megabytes) < bench.peak_megabytes() - large.nbytes / 2**21
