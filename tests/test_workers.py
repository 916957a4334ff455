"""Processes that execute notebooks, and the one that started them killed."""

import subprocess
import sys
import time

import psutil
from test_course import write_notebook


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
