"""Figures from results files and logs, drawn without a screen and without training anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from mclip.config import closest
from mclip.files import DATA
from mclip.metrics import over_seeds
from mclip.results import ResultError, load_results
from mclip.show.style import (
    LABELS,
    PALETTE,
    PHASES,
    TERMS,
    NotebookFigure,
    Table,
    figure,
    grouped_bars,
    in_order,
    label,
    styled,
)
from mclip.show.tables import by_model, read_published

PUBLISHED = "Published by KLmobile / open_clip,\nnot measured here"
Results = Sequence[Mapping[str, Any]] | str | Path


def _groups(results: Results) -> dict[str, dict[str, list]]:
    folder = isinstance(results, str | Path)
    groups = by_model(load_results(results) if folder else results)
    if not groups:
        where = str(results) if folder else f"{len(results)} records"
        raise ResultError(f"results={where} hold no zero-shot record; evaluate a model first.")
    return groups


@styled
def performance_comparison(results: Results, published: str | Path | None = DATA / "published.csv") -> NotebookFigure:
    """Zero-shot top-1 of base, clip, kd and teacher with 95 % intervals; beside it the published series.

    Records of other models have their bars below, under their own names.

    Args:
        results: records, or the folder that holds them.
        published: table of published figures; None leaves it out.
    """
    groups = _groups(results)
    measured = {
        dataset: {model: over_seeds([r["metrics"]["top1"] for r in group]) for model, group in models.items()}
        for dataset, models in groups.items()
    }
    others = read_published(published) if published else {}
    models = in_order([*LABELS, *(name for row in measured.values() for name in row)])
    rows = max(len(measured), len(others))
    fig = figure(8.3, 1.5 + 0.66 * rows * len(models) / len(LABELS))
    axes = fig.subplots(1, 2 if others else 1, squeeze=False)[0]
    axes[0].set_title("Measured here,\nwith 95 % intervals and chance")
    grouped_bars(axes[0], measured, models)
    for y, row in enumerate(groups.values()):
        for chance in {group[0]["metrics"].get("chance") for group in row.values()} - {None}:
            axes[0].vlines(chance, y - 0.46, y + 0.46, colors="black", linestyles="dotted")
    if others:
        axes[1].set_title(PUBLISHED)
        grouped_bars(axes[1], others, list(LABELS))
    for ax in axes:
        ax.set_xlabel("zero-shot top-1 accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    chance_line = Line2D([], [], color="black", linestyle="dotted")
    fig.legend([*handles, chance_line], [*labels, "chance"], loc="outside lower center", ncols=5)
    fig.suptitle("What distillation adds: solid bars against the same student alone, and against the teacher")
    return fig


@styled
def per_class_recall(results: Results, dataset: str, limit: int = 6) -> NotebookFigure:
    """Recall of each class of ``dataset`` by model; of many, the ``limit`` where models differ most."""
    groups = _groups(results)
    if not groups.get(dataset):
        raise ResultError(f"dataset={dataset!r} has no results; {closest(dataset, groups)}")
    models = groups[dataset]
    classes: Table = {}
    for model, group in models.items():
        if not all("per_class" in record["metrics"] for record in group):
            raise ResultError(f"dataset={dataset!r} has no recall of single classes in the records of {model}.")
        for name in group[0]["metrics"]["per_class"]:
            recall = over_seeds([record["metrics"]["per_class"][name] for record in group])
            classes.setdefault(name, {})[model] = recall
    values = {name: [row["value"] for row in rows.values()] for name, rows in classes.items()}
    chosen = sorted(classes, key=lambda name: min(values[name]) - max(values[name]))[:limit]
    fig = figure(6.3, 1.2 + 0.17 * len(models) * len(chosen))
    ax = fig.subplots()
    grouped_bars(ax, {name: classes[name] for name in chosen}, in_order(models))
    ax.set(
        title=f"{dataset}: the {len(chosen)} of {len(classes)} classes where the models differ most",
        xlabel="recall of the class (%), with 95 % interval",
    )
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


Points = list[tuple[int, float]]


def _series(steps: Sequence[Mapping[str, Any]], key: str) -> dict[str, Points]:
    """The points (step, value) of every name under ``key``, from the step where it begins."""
    names = dict.fromkeys(name for record in steps for name in record.get(key) or {})
    return {n: [(r["step"], r[key][n]) for r in steps if n in (r.get(key) or {})] for n in names}


def _shade_phases(axes: Sequence[Axes], steps: Sequence[Mapping[str, Any]]) -> list[Patch]:
    """Colour the background by phase; returns patches for the legend."""
    starts = [r for i, r in enumerate(steps) if i == 0 or r["phase"] != steps[i - 1]["phase"]]
    bounds = [*(r["step"] for r in starts), steps[-1]["step"]]
    for record, (left, right) in zip(starts, pairwise(bounds), strict=True):
        for ax in axes:
            ax.axvspan(left, right, color=PHASES[record["phase"]], alpha=0.2, linewidth=0, zorder=0)
    shown = sorted({r["phase"] for r in starts})
    return [Patch(color=PHASES[p], alpha=0.4, linewidth=0, label=f"phase {p}") for p in shown]


@styled
def training_curves(log: Sequence[Mapping[str, Any]]) -> NotebookFigure:
    """Loss terms, their weights, the temperature and validation recall by step, the phases shaded behind.

    ``log`` holds the records of a training log: ``step``, ``phase``, ``terms`` and, where there are any,
    ``weights`` and ``temperature``; or ``step`` and ``validation``. What a run lacks has no panel; ResultError for
    one without a step.
    """
    steps = [record for record in log if "terms" in record]
    if not steps:
        raise ResultError(f"log={len(log)} records hold no training step; give the log of a run.")
    # Only the response term has a temperature, and one term alone has no weight to balance.
    responds = any("response" in r["terms"] for r in steps)
    warmth = [(r["step"], r["temperature"]) for r in steps if responds and r.get("temperature") is not None]
    weights = _series(steps, "weights")
    recall = [(r["step"], r["validation"]["r1"]) for r in log if "validation" in r]
    panels: list[tuple[str, str, dict[str, Points]]] = [
        ("Each loss term, before weighting", "loss (log scale)", _series(steps, "terms")),
        ("The weight that balancing gives it", "weight", weights if len(weights) > 1 else {}),
        ("Softening of the response targets", "temperature T", {"temperature": warmth} if warmth else {}),
        ("Retrieval of validation pairs", "recall at 1 (%)", {"recall": recall} if recall else {}),
    ]
    panels = [panel for panel in panels if panel[2]]
    fig = figure(8.3, 0.9 + 2.25 * -(-len(panels) // 2))
    axes = list(fig.subplots(-(-len(panels) // 2), 2, squeeze=False).ravel())
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax, (title, unit, series) in zip(axes, panels, strict=False):
        for name, points in series.items():
            plain = {"color": "black", "marker": "o" if name == "recall" else "", "markersize": 4}
            ax.plot(*zip(*points, strict=True), label=name, **TERMS.get(name, plain))
        ax.set(title=title, ylabel=unit, xlabel="step")
        values = [value for points in series.values() for _, value in points]
        spread = unit == "weight" and 0 < 50 * min(values) < max(values)
        if spread or (unit.startswith("loss") and min(values) > 0):
            ax.set_yscale("log")
            ax.set_ylabel(f"{unit} (log scale)" if spread else unit)
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(NullLocator())
        elif unit.startswith("loss"):
            ax.set_ylabel("loss")
        else:
            ax.set_ylim(0, None)
    patches = _shade_phases(axes[: len(panels)], steps)
    handles = [*axes[0].get_lines(), *patches]
    fig.legend(handles=handles, loc="outside lower center", ncols=8, columnspacing=1.2)
    if len(patches) > 1:
        fig.suptitle("What changes at the borders of the phases")
    return fig


@styled
def similarity_matrices(matrices: Mapping[str, Any], captions: Sequence[str]) -> NotebookFigure:
    """Cosine similarities (B, B) of pictures (rows) and captions, on one scale; pairs are on the diagonal."""
    arrays = {name: np.asarray(matrix, dtype=float) for name, matrix in matrices.items()}
    limits = {"vmin": min(a.min() for a in arrays.values()), "vmax": max(a.max() for a in arrays.values())}
    size = len(captions)
    ticks = range(0, size, -(-size // 8))
    fig = figure(3.2 + 1.7 * len(arrays), max(2.6, 0.19 * size + 1.7))
    axes = fig.subplots(1, len(arrays), sharey=True, squeeze=False)[0]
    for ax, (name, array) in zip(axes, arrays.items(), strict=True):
        shown = ax.imshow(array, cmap="viridis", interpolation="nearest", aspect="auto", **limits)
        found = int((array.argmax(1) == np.arange(size)).sum())
        ax.set(title=f"{LABELS.get(name, name)}:\n{found} of {size}", xlabel="caption number")
        ax.set_xticks(ticks, [i + 1 for i in ticks])
        ax.grid(False)
    rows = [f"{label(text, 34)}  {i}" for i, text in enumerate(captions, 1)]
    axes[0].set_yticks(range(size), rows)
    axes[0].set_ylabel("picture, named by its caption")
    fig.colorbar(shown, ax=list(axes), label="cosine similarity", shrink=0.9)
    fig.suptitle("The bright diagonal: how many pictures find their own caption first")
    return fig


@styled
def image_grid(images: Any, captions: Sequence[str], columns: int = 6) -> NotebookFigure:
    """Pictures uint8 (N, 3, H, W), each under its caption."""
    pictures = np.asarray(images).transpose(0, 2, 3, 1)
    texts = [label(caption, 18, lines=3) for caption in captions]
    rows, lines = -(-len(pictures) // columns), max(text.count("\n") + 1 for text in texts)
    fig = figure(1.45 * columns, rows * (1.5 + 0.16 * lines))
    fig.set_layout_engine("compressed")
    for i, ax in enumerate(fig.subplots(rows, columns, squeeze=False).ravel()):
        ax.axis("off")
        if i < len(pictures):
            ax.imshow(pictures[i], interpolation="nearest")
            ax.set_title(texts[i], fontsize=9, loc="center")
    return fig


@styled
def temperature_effect(
    similarities: Any, temperatures: Sequence[float], captions: Sequence[str] | None = None
) -> NotebookFigure:
    """softmax(similarities / T) of one picture's scaled similarities (K,), one panel per temperature."""
    logits = np.asarray(similarities, dtype=float)
    names = list(captions) if captions is not None else [f"caption {i}" for i in range(1, len(logits) + 1)]
    fig = figure(1.4 + 1.75 * len(temperatures), 1.3 + 0.24 * len(logits))
    axes = fig.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
    for ax, temperature in zip(axes, temperatures, strict=True):
        exponents = np.exp((logits - logits.max()) / temperature)
        shares = exponents / exponents.sum()
        entropy = -(shares * np.log2(np.maximum(shares, 1e-300))).sum()
        ax.barh(range(len(shares)), shares, color=PALETTE[2])
        ax.set(title=f"T = {temperature:g}: {entropy:.1f} bits", xlabel="probability", xlim=(0, 1))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(False, axis="y")
    axes[0].set_yticks(range(len(names)), [label(name, 34) for name in names])
    axes[0].invert_yaxis()
    fig.suptitle("A higher temperature shows what else the teacher considers")
    return fig
