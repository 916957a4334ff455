"""The command ``course``: execute the notebooks, two at a time, and summarise what they leave."""

import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
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

from mclip.config import ConfigError, closest, get_profile, require
from mclip.files import write_json
from mclip.results import load_results
from mclip.show.parameters import check_parameter
from mclip.sources.caption_sets import captions_of

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
TYPES: dict[str, type] = {kind.__name__: kind for kind in (bool, int, float, str)}
OPTIONS = {"profile": "--profile", "out_dir": "--out"}
"""Parameters that the command line sets by an option of their own."""
AFTER: dict[str, tuple[str, ...]] = {"08": ("04",), "09": ("04", "08")}
"""Notebooks that wait for earlier ones of the same run, whose models they read."""
ADDED = {"injected-parameters", "papermill-error-cell-tag"}
"""Tags of the cells that papermill adds to a copy."""
PYTHON = {"kernel_name": "python3", "language": "python"}  # tells papermill how to write parameters down


class NotebookError(RuntimeError):
    """A notebook failed; the message names it, the cell, the reason and the partial copy."""

    exit_status = 1


def own_kernel(threads: int) -> type[AsyncKernelManager]:
    """Kernels of the interpreter that runs this module, which compute with ``threads`` threads.

    Looking up "python3" by name may find a kernel that the user once installed for another Python, whose packages
    are not ours. The kernel's log would break the progress bar, and errors of cells come back as outputs.
    """
    spec = KernelSpec(resource_dir=RESOURCES, **get_kernel_dict(["--log-level=CRITICAL"]))
    spec.env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    return type("OwnKernel", (AsyncKernelManager,), {"kernel_spec": spec})


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
        profile: how much work the notebooks do: smoke takes seconds each, cpu minutes; gpu trains on photographs, the
            captions of COCO, with OpenAI's ViT-B/32.
        out: folder for notebooks/, results/, figures/ and summary.json.
        parameters: a parameter for every notebook that declares NAME; may be repeated.
        only: numbers of the notebooks to run, such as 04 08; all by default.
        jobs: notebooks at a time, each with its share of the cores: 2 by default, 1 on a GPU or a single core.
        prepare: write the copies with their parameters, those of the solutions too, and run nothing.
    """
    require(jobs is None or jobs >= 1, "jobs", jobs, "use 1 or more notebooks at a time")
    notebooks, folder = select(only or [], solutions=prepare), Path(out).resolve()
    given, common = dict(parameters or []), {"profile": profile, "out_dir": str(folder), "seed": 0}
    plan(notebooks, given, common)  # a parameter that cannot work is said before anything is downloaded
    if get_profile(profile).captions and "train_data_path" not in given:
        trains = any("train_data_path" in declared_parameters(notebook) for notebook in notebooks)
        common |= captions_of(profile) if trains else {}
    planned = plan(notebooks, given, common)
    for name in ("notebooks", "results", "figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)  # an older one would speak for a run that fails

    if prepare:
        for notebook, values in planned.items():
            copy = folder / "notebooks" / notebook.relative_to(NOTEBOOKS)
            copy.parent.mkdir(exist_ok=True)
            papermill.execute_notebook(notebook, copy, values, prepare_only=True, **PYTHON)
        print(f"prepared {len(planned)} notebooks in {folder / 'notebooks'}")
        return
    start = time.perf_counter()
    jobs = jobs or (1 if profile == "gpu" else min(2, os.cpu_count() or 1))
    timings = run_notebooks(planned, folder / "notebooks", jobs)
    seconds = round(time.perf_counter() - start, 1)
    summarise(folder, profile, seconds, timings)
    print(f"{len(timings)} notebooks in {seconds:.0f} s; summary: {folder / 'summary.json'}")


def select(only: list[str], solutions: bool = False) -> list[Path]:
    """The numbered notebooks in order and the appendix ("ap"), or those in ``only``; with their solutions if asked."""
    patterns = ("[0-9][0-9]_*.ipynb", "appendix_*.ipynb", "solutions/[0-9][0-9]_*.ipynb")
    paths = [path for pattern in patterns for path in sorted(NOTEBOOKS.glob(pattern))]
    numbers = {path.name[:2] for path in paths}
    require(bool(paths), "notebooks", str(NOTEBOOKS), "it holds no numbered notebooks; run from a clone")
    for number in only:
        require(number.zfill(2) in numbers, "only", number, closest(number, numbers))
    wanted = {number.zfill(2) for number in only} or numbers
    return [path for path in paths if path.name[:2] in wanted and (solutions or path.parent == NOTEBOOKS)]


def declared_parameters(notebook: Path) -> dict[str, type]:
    """Names and types of the parameters that ``notebook`` declares; ConfigError for one without a type of TYPES."""
    kinds = {}
    for name, each in papermill.inspect_notebook(notebook).items():
        if each["inferred_type_name"] not in TYPES:
            raise ConfigError(f"{notebook.name}: the parameter {name} needs one of the types {', '.join(TYPES)}.")
        kinds[name] = TYPES[each["inferred_type_name"]]
    return kinds


def plan(notebooks: list[Path], given: Mapping[str, str], common: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """What each notebook receives: of ``common`` (values) and ``given`` (texts, which win), what it declares.

    A relative path starts in the working directory. Raises :class:`ConfigError` for a name in ``given`` that no
    notebook declares, and for a value that does not fit.
    """
    declared = {notebook: declared_parameters(notebook) for notebook in notebooks}
    known = {name for kinds in declared.values() for name in kinds} - set(OPTIONS)
    for name, value in given.items():
        require(name not in OPTIONS, name, value, f"use the option {OPTIONS.get(name)}")
        require(name in known, name, value, f"no notebook has such a parameter; {closest(name, known)}")
    planned = {}
    for notebook, kinds in declared.items():
        planned[notebook] = {name: value for name, value in common.items() if name in kinds}
        for name in given.keys() & kinds.keys():
            value = given[name]
            if kinds[name] is not str:
                with suppress(yaml.YAMLError):
                    value = yaml.safe_load(value)
            planned[notebook][name] = check_parameter(name, kinds[name], value, Path.cwd())
    return planned


def run_notebooks(planned: dict[Path, dict[str, Any]], folder: Path, jobs: int) -> dict[str, float]:
    """Execute the notebooks of ``planned`` (path: parameters) in their order, ``jobs`` at a time, with a progress bar.

    A thread waits for each kernel, which gets its share of the processor's cores. The copies go to ``folder``. Returns
    the seconds of each notebook by name. Raises :class:`NotebookError` for the first that fails, and ends the others;
    so does Ctrl-C. Where this process is killed, its kernels notice and end themselves.
    """
    others = psutil.Process().children(recursive=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    runs: dict[Path, Future[float]] = {}

    def run(path: Path) -> float:
        for earlier, work in list(runs.items()):
            if work.done() or earlier.name[:2] in AFTER.get(path.name[:2], ()):
                work.result()  # raises if it failed, and so does this one
        bar.set_postfix_str(f"running {path.stem}")
        return execute(path, folder / path.name, planned[path], threads)

    with tqdm(total=len(planned), unit="notebook") as bar, ThreadPoolExecutor(jobs) as pool:
        try:
            for path in planned:
                runs[path] = pool.submit(run, path)
            for work in as_completed(runs.values()):
                work.result()
                bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(work.done() for work in runs.values()):  # a thread ends when its kernel has gone
                for kernel in set(psutil.Process().children(recursive=True)).difference(others):
                    with suppress(psutil.NoSuchProcess):
                        kernel.kill()
                wait(runs.values(), timeout=0.2)
    return {path.stem: work.result() for path, work in runs.items()}


def execute(notebook: Path, copy: Path, parameters: dict[str, Any], threads: int) -> float:
    """Run ``notebook`` in its own folder, write ``copy`` cell by cell, and return the seconds that it took.

    Raises :class:`NotebookError` naming the cell by its number in ``notebook``, all kinds counted from 1.
    """
    start = time.perf_counter()
    # papermill's option cwd would change the working directory of this process, and so of all its threads.
    resources = {"metadata": {"path": str(notebook.parent)}}
    kernel = {"kernel_manager_class": own_kernel(threads), "start_timeout": 180, "resources": resources, **PYTHON}
    try:
        papermill.execute_notebook(notebook, copy, parameters, progress_bar=False, coalesce_streams=True, **kernel)
        return round(time.perf_counter() - start, 1)
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        reason = "the kernel died (a crash, or the system ended it for want of memory)"
    cells = [cell for cell in nbformat.read(copy, as_version=4).cells if ADDED.isdisjoint(cell.metadata.tags)]
    number, failed = [(n, cell) for n, cell in enumerate(cells, 1) if cell.metadata.papermill.start_time][-1]
    lines = [line.strip() for line in failed.source.splitlines()]
    first = next((line for line in lines if line and not line.startswith("#")), "")
    raise NotebookError(
        f"{notebook.name}, cell {number} ({first}): {' '.join(reason.split()).removesuffix('.')}. "
        f"The copy up to there: {copy}; notebooks that had not ended were stopped."
    )


def summarise(folder: Path, profile: str, seconds: float, timings: dict[str, float]) -> None:
    """Collect the records in ``folder``/results into ``folder``/summary.json.

    Parameter counts are the metrics {model: {part: count}} of records of the task "parameters". Scores in percent
    with their 95 % interval come from the task "zero_shot". Of two records of the same, the one whose file name
    comes last counts. Raises :class:`~mclip.results.ResultError` naming a file that holds no records.
    """
    counts: dict[str, dict[str, int]] = {}
    scores: dict[str, dict[str, Any]] = {}
    for record in load_results(folder / "results"):
        if record["task"] == "parameters":
            for model, parts in record["metrics"].items():
                counts.setdefault(model, {}).update(parts)
        elif record["task"] == "zero_shot" and "error" not in record:
            top1 = record["metrics"]["top1"]
            score = {"top1": top1["value"], "low": top1["low"], "high": top1["high"], "n": record["n"]}
            scores.setdefault(record["dataset"], {})[record["model"]["name"]] = score
    notebooks = [{"name": name, "seconds": own} for name, own in timings.items()]
    summary = {"schema": 1, "profile": profile, "seconds": seconds, "notebooks": notebooks}
    write_json(folder / "summary.json", summary | {"parameters": counts, "zero_shot": scores})
