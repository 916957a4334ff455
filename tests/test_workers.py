"""Processes that work for another: pictures read for the evaluation, notebooks executed; and one of them killed."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from test_course import write_notebook
from torch import nn
from torch.utils.data import get_worker_info

from mclip.evaluate import embed_images
from mclip.metrics import EvaluationError


class Album:
    """48 pictures; the process of a worker that reads number ``fatal`` is killed by the system."""

    def __init__(self, fatal: int = -1) -> None:
        self.fatal = fatal

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == self.fatal and get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.fromarray(np.full((40, 40, 3), index, np.uint8)), index


class Model(nn.Module):
    """Anything with ``encode_image``; ``kills`` makes it kill this process's workers while it computes."""

    def __init__(self, kills: bool = False) -> None:
        super().__init__()
        self.kills, self.visual = kills, nn.Identity()
        self.visual.image_size = 32

    def encode_image(self, images: torch.Tensor, normalize: bool) -> torch.Tensor:
        if self.kills:
            for worker in torch.multiprocessing.active_children():
                worker.kill()
        return torch.nn.functional.normalize(images.flatten(1)[:, :8] + 3, dim=1) if normalize else images


def test_workers_read_the_same_as_the_process_itself():
    alone, together = (embed_images(Model(), Album(), 8, workers) for workers in (0, 2))
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
    assert torch.equal(alone[1], torch.arange(48))


@pytest.mark.parametrize(("model", "album"), [(Model(), Album(fatal=20)), (Model(kills=True), Album())])
def test_a_killed_worker_is_named_with_the_remedy(model, album):
    """Whether it dies while it reads or while this process computes: an error, no hang, no process left."""
    with pytest.raises(EvaluationError, match=r"DataLoader worker.*read pictures.*workers=0"):
        embed_images(model, album, 8, workers=2)
    assert not torch.multiprocessing.active_children()


def test_other_errors_are_not_renamed():
    class Broken(Model):
        def encode_image(self, images, normalize):
            raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        embed_images(Broken(), Album(), 8, workers=2)


def test_a_killed_course_leaves_no_notebook_that_trains_on(tmp_path):
    """Else a second start would train beside it, in the same folder."""
    started, ended = tmp_path / "started", time.monotonic() + 60
    wait = f"import os, pathlib, time\npathlib.Path({str(started)!r}).write_text(str(os.getpid()))\ntime.sleep(120)"
    write_notebook(tmp_path / "notebooks" / "01_first.ipynb", wait)
    code = (
        "import sys, pathlib, signal; from mclip.cli import course, main\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # as in a background job of a shell
        f"course.NOTEBOOKS = pathlib.Path({str(tmp_path / 'notebooks')!r})\n"
        f"sys.exit(main.main(['course', '--out', {str(tmp_path / 'out')!r}]))"
    )
    course = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (started.exists() and started.read_text()) and time.monotonic() < ended:
        time.sleep(0.1)
    family = [*psutil.Process(course.pid).children(recursive=True), psutil.Process(int(started.read_text()))]
    course.kill()
    course.wait()
    _, left = psutil.wait_procs(family, timeout=20)
    for process in left:
        process.kill()
    assert not left
