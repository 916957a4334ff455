"""The course from end to end: papermill executes the numbered notebooks, and a summary says what came out."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

import papermill

from .config import ConfigError, closest, require
from .execution import LANGUAGE, run_notebooks
from .files import write_json
from .parameters import RANGES, plan

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


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
        "schema": 1, "profile": profile, "seconds": seconds, "peak_rss_mb": peak_mb,
        "notebooks": [{"name": name, "seconds": own} for name, own in timings.items()],
        "parameters": counts, "zero_shot": scores,
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    return summary
