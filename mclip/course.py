"""The course from end to end: papermill executes the numbered notebooks, and a summary says what came out."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, Literal

import nbformat
import papermill
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from .config import ConfigError, closest, require
from .files import write_json
from .parameters import RANGES, plan

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
LANGUAGE = {"kernel_name": "python3", "language": "python"}  # tells papermill how to write parameters down


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


def course(
    profile: Literal["smoke", "cpu", "gpu"] = "cpu",
    out: str = "runs/course",
    parameters: list[tuple[str, str]] | None = None,
    only: list[str] | None = None,
    prepare: bool = False,
) -> None:
    """Execute the numbered notebooks in order and leave their copies, results, figures and a summary.

    Raises :class:`ConfigError` before anything runs where a parameter cannot work, OSError where the folder
    cannot be written, and :class:`NotebookError` for the first notebook that fails; later ones are not run.

    Args:
        profile: how much work the notebooks do: smoke takes seconds each, cpu minutes, gpu is full size.
        out: folder for notebooks/, results/, figures/ and summary.json.
        parameters: names and values, given to every notebook that declares the name.
        only: numbers of the notebooks to run, such as 04 08; all by default.
        prepare: write the copies with their parameters, those of the solutions too, and run nothing.
    """
    within, remedy = RANGES["profile"]
    require(within(profile), "profile", profile, remedy)
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
    start, timings = time.perf_counter(), []
    with tqdm(total=len(planned), unit="notebook") as bar:
        for notebook, values in planned.items():
            bar.set_description(notebook.stem)
            began = time.perf_counter()
            execute(notebook, folder / "notebooks" / notebook.name, values, bar)
            timings.append({"name": notebook.stem, "seconds": round(time.perf_counter() - began, 1)})
            bar.update()
        bar.set_postfix_str("")
    summary = summarise(folder, profile, round(time.perf_counter() - start, 1), timings)
    print(f"{len(timings)} notebooks in {summary['seconds']:.0f} s, {summary['peak_rss_mb']:,} MB of memory")
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


def execute(notebook: Path, copy: Path, parameters: dict[str, Any], bar: tqdm) -> None:
    """Run ``notebook`` in its own folder; write ``copy`` cell by cell, and show the cell in ``bar``.

    Raises :class:`NotebookError` naming the cell by its number in ``notebook``, all kinds counted from 1.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    injected = bool(parameters)  # papermill adds one cell, straight after the one tagged "parameters"
    running = 0

    def on_cell_start(cell: nbformat.NotebookNode, cell_index: int) -> None:
        nonlocal running
        running = cell_index
        bar.set_postfix_str(f"cell {cell_index + 1} of {len(cells) + injected}")

    try:
        papermill.execute_notebook(
            notebook, copy, parameters, cwd=notebook.parent, progress_bar=False, start_timeout=180,
            kernel_manager_class=OwnKernel, on_cell_start=on_cell_start, **LANGUAGE)  # fmt: skip
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
        f"{notebook.name}, cell {number} ({first}): {' '.join(reason.split())}. "
        f"The copy up to there: {copy}; the notebooks after it were not run."
    )


def summarise(folder: Path, profile: str, seconds: float, timings: list[dict[str, Any]]) -> dict[str, Any]:
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
        "schema": 1, "profile": profile, "seconds": seconds, "peak_rss_mb": peak_rss_mb(),
        "notebooks": timings, "parameters": counts, "zero_shot": scores,
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    return summary


def peak_rss_mb() -> int:
    """Largest resident memory of any ended child process, which the kernels are, in MB."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 2**10)  # macOS: bytes, Linux: kilobytes
