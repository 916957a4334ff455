"""Executing notebooks: papermill runs each in a process of its own, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

AFTER: dict[str, tuple[str, ...]] = {"08": ("04",), "09": ("04", "08")}
"""Notebooks that read what others of the same run have trained; every other one runs at any time."""
LANGUAGE = {"kernel_name": "python3", "language": "python"}  # tells papermill how to write parameters down
STOPPING_SECONDS = 10.0  # for a notebook to end its kernel, before it is killed


class NotebookError(RuntimeError):
    """A notebook failed; the message names it, the cell, the reason and the partial copy."""

    exit_status = 1


class OwnKernel(AsyncKernelManager):
    """A kernel of the interpreter that runs this module.

    Looking up "python3" by name may find a kernel that the user once installed for another Python, whose
    packages are not ours; ipykernel describes the one of ``sys.executable``. The kernel's own log would only
    break the progress bar: errors of the cells come back as outputs.
    """

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict(["--log-level=CRITICAL"]))


@dataclass
class _Run:
    """A notebook in execution; ``inbox`` brings news of it, and ends with its process."""

    notebook: Path
    process: Any
    inbox: Connection
    began: float
    news: str = "starts"


def run_notebooks(planned: dict[Path, dict[str, Any]], folder: Path, jobs: int) -> tuple[dict[str, float], int]:
    """Execute the notebooks of ``planned`` (path: parameters), ``jobs`` at a time, with a progress bar.

    Each gets its share of the processor's cores, and all of them if it starts when no other is left. The copies
    go to ``folder``. Returns the seconds of each by name, and the largest memory that all processes held at
    once, in MB. Raises :class:`NotebookError` for the first that fails, and ends the others.
    """
    waiting, seconds, peak = in_turn(list(planned), jobs), {}, 0
    running: list[_Run] = []
    with tqdm(total=len(planned), unit="notebook") as bar:
        try:
            while waiting or running:
                while len(running) < jobs and (path := _next(waiting, running)):
                    waiting.remove(path)
                    share = jobs if waiting or running else 1
                    running.append(_start(path, folder / path.name, planned[path], share))
                bar.set_postfix_str(", ".join(f"{run.notebook.name[:2]} {run.news}" for run in running))
                ready = wait([run.inbox for run in running], timeout=1.0)
                peak = max(peak, memory_mb())
                for run in [run for run in running if run.inbox in ready]:
                    if not _listen(run):
                        running.remove(run)
                        seconds[run.notebook.stem] = round(time.perf_counter() - run.began, 1)
                        bar.update()
            bar.set_postfix_str("")
        finally:
            _stop(running)
    return dict(sorted(seconds.items())), peak


def in_turn(notebooks: list[Path], jobs: int) -> list[Path]:
    """By number; several at a time, those that others wait for come first, the longest chain before all."""
    numbers = {path.name[:2] for path in notebooks}

    def chain(number: str) -> int:
        return 1 + max((chain(other) for other in numbers if number in AFTER.get(other, ())), default=0)

    return sorted(notebooks, key=lambda path: (-chain(path.name[:2]) if jobs > 1 else 0, path.name))


def _next(waiting: list[Path], running: list[_Run]) -> Path | None:
    unfinished = {path.name[:2] for path in [*waiting, *(run.notebook for run in running)]}
    return next((path for path in waiting if unfinished.isdisjoint(AFTER.get(path.name[:2], ()))), None)


def _start(notebook: Path, copy: Path, parameters: dict[str, Any], share: int) -> _Run:
    # A server forks the workers: they start at once, and hold none of this process's threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    inbox, outbox = context.Pipe(duplex=False)
    threads = max(1, (os.cpu_count() or 1) // share)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    process = context.Process(target=_work, args=(notebook, copy, parameters, environment, outbox))
    process.start()
    outbox.close()  # the worker's is the only one left, so that its end is seen here
    return _Run(notebook, process, inbox, time.perf_counter())


def _work(
    notebook: Path, copy: Path, parameters: dict[str, Any], environment: dict[str, str], outbox: Connection
) -> None:
    """What the process of one notebook does."""
    os.setsid()  # Ctrl-C reaches the caller alone, which then ends every notebook
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    os.environ.update(environment)
    threading.Thread(target=_end_with_caller, daemon=True).start()
    with suppress(KeyboardInterrupt):  # the caller may stop this process while it still reports its failure
        try:
            execute(notebook, copy, parameters, lambda news: outbox.send(("news", news)))
        except (NotebookError, OSError) as error:
            outbox.send(("failed", str(error)))


def _end_with_caller() -> None:
    """Interrupt this process once the caller's has died: started again, it would train beside this one."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGINT)


def _listen(run: _Run) -> bool:
    """Take in one message; False once the process has ended."""
    try:
        kind, text = run.inbox.recv()
    except EOFError:
        run.process.join()
        if run.process.exitcode:
            raise NotebookError(f"{run.notebook.name}: its process ended with {run.process.exitcode}.") from None
        return False
    if kind == "failed":
        raise NotebookError(text)
    run.news = text
    return True


def _stop(running: list[_Run]) -> None:
    for run in running:
        if run.process.is_alive():
            os.kill(run.process.pid, signal.SIGINT)
    for run in running:
        run.process.join(STOPPING_SECONDS)
        run.process.kill()


def memory_mb() -> int:
    """Resident memory of this process and all under it, in MB; pages that several share count several times."""
    total, me = 0, psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return round(total / 2**20)


def execute(notebook: Path, copy: Path, parameters: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Run ``notebook`` in its own folder; write ``copy`` cell by cell, and ``tell`` of each cell.

    Raises :class:`NotebookError` naming the cell by its number in ``notebook``, all kinds counted from 1.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    injected = bool(parameters)  # papermill adds one cell, straight after the one tagged "parameters"
    running = 0

    def on_cell_start(cell: nbformat.NotebookNode, cell_index: int) -> None:
        nonlocal running
        running = cell_index
        tell(f"cell {cell_index + 1} of {len(cells) + injected}")

    try:
        papermill.execute_notebook(
            notebook, copy, parameters, cwd=notebook.parent, progress_bar=False, start_timeout=180,
            kernel_manager_class=OwnKernel, on_cell_start=on_cell_start, coalesce_streams=True, **LANGUAGE)  # fmt: skip
    except PapermillExecutionError as error:
        running, reason = error.cell_index, f"{error.ename}: {error.evalue}"
        raise NotebookError(_failure(notebook, running + 1 - injected, cells, reason, copy)) from None
    except DeadKernelError:
        reason = "the kernel died (a crash, or the system ended it for want of memory)"
        raise NotebookError(_failure(notebook, running + 1 - injected, cells, reason, copy)) from None


def _failure(notebook: Path, number: int, cells: list, reason: str, copy: Path) -> str:
    lines = [line.strip() for line in cells[number - 1].source.splitlines()]
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return (
        f"{notebook.name}, cell {number} ({first}): {' '.join(reason.split()).removesuffix('.')}. "
        f"The copy up to there: {copy}; notebooks that had not ended were stopped."
    )
