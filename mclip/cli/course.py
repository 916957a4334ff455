"""The parameters of a notebook: read from its tagged cell, and checked before anything runs.

papermill only logs a parameter that a notebook does not have, and takes any type: one mistyped name, and a
run of many minutes uses the default. So names, types and ranges are checked here first.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import nbformat
import papermill
import psutil
import yaml
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from mclip.config import PRESETS, ConfigError, closest, from_mapping, require
from mclip.files import write_json

PROFILES = ("smoke", "cpu", "gpu")
TYPES: dict[str, type] = {kind.__name__: kind for kind in (bool, int, float, str)}
INPUTS = ("train_data_path", "val_data_path", "auto_kd_config", "photograph")
"""Paths that must exist, unless they are empty."""
OUTPUTS = ("checkpoint_dir", "root_dir", "out_dir", "save_results")
"""Paths that a notebook may create."""
NAMES_OR_PATHS = ("base_checkpoint", "model_checkpoint", "config_path", "teacher_model")
"""Either a path or the name of something that ships with the course."""
STUDENTS = ("kd", "base")
"""Models of the student's kind that ship; the teacher and the plain CLIP have other parts."""
OPTIONS = {"profile": "--profile", "out_dir": "--out"}
"""Parameters that the command line sets by an option of their own."""

Rule = tuple[Callable[[Any], bool], str]
RANGES: dict[str, Rule] = {
    "data_size": (lambda share: 0 < share <= 1, "choose a share of the data in (0, 1]"),
    "max_epochs": (lambda epochs: epochs >= 0, "use 1 or more, or 0 for the number of the profile"),
    "preset": (lambda name: name in PRESETS, f"choose one of {', '.join(PRESETS)}"),
    "profile": (lambda name: name in PROFILES, f"choose one of {', '.join(PROFILES)}"),
    "rounds": (lambda rounds: rounds >= 0, "use 1 or more, or 0 for the number of the profile"),
    "seed": (lambda seed: seed >= 0, "use 0 or more"),
}
RANGES |= {name: (lambda path: not path or Path(path).exists(), "no such file or folder") for name in INPUTS}
RANGES |= {
    name: (
        lambda student: student in ("", *STUDENTS) or Path(student).exists(),
        f"give the folder of a student, or one that ships: {' or '.join(STUDENTS)}",
    )
    for name in ("model_checkpoint", "base_checkpoint")
}


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell, such as ``max_epochs: int = 10  # passes over the pictures``."""

    name: str
    kind: type
    default: Any
    comment: str


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters that ``notebook`` declares, by name; empty where no cell is tagged ``parameters``.

    Raises :class:`ConfigError` for a second tagged cell, and for a line that is not ``name: type = value``.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) > 1:
        raise ConfigError(f"{notebook}: {len(tagged)} cells are tagged 'parameters'; tag one.")
    found = [_read_line(notebook.name, line, source) for source in tagged for line in ast.parse(source).body]
    return {parameter.name: parameter for parameter in found}


def _read_line(notebook: str, line: ast.stmt, source: str) -> Parameter:
    try:
        kind, default = TYPES[line.annotation.id], ast.literal_eval(line.value)
    except (AttributeError, KeyError, ValueError):  # not annotated, another type, or not a plain value
        text, kinds = ast.get_source_segment(source, line), ", ".join(TYPES)
        raise ConfigError(
            f"{notebook}: the parameters cell holds {text!r}, which is not of the form "
            f"'name: type = value  # meaning' with a type of {kinds}."
        ) from None
    rest = source.splitlines()[line.end_lineno - 1].encode()[line.end_col_offset :].decode()
    return Parameter(line.target.id, kind, default, rest.strip().lstrip("#").strip())


def check_value(parameter: Parameter, value: Any) -> Any:
    """``value`` in the declared type and within the range of its name, or :class:`ConfigError`."""
    shape = dataclasses.make_dataclass("parameters", [(parameter.name, parameter.kind)])
    value = getattr(from_mapping(shape, {parameter.name: value}), parameter.name)
    if parameter.name in RANGES:
        within, remedy = RANGES[parameter.name]
        require(within(value), parameter.name, value, remedy)
    return value


def parse_value(parameter: Parameter, text: str) -> Any:
    """The value written as ``text`` on a command line; a relative path is taken from the caller's folder.

    The path becomes absolute, because a notebook runs in its own folder.
    """
    try:
        value = text if parameter.kind is str else yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    value = check_value(parameter, value)
    if parameter.kind is str and value:
        name, exists = parameter.name, Path(value).exists()
        is_path = name in INPUTS + OUTPUTS or (name in NAMES_OR_PATHS and exists)
        return str(Path(value).resolve()) if is_path else value
    return value


