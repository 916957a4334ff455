"""Figures of what models cost, from ``data/results/efficiency.json``."""

from collections.abc import Mapping
from typing import Any

from matplotlib.ticker import FixedLocator, NullLocator

from mclip.config import PRESETS
from mclip.show.style import PALETTE, NotebookFigure, figure, interval_bars, name_rows
from mclip.show.tables import milliseconds

Record = Mapping[str, Any]
LABEL_AT = {
    "mobile-256": (6, -12),
    "MobileCLIP2-S0": (6, -10),
    "ViT-M-32-alt": (-60, 6),
    "ViT-B-32": (-26, 7),
    "MobileCLIP-B": (-24, -14),
}
"""Places of labels, in points from the model's mark, where the usual one would lie on another mark."""


def cost_of_models(record: Record) -> NotebookFigure:
    """Latency against size of the weights, and the latency of both halves as bars.

    Only the deployed form is drawn: it has the bare name of its model.
    """
    models = {name: m for name, m in record["models"].items() if "," not in name}  # a comma: another form
    latencies = {name: milliseconds(m) for name, m in models.items()}
    points = [(sum(latencies[name].values()), m["megabytes"]) for name, m in models.items()]
    fig = figure(8.3, 4.2)
    left, right = fig.subplots(1, 2, width_ratios=(1.25, 1))
    for name, point in zip(models, points, strict=True):
        marker, colour = ("o", PALETTE[0]) if name in PRESETS else ("s", PALETTE[1])
        left.plot(*point, marker, color=colour, markersize=6)
        left.annotate(name, point, textcoords="offset points", xytext=LABEL_AT.get(name, (6, 4)), fontsize=8)
    left.plot([], [], "o", color=PALETTE[0], label="presets of this course")
    left.plot([], [], "s", color=PALETTE[1], label="open_clip's")
    left.set(title="Cost, not accuracy: lower left is cheaper", xscale="log", yscale="log")
    left.set(xlabel="picture and caption, batch 1, one thread (ms)", ylabel="weights (MB)")
    left.margins(x=0.25, y=0.12)
    for axis, ticks in ((left.xaxis, (10, 30, 100, 300, 1000)), (left.yaxis, (50, 100, 200, 400, 800))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    left.legend(loc="upper left", fontsize=8)
    for half, colour, hatch, offset in (("image", PALETTE[2], "", -0.2), ("text", PALETTE[4], "//", 0.2)):
        rows = [{"value": latencies[name][half]} for name in models]
        heights = [number + offset for number in range(len(rows))]
        interval_bars(right, heights, rows, 0.4, label=half, color=colour, hatch=hatch)
        for height, row in zip(heights, rows, strict=True):
            right.text(row["value"], height, f" {row['value']:.{int(row['value'] < 10)}f}", va="center", fontsize=8)
    name_rows(right, list(models))
    right.margins(x=0.15)
    right.set(title="Its two halves", xlabel="median latency (ms)")
    right.legend(loc="lower right")
    return fig


def stage_chart(stages: Mapping[str, float]) -> NotebookFigure:
    """Milliseconds of each stage of an image encoder, and its share."""
    fig, total = figure(5.5, 2.7), sum(stages.values())
    ax = fig.subplots()
    bars = ax.barh(range(len(stages)), list(stages.values()), color=PALETTE[2])
    ax.bar_label(bars, [f" {value:.2f} ms, {value / total:.0%}" for value in stages.values()])
    name_rows(ax, list(stages))
    ax.margins(x=0.3)
    ax.set(title="Where the time of one picture goes", xlabel="time of one picture (ms)")
    return fig
