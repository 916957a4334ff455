"""What the ablations and the defects say: differences with intervals, verdicts, tables and figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mclip.config import closest
from mclip.metrics import student_quantile
from mclip.results import ResultError
from mclip.show.style import PALETTE, NotebookFigure, figure, label, styled
from mclip.study.ablations import ABLATIONS, GROUPS
from mclip.study.defects import DEFECTS

Records = Iterable[Mapping[str, Any]]
Means = dict[str, dict[int, float]]
VERDICTS = {
    "helps": (PALETTE[2], "^"),
    "hurts": (PALETTE[3], "v"),
    "undecided": (PALETTE[7], "o"),
    "identical": ("black", "x"),
}
"""Colour and marker of a difference whose interval lies above 0, below 0, or holds it, and of one that is no run."""


def means_of(records: Records) -> Means:
    """Mean top-1 (%) over the zero-shot sets, by configuration and seed; failures have none.

    ResultError for a configuration that the plan does not have, and for one whose records differ in more than the seed.
    """
    means: Means = {}
    settings: dict[str, Any] = {}
    for record in records:
        name = record["model"]["name"]
        if name not in ABLATIONS:
            raise ResultError(f"model={name!r} is not valid: no such configuration; {closest(name, ABLATIONS)}")
        own = record.get("details", {}).get("configuration", {})
        own = own | {"train": {key: value for key, value in own.get("train", {}).items() if key != "seed"}}
        if settings.setdefault(name, own) != own:
            raise ResultError(f"{name}: its records differ in more than the seed; keep those of one setting.")
        if "error" not in record:
            means.setdefault(name, {})[record["seed"]] = record["metrics"]["mean"]
    return means


def failures_of(records: Records, means: Means) -> dict[str, str]:
    """What befell the configurations that have records but not one mean: ``{name: "failed: ..."}``, on one line."""
    errors = {r["model"]["name"]: " ".join(r["error"].split()) for r in records if "error" in r}
    return {name: f"failed: {error}" for name, error in errors.items() if name not in means}


def differences(means: Means, name: str) -> list[float]:
    """Points by which configuration ``name`` differs from the one it is compared with, seed by seed."""
    own, other = means.get(name, {}), means.get(ABLATIONS[name].against, {})
    return [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]


def pooled_deviation(means: Means) -> tuple[float, int]:
    """Standard deviation of a difference of two runs of one seed, and its degrees of freedom, from all configurations.

    Two or three seeds of one configuration tell little about its scatter; all configurations together tell what is
    typical, if it is alike in all. It is what is left of the scores when each configuration and each seed has a
    level of its own (two-way analysis of variance: Fisher 1925), times sqrt(2) for a difference of two. A
    configuration whose training is its counterpart's, bit for bit, is no run of its own and is left out. ResultError
    where no configuration has two seeds.
    """
    deviation, freedom = _scatter(means)
    if freedom < 1:
        raise ResultError("no configuration has two seeds; run: python -m mclip ablations --seeds 2")
    return deviation, freedom


def _scatter(means: Means) -> tuple[float, int]:
    """:func:`pooled_deviation`, or (nan, 0) where no configuration has two seeds."""
    own = [name for name in means if name == ABLATIONS[name].against or any(differences(means, name))]
    runs = [(name, seed, score) for name in own for seed, score in means[name].items()]
    seeds = sorted({seed for _, seed, _ in runs})
    design = np.array([[name == n for n in own] + [seed == s for s in seeds] for name, seed, _ in runs], dtype=float)
    design = design.reshape(len(runs), len(own) + len(seeds))  # of no runs too
    scores = np.array([score for *_, score in runs])
    levels, _, rank, _ = np.linalg.lstsq(design, scores)
    freedom = len(runs) - int(rank)
    squares = float(((scores - design @ levels) ** 2).sum())
    return math.sqrt(2 * squares / freedom) if freedom else math.nan, freedom


def effect(means: Means, name: str) -> dict[str, Any]:
    """``value`` with its 95 % interval ``low`` to ``high`` in points, number of seeds ``n`` and ``verdict``.

    The interval is Student's with :func:`pooled_deviation`; a training that is its counterpart's, bit for bit, has
    one of no width. Where no configuration has two seeds ``low`` and ``high`` are missing and nothing is decided.
    ResultError where no seed has both records.
    """
    found = differences(means, name)
    if not found:
        raise ResultError(f"{name}: no seed has a record of it and of {ABLATIONS[name].against}; run the ablations.")
    value = statistics.fmean(found)
    if not any(found):
        return {"value": 0.0, "low": 0.0, "high": 0.0, "n": len(found), "verdict": "identical"}
    deviation, freedom = _scatter(means)
    if freedom < 1:
        return {"value": value, "n": len(found), "verdict": "undecided"}
    half = student_quantile(freedom) * deviation / math.sqrt(len(found))
    verdict = "helps" if value > half else "hurts" if value < -half else "undecided"
    return {"value": value, "low": value - half, "high": value + half, "n": len(found), "verdict": verdict}


def effects(means: Means) -> dict[str, dict[str, Any]]:
    """:func:`effect` of every configuration that is compared with another and has records, in the order of the plan."""
    return {
        name: effect(means, name) for name, one in ABLATIONS.items() if one.against != name and differences(means, name)
    }


def ablation_table(records: Records) -> str:
    """A Markdown table: mean over seeds, and the difference to what each configuration is compared with.

    A configuration that failed with every seed says so; with one seed differences have no interval.
    """
    records = list(records)
    means = means_of(records)
    found, failed = effects(means), failures_of(records, means)
    lines = ["| question | configuration | seeds | mean top-1, % | against | points | verdict |", "|" + "---|" * 7]
    for name, one in ABLATIONS.items():
        if name not in means and name not in failed:
            continue
        own = means.get(name, {})
        mean = f"{statistics.fmean(own.values()):.1f}" if own else failed[name].replace("|", r"\|")
        cells = [one.group, one.title, str(len(own)), mean]
        if name in found:
            e = found[name]
            spread = f" ({e['low']:+.1f} to {e['high']:+.1f})" if "low" in e else ""
            cells += [ABLATIONS[one.against].title, f"{e['value']:+.1f}{spread}", e["verdict"]]
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@styled
def ablation_figure(records: Records) -> NotebookFigure:
    """Each configuration's mean top-1, a dot for each seed, and the difference to its counterpart with its interval.

    Failures and single seeds as in :func:`ablation_table`.
    """
    records = list(records)
    means = means_of(records)
    found, failed = effects(means), failures_of(records, means)
    names = [name for name in ABLATIONS if name in means or name in failed]
    if not names:
        raise ResultError("no records; run: python -m mclip ablations")
    fig = figure(8.3, 1.3 + 0.215 * len(names))
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(1, 0.9))
    for row, name in enumerate(names):
        if name in failed:
            left.text(0, row, f" {label(failed[name], 40)}", va="center")
            continue
        values = list(means[name].values())
        left.plot(values, [row] * len(values), "o", color=PALETTE[7], markersize=3)
        left.plot(statistics.fmean(values), row, "D", color="black", markersize=4)
        if name in found:
            e = found[name]
            colour, marker = VERDICTS[e["verdict"]]
            spread = [[e["value"] - e["low"]], [e["high"] - e["value"]]] if "low" in e else None
            right.errorbar(e["value"], row, xerr=spread, fmt=marker, color=colour, markersize=5, capsize=2)
    for name, dash in (("base", ":"), ("kd", "--")):
        if name in means:
            level, title = statistics.fmean(means[name].values()), ABLATIONS[name].title
            left.axvline(level, color="black", linestyle=dash, linewidth=1, label=title)
    borders = [row - 0.5 for row in range(1, len(names)) if _group(names[row]) != _group(names[row - 1])]
    for ax in (left, right):
        ax.grid(False, axis="y")
        for border in borders:
            ax.axhline(border, color=PALETTE[7], linewidth=0.6)
    left.set_yticks(range(len(names)), [ABLATIONS[name].title for name in names])
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set(title="Mean of seven sets, a dot for each seed", xlabel="zero-shot top-1 (%)", xlim=(0, None))
    right.axvline(0, color="black", linewidth=1)
    interval = ", with 95 % interval" if any("low" in e for e in found.values()) else ""
    right.set(title="Against its counterpart", xlabel=f"difference (points){interval}")
    for verdict, (colour, marker) in VERDICTS.items():
        right.plot([], [], marker, color=colour, label=verdict)
    found_by, labelled = left.get_legend_handles_labels(), right.get_legend_handles_labels()
    handles, labels = ([*one, *other] for one, other in zip(found_by, labelled, strict=True))
    fig.legend(handles, labels, loc="outside lower center", ncols=6, columnspacing=1, handletextpad=0.4)
    fig.suptitle("Which parts of the recipe earn their place, at equal samples seen")
    return fig


def _group(name: str) -> str:
    return GROUPS[ABLATIONS[name].group]


def defect_costs(records: Records, healthy: Means) -> dict[int, list[float]]:
    """Points of mean top-1 that each trained defect costs, seed by seed, against the same training without it."""
    costs: dict[int, list[float]] = {}
    for record in records:
        number = record["details"]["configuration"]["defect"]
        other = healthy.get(DEFECTS[number].recipe, {})
        if DEFECTS[number].recipe and "error" not in record and record["seed"] in other:
            costs.setdefault(number, []).append(other[record["seed"]] - record["metrics"]["mean"])
    return costs


def defect_table(records: Records, healthy: Means) -> str:
    """A Markdown table of all defects: what each does, what it costs or changes, and the test that catches it."""
    records = list(records)
    costs = defect_costs(records, healthy)
    measured = {r["details"]["configuration"]["defect"]: r.get("metrics", {}) for r in records}
    lines = ["| | defect | what it costs | the test that fails |", "|---|---|---|---|"]
    for number, defect in DEFECTS.items():
        if number in costs:
            each = ", ".join(f"{value:.1f}" for value in costs[number])
            cost = f"{statistics.fmean(costs[number]):.1f} points (by seed: {each})"
        elif not defect.recipe and number in measured:
            cost = "; ".join(
                f"{what}: {v['healthy']:.3g} → {v['defective']:.3g}" for what, v in measured[number].items()
            )
        else:
            failed = [r["error"] for r in records if r["details"]["configuration"]["defect"] == number and "error" in r]
            cost = f"the training fails: {failed[0]}" if failed else "not measured"
        lines.append(
            f"| {number} | {defect.name}: {defect.what} | {cost} | {', '.join(f'`{c}`' for c in defect.checks)} |"
        )
    return "\n".join(lines)


@styled
def defect_curves(records: Records, healthy: Records) -> NotebookFigure:
    """The training loss of each trained defect (dashed) beside that of the same training without it, seed 0."""
    with_curve = [[r for r in each if r["seed"] == 0 and "loss" in r.get("details", {})] for each in (records, healthy)]
    own = {r["details"]["configuration"]["defect"]: r for r in with_curve[0]}
    other = {r["model"]["name"]: r for r in with_curve[1]}
    pairs = {n: (r, other[DEFECTS[n].recipe]) for n, r in sorted(own.items()) if DEFECTS[n].recipe in other}
    if not pairs:
        raise ResultError(
            "no training of seed 0 has ended both with a defect and without it; run: "
            "python -m mclip ablations --seeds 1, and python -m mclip defects --seeds 1"
        )
    rows = -(-len(pairs) // 3)
    fig = figure(8.3, 0.9 + 1.75 * rows)
    axes = fig.subplots(rows, 3, squeeze=False).ravel()
    for ax in axes[len(pairs) :]:
        ax.remove()
    for ax, (number, curves) in zip(axes, pairs.items(), strict=False):
        looks = (("with the defect", PALETTE[1], "--"), ("without", PALETTE[0], "-"))
        for record, (name, colour, dash) in zip(curves, looks, strict=True):
            ax.plot(*np.array(record["details"]["loss"]).T, dash, color=colour, linewidth=1, label=name)
        ax.set_title(f"{number}: {DEFECTS[number].name}", fontsize=9)
        ax.set(xlabel="step", ylabel="loss")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    fig.suptitle("Would you have seen it in the loss?")
    return fig