def plan(notebooks: list[Path], given: Mapping[str, str], common: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """What each notebook receives: of ``common`` (values) and ``given`` (texts, which win), what it declares.

    Raises :class:`ConfigError` for a name in ``given`` that no notebook declares, and for a value that does
    not fit.
    """
    declared = {notebook: read_parameters(notebook) for notebook in notebooks}
    known = {name for parameters in declared.values() for name in parameters} - set(OPTIONS)
    for name, value in given.items():
        require(name not in OPTIONS, name, value, f"use the option {OPTIONS.get(name)}")
        require(name in known, name, value, f"no notebook has such a parameter; {closest(name, known)}")
    return {
        notebook: {name: value for name, value in common.items() if name in parameters}
        | {name: parse_value(parameters[name], text) for name, text in given.items() if name in parameters}
        for notebook, parameters in declared.items()
    }


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
            notebook,
            copy,
            parameters,
            cwd=notebook.parent,
            progress_bar=False,
            start_timeout=180,
            kernel_manager_class=OwnKernel,
            on_cell_start=on_cell_start,
            coalesce_streams=True,
            **LANGUAGE,
        )
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


NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def course(
    profile: Literal["smoke", "cpu", "gpu"] = "cpu",
    out: str = "runs/course",
    parameters: list[tuple[str, str]] | None = None,
    only: list[str] | None = None,
    jobs: int | None = None,
    prepare: bool = False,
) -> None:
    """Execute the numbered notebooks and leave their copies, results, figures and a summary.

    Raises :class:`ConfigError` before anything runs where a parameter cannot work, OSError where the folder
    cannot be written, and :class:`NotebookError` for the first notebook that fails; later ones are not run.

    Args:
        profile: how much work the notebooks do: smoke takes seconds each, cpu minutes, gpu is full size.
        out: folder for notebooks/, results/, figures/ and summary.json.
        parameters: names and values, given to every notebook that declares the name.
        only: numbers of the notebooks to run, such as 04 08; all by default.
        jobs: notebooks at a time, each with its share of the cores: 2 by default, 1 on a GPU or a single core.
            With 1 they run in the order of their numbers; else those that others wait for come first.
        prepare: write the copies with their parameters, those of the solutions too, and run nothing.
    """
    within, remedy = RANGES["profile"]
    require(within(profile), "profile", profile, remedy)
    require(jobs is None or jobs >= 1, "jobs", jobs, "use 1 or more notebooks at a time")
    notebooks, folder = select(only or [], solutions=prepare), Path(out).resolve()
    common = {"profile": profile, "out_dir": str(folder), "seed": 0}
    planned = plan(notebooks, dict(parameters or []), common)
    for name in ("notebooks", "results", "figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)  # an older one would speak for a run that fails

    if prepare:
        for notebook, values in planned.items():
            copy = folder / "notebooks" / notebook.relative_to(NOTEBOOKS)
            copy.parent.mkdir(exist_ok=True)
            papermill.execute_notebook(notebook, copy, values, prepare_only=True, **LANGUAGE)
        print(f"prepared {len(planned)} notebooks in {folder / 'notebooks'}")
        return
    start = time.perf_counter()
    jobs = jobs or (1 if profile == "gpu" else min(2, os.cpu_count() or 1))
    timings, peak = run_notebooks(planned, folder / "notebooks", jobs)
    summary = summarise(folder, profile, round(time.perf_counter() - start, 1), timings, peak)
    print(f"{len(timings)} notebooks in {summary['seconds']:.0f} s, {peak:,} MB of memory")
    print(f"summary: {folder / 'summary.json'}")


def select(only: list[str], solutions: bool = False) -> list[Path]:
    """The numbered notebooks in order, or those with a number in ``only``; with their solutions if asked."""
    folders = [NOTEBOOKS, NOTEBOOKS / "solutions"] if solutions else [NOTEBOOKS]
    found = [path for folder in folders for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]
    if not found:
        raise ConfigError(f"{NOTEBOOKS} holds no numbered notebooks; run from a clone of the repository.")
    numbers = {path.name[:2] for path in found}
    for number in only:
        require(number.zfill(2) in numbers, "only", number, closest(number, numbers))
    wanted = {number.zfill(2) for number in only} or numbers
    return [path for path in found if path.name[:2] in wanted]


def summarise(folder: Path, profile: str, seconds: float, timings: dict[str, float], peak_mb: int) -> dict[str, Any]:
    """Collect ``folder``/results into ``folder``/summary.json, and return it.

    Parameter counts come from records of the task "parameters", whose metrics are {model: {part: count}};
    scores in percent with their 95 % interval from those of the task "zero_shot". Where two records speak of
    the same, the one whose file name comes last counts. Raises :class:`ConfigError` naming a file that is no
    such record.
    """
    counts: dict[str, dict[str, int]] = {}
    scores: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "results").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["task"] == "parameters":
                for model, parts in record["metrics"].items():
                    counts.setdefault(model, {}).update(parts)
            if record["task"] == "zero_shot" and "error" not in record:
                top1 = record["metrics"]["top1"]
                score = {"top1": top1["value"], "low": top1["low"], "high": top1["high"], "n": record["n"]}
                scores.setdefault(record["dataset"], {})[record["model"]["name"]] = score
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: not a results record ({type(error).__name__}: {error}).") from error
    summary = {
        "schema": 1,
        "profile": profile,
        "seconds": seconds,
        "peak_rss_mb": peak_mb,
        "notebooks": [{"name": name, "seconds": own} for name, own in timings.items()],
        "parameters": counts,
        "zero_shot": scores,
    }
    write_json(folder / "summary.json", summary)
    return summary
