"""How every figure looks: colours, patterns, sizes and bars, and PNG files that depend on the data alone."""

import io
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from mclip.files import atomic_path

Row = Mapping[str, float]  # {"value"} in percent, with "low" and "high" where there is an interval
Table = Mapping[str, Mapping[str, Row]]  # {group: {model: row}}
PALETTE = sns.color_palette("colorblind")
LABELS = {"base": "student alone", "clip": "plain CLIP", "kd": "distilled student", "teacher": "teacher"}
# Models and terms are told apart without colour as well, by hatches and dashes.
COLOURS = dict(zip(LABELS, (PALETTE[7], PALETTE[1], PALETTE[0], PALETTE[2]), strict=True))
HATCHES = dict(zip(LABELS, ("//", "\\\\", "", ".."), strict=True))
OTHERS = tuple(zip((PALETTE[i] for i in (3, 4, 6, 9, 5, 8)), ("xx", "oo", "++", "--", "**", "||"), strict=True))
"""Colour and hatch of models with names of their own, in the order in which they come."""
DASHES = {"original": "-", "feature": "--", "response": "-.", "similarity": ":", "icl": (0, (6, 1))}
TERMS = {name: {"color": PALETTE[i], "linestyle": DASHES[name]} for i, name in enumerate(DASHES)}
_LOOKS_OF_LINES = ((0, "-"), (1, "-."), (2, ":"), (4, (0, (6, 1))), (3, (0, (3, 1, 1, 1, 1, 1))), (9, (0, (3, 2))))
LINES = tuple({"color": PALETTE[i], "linestyle": dash} for i, dash in _LOOKS_OF_LINES)
"""Looks of lines that are neither a term nor the student alone, in the order in which they come."""
PHASES = {1: PALETTE[7], 2: PALETTE[8], 3: PALETTE[9]}
TEXTS = ("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
SIZES = dict.fromkeys(TEXTS, 9) | {"axes.titlesize": 10, "figure.titlesize": 11}
LOOKS = {"axes.titlelocation": "left", "lines.linewidth": 1.4, "hatch.linewidth": 0.6}
# Whoever imports this module draws in this style: seaborn's white grid, colour-blind palette, no text under 9 points.
sns.set_theme(context=None, style="whitegrid", palette="colorblind", color_codes=False, rc=SIZES | LOOKS)


class NotebookFigure(Figure):
    """A Figure that shows itself in a notebook, although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        # The layout engine moves everything a little whenever it runs: it runs once, here.
        self.draw_without_rendering()
        self.set_layout_engine("none")
        buffer = io.BytesIO()
        # Neither date nor version goes into the file: the same data gives the same bytes.
        self.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def figure(width: float, height: float) -> NotebookFigure:
    """An empty figure of ``width`` x ``height`` inches whose parts make room for each other."""
    return NotebookFigure(figsize=(width, height), dpi=150, layout="constrained")


def save_figure(fig: NotebookFigure, path: str | Path) -> Path:
    """Write ``fig`` as PNG, whole or not at all; the same data gives the same bytes."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(fig._repr_png_())
    return Path(path)


def animation(frames: Iterable[NotebookFigure], milliseconds: int = 400) -> bytes:
    """An animated PNG of ``frames`` in a loop, with a long stop at the last. What cannot move shows the last alone."""
    pictures = [Image.open(io.BytesIO(frame._repr_png_())).convert("RGB") for frame in frames]
    # The last frame has every colour. One palette for all lets Pillow keep only what changes between two frames.
    palette = pictures[-1].quantize(128, Image.Quantize.MAXCOVERAGE)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [milliseconds] * (len(pictures) - 1) + [8 * milliseconds]
    buffer, settings = io.BytesIO(), {"save_all": True, "default_image": True, "duration": durations, "loop": 0}
    pictures[-1].save(buffer, "PNG", append_images=pictures, **settings)
    return buffer.getvalue()


def label(text: str, width: int, lines: int = 1) -> str:
    """``text`` for a figure: at most ``lines`` lines of ``width`` characters, "…" for what is cut off, no formulas.

    What has no spaces, as in Japanese, is cut between characters. A dollar sign would start a formula.
    """
    rows = textwrap.wrap(text, width, break_on_hyphens=False)
    if len(rows) > lines:
        rows[lines - 1 :] = [" ".join(rows[lines - 1 :])[: width - 1].rstrip() + "…"]
    return "\n".join(rows).replace("$", r"\$")


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Write ``names`` beside the rows 0, 1, 2, ... of a horizontal bar chart, from top to bottom."""
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(False, axis="y")


def whiskers(rows: Collection[Row]) -> np.ndarray | None:
    """How far the intervals of ``rows`` reach below and above their values, (2, N); None if one has no interval."""
    ends = [(row["value"] - row["low"], row["high"] - row["value"]) for row in rows if "low" in row]
    return np.transpose(ends) if ends and len(ends) == len(rows) else None


def in_order(models: Iterable[str]) -> list[str]:
    """``models`` in the order of LABELS; those with names of their own stand before the teacher, who is the measure."""
    known = list(LABELS)
    return sorted(models, key=lambda name: known.index(name) if name in known else known.index("teacher") - 0.5)


def grouped_bars(ax: Axes, table: Table, models: Sequence[str], numbers: bool = True) -> None:
    """Horizontal bars of percentages: a group per key of ``table``, a bar per model, and its number if ``numbers``.

    A bar that is missing says so, because it is not a zero.
    """
    height = 0.84 / len(models)
    looks = {name: (COLOURS[name], HATCHES[name]) for name in LABELS}
    looks |= dict(zip((name for name in models if name not in LABELS), cycle(OTHERS), strict=False))
    for i, model in enumerate(models):
        offset = (i - (len(models) - 1) / 2) * height
        rows = {y + offset: group[model] for y, group in enumerate(table.values()) if model in group}
        colour, hatch = looks[model]
        name = LABELS.get(model) or label(model, 24)
        look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0, "label": name}
        error = {"xerr": whiskers(rows.values()), "ecolor": "black", "capsize": 2, "error_kw": {"elinewidth": 1}}
        ax.barh(list(rows), [row["value"] for row in rows.values()], height, **look, **error)
        for y, group in enumerate(table.values()):
            row = group.get(model, {})
            text, end = f"{row['value']:.1f}" * numbers if row else "no result", row.get("high", row.get("value", 0))
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0}
            ax.text(end + 1.5, y + offset, text, va="center", bbox=box)
    name_rows(ax, [label(group.replace("_", " "), 40) for group in table])
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set_xlim(0, 118)  # room for the number behind a bar of 100
    ax.set_xticks(range(0, 101, 20))


def bar_chart(
    table: Table, models: Sequence[str], title: str, xlabel: str, width: float = 6.3, chance: Sequence[float] = ()
) -> NotebookFigure:
    """:func:`grouped_bars` as a figure, with the legend below; ``chance`` is a dotted mark for each group."""
    fig = figure(width, 1.2 + max(0.17 * len(models), 0.3) * len(table))
    ax = fig.subplots()
    grouped_bars(ax, table, models)
    for y, floor in enumerate(chance):
        ax.vlines(floor, y - 0.46, y + 0.46, colors="black", linestyles="dotted", label=None if y else "chance")
    ax.set(title=title, xlabel=xlabel)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def plain_numbers(axis: Axis) -> None:
    """Mark a logarithmic axis with 1, 2, 3, 5, 10 in place of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def line_charts(
    panels: Mapping[tuple[str, str], Mapping[str, Any]], xlabel: str, phases: Sequence[float] = (), **axes: Any
) -> NotebookFigure:
    """A panel for each (title, label of y) and in it a line for each name, given as (xs, ys); a name has one look.

    ``phases`` are the bounds of phases to shade, from the first step to the last; ``axes`` are settings of all panels.
    """
    names = dict.fromkeys(name for lines in panels.values() for name in lines)
    known = TERMS | {"base": {"color": PALETTE[7], "linestyle": "--"}}
    looks = dict(zip((name for name in names if name not in known), cycle(LINES), strict=False)) | known
    fig = figure(6.3 if len(panels) == 1 else 8.3, 3.0)
    axes_of_panels = fig.subplots(1, len(panels), squeeze=False)[0]
    for ax, ((title, ylabel), lines) in zip(axes_of_panels, panels.items(), strict=True):
        for name, points in lines.items():
            ax.plot(*points, label=name, **looks[name])
        for number, (start, end) in enumerate(pairwise(phases), start=1):
            ax.axvspan(start, end, color=PHASES[number], alpha=0.2, linewidth=0, label=f"phase {number}")
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel, **axes)
        for axis in (ax.xaxis, ax.yaxis):
            if axis.get_scale() == "log":
                plain_numbers(axis)
    handles = {name: handle for ax in fig.axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    if len(handles) > 1:
        fig.legend(handles.values(), handles, loc="outside lower center", ncols=3 * min(2, len(panels)))
    return fig


def line_chart(lines: Mapping[str, Mapping[float, float]], title: str, **axes: Any) -> NotebookFigure:
    """A line with marks for each of ``lines``, {name: {x: y}}; ``axes`` are labels, scales and limits of the axes."""
    fig = figure(6.3, 3.1)
    ax = fig.subplots()
    for (name, line), look in zip(lines.items(), cycle(("o-", "s--", "^:")), strict=False):
        ax.plot(list(line), list(line.values()), look, markersize=4, label=name)
    ax.set(title=title, **axes)
    if len(lines) > 1:
        fig.legend(loc="outside lower center", ncols=len(lines))
    return fig


def stacked_bars(parts: Mapping[str, Mapping[str, float]], title: str, xlabel: str) -> NotebookFigure:
    """A horizontal bar for each of ``parts``, {row: {part: value}}, cut into its parts."""
    fig = figure(7.3, 1.3 + 0.22 * len(parts))
    ax, left = fig.subplots(), np.zeros(len(parts))
    for number, part in enumerate(next(iter(parts.values()))):
        values = np.array([row[part] for row in parts.values()])
        hatch = ("", "//", "..", "\\\\", "xx")[number]
        ax.barh(range(len(parts)), values, left=left, label=part, hatch=hatch, edgecolor="white", linewidth=0)
        left += values
    name_rows(ax, list(parts))
    ax.set(title=title, xlabel=xlabel)
    fig.legend(loc="outside lower center", ncols=5, columnspacing=1)
    return fig
