"""One optimiser step, in one piece and in several, on one process and on two; interruptions within an epoch."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toy_run import CASES, FIXED, SETTINGS, Interrupted, run, settings_of

from mclip.config import ConfigError
from mclip.pairs import BatchSource, Pairs
from mclip.show.figures import read_log
from mclip.steps import statistics_at_rest


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(max(folder.glob("checkpoint-*.pt")), weights_only=True)["parts"]["modules"]


def assert_same_run(one: Path, other: Path) -> None:
    """Logs and weights, aligners and balances included, agree to 1e-5."""
    logs = [[r for r in read_log(folder / "log.jsonl") if "loss" in r] for folder in (one, other)]
    assert len(logs[0]) == len(logs[1]) > 1
    for first, second in zip(*logs, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert first["terms"] == pytest.approx(second["terms"], rel=1e-5)
        assert first["weights"] == pytest.approx(second["weights"], rel=1e-4)
    for name, value in weights(one).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, weights(other)[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_pieces_equal_the_whole_batch(tmp_path, name):
    """Accumulated steps keep all in-batch negatives and all terms: 4 pieces of 9 equal one batch of 36."""
    whole = dataclasses.replace(SETTINGS, batch_size=36, max_epochs=3)
    pieces = dataclasses.replace(SETTINGS, batch_size=9, max_epochs=3, accumulate_grad_batches=4)
    run(tmp_path / "whole", CASES[name], whole)
    run(tmp_path / "pieces", CASES[name], pieces)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


def test_mean_of_pieces_is_another_loss(tmp_path):
    """The check above can fail: averaging the losses of the pieces loses the negatives."""
    small = run(tmp_path / "small", CASES["info_nce"]).log[0]["loss"]
    large = run(tmp_path / "large", CASES["info_nce"], dataclasses.replace(SETTINGS, batch_size=36)).log[0]["loss"]
    assert large - small > 0.5


def torchrun(folder: Path, *cases: str) -> None:
    """toy_run.py on two processes with gloo."""
    script = Path(__file__).with_name("toy_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([*command, str(folder), *cases], capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Every case, run by torchrun on two processes with gloo; "resumed" and "apart" were begun, and stopped, on one."""
    folder = tmp_path_factory.mktemp("two")
    for begun in (folder / "resumed", folder / "apart" / "0"):
        with pytest.raises(KeyboardInterrupt):
            run(begun, CASES["resumed"], student=Interrupted)
    torchrun(folder, *CASES, "clocks", "apart")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(tmp_path, two_processes, name):
    """Batches of 9 pairs: one process has 5 of them, the other 4."""
    run(tmp_path / name, CASES[name], settings_of(name))
    assert_same_run(tmp_path / name, two_processes / name)


def test_ctrl_c_ends_all_processes_whatever_their_clocks_say(tmp_path, two_processes):
    """If each process asked its own clock, they would wait for each other for ever."""
    folder = two_processes / "clocks"
    assert sorted(path.name for path in folder.glob("stopped-*")) == ["stopped-0", "stopped-1"]
    assert [path.name for path in folder.glob("*.pt")] == ["checkpoint-00000003.pt"]
    run(folder, CASES["balanced"])
    run(tmp_path / "whole", CASES["balanced"])
    assert_same_run(tmp_path / "whole", folder)


def test_machines_that_do_not_share_the_folder_of_a_run_are_refused(two_processes):
    """Otherwise the one without the checkpoint would go on from the beginning, with other weights."""
    for rank in (0, 1):
        message = (two_processes / "apart" / f"refused-{rank}").read_text()
        assert "would go on from the steps [3, 0]; give a folder that all machines share" in message


def test_parts_of_the_processes_make_up_each_batch():
    data = Pairs(np.zeros((20, 3, 4, 4), np.uint8), [[str(i % 9)] for i in range(20)], "k", "n")
    source = BatchSource(data, lambda t: torch.tensor([[int(x), 1] for x in t]), lambda x: x, 7, 0)
    whole = [batch.index.tolist() for batch in source.epoch(3)]
    parts = zip(*(source.epoch(3, process=rank, processes=3) for rank in range(3)), strict=True)
    assert [[i for part in own for i in part.index.tolist()] for own in parts] == whole
    assert [batch.index.tolist() for batch in source.epoch(3, start=1)] == whole[1:]


def test_running_statistics_move_once_for_two_passes():
    norm = nn.BatchNorm1d(3)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with statistics_at_rest(norm):
        first = norm(torch.randn(8, 3))
    assert first.mean().abs() < 1e-5  # normalised by the batch
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm(torch.randn(8, 3))
    assert norm.num_batches_tracked == 1


def test_a_step_of_more_batches_than_an_epoch_has_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="accumulate_grad_batches=5"):
        run(tmp_path, FIXED, dataclasses.replace(SETTINGS, accumulate_grad_batches=5))


@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_ctrl_c_ends_the_step_saves_and_resumes_bit_for_bit(tmp_path, monkeypatch, step):
    run(tmp_path / "whole", CASES["balanced"])
    monkeypatch.setattr(Interrupted, "at", step)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", CASES["balanced"], student=Interrupted)
    assert len([r for r in read_log(tmp_path / "cut" / "log.jsonl") if "loss" in r]) == step + 1
    assert list((tmp_path / "cut").glob(f"checkpoint-{step + 1:08d}.pt"))
    run(tmp_path / "cut", CASES["balanced"])
    for name, value in weights(tmp_path / "whole").items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, weights(tmp_path / "cut")[name]), name
    assert (tmp_path / "cut" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_two_machines_equal_one(tmp_path):
    """Torchrun twice, each time as on a machine of its own, that meet by the usual flags."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("toy_run.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    machines = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                *meet,
                "--node-rank",
                str(rank),
                str(script),
                str(tmp_path / "two"),
                "all_terms",
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for machine in machines:
        assert machine.wait(timeout=300) == 0, machine.stderr.read()[-2000:]
    run(tmp_path / "one", CASES["all_terms"])
    assert_same_run(tmp_path / "one", tmp_path / "two" / "all_terms")


def test_bf16_follows_the_run_in_full_precision(tmp_path):
    logs = []
    for precision in ("32-true", "bf16-mixed"):
        settings = dataclasses.replace(SETTINGS, precision=precision, max_epochs=4)
        logs.append([record["loss"] for record in run(tmp_path / precision, CASES["all_terms"], settings).log])
    assert np.abs(np.array(logs[0]) - logs[1]).max() < 0.03 * max(logs[0])
    assert logs[0] != logs[1]
    assert all(
        v.dtype == torch.float32 for v in weights(tmp_path / "bf16-mixed").values() if isinstance(v, torch.Tensor)
    )
