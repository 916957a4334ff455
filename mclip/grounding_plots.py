"""The figure of ``data/results/grounding``: who points at the object that was named, and at which layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.ticker import MaxNLocator

from mclip.results import ResultError
from mclip.style import COLOURS, HATCHES, LABELS, NotebookFigure, figure, styled

BASELINES = {"random": ":", "centre": "-."}
SCORES = {"pointing": "pointing game (%)", "iou": "intersection over union (%)"}


@styled
def grounding_scores(records: Iterable[Mapping[str, Any]]) -> NotebookFigure:
    """Pointing game and overlap of each model with 95 % intervals, baselines as lines, and pointing by layer.

    The layers are those of the validation pictures, on which layer and threshold were chosen. Failures are left out.
    """
    found = {r["model"]["name"]: r for r in records if r["task"] == "grounding" and "error" not in r}
    models = [name for name in LABELS if name in found]
    if not models:
        raise ResultError("no grounding record of a model; run: python -m mclip grounding")
    fig = figure(8.3, 2.9)
    *axes, last = fig.subplots(1, 3, width_ratios=(1, 1, 1.1))
    for ax, (key, label) in zip(axes, SCORES.items(), strict=True):
        for row, name in enumerate(models):
            m = found[name]["metrics"][key]
            ax.barh(row, m["value"], color=COLOURS[name], hatch=HATCHES[name], edgecolor="white", linewidth=0)
            ax.errorbar(m["value"], row, xerr=[[m["value"] - m["low"]], [m["high"] - m["value"]]], fmt="none",
                        ecolor="black", elinewidth=1, capsize=2)  # fmt: skip
            ax.text(m["high"] + 1, row, f"{m['value']:.1f}", va="center")
        for name, dash in BASELINES.items():
            if name in found:
                ax.axvline(found[name]["metrics"][key]["value"], color="black", linestyle=dash, linewidth=1, label=name)
        ax.set_yticks(range(len(models)), models if ax is axes[0] else [""] * len(models))
        ax.invert_yaxis()
        ax.grid(False, axis="y")
        ax.set(xlabel=label)
        ax.margins(x=0.2)
    axes[0].set_title("Does it point at the object?")
    axes[1].set_title("Does it cover it?")
    for number, name in enumerate(models):
        layers = found[name]["details"]["layers"]
        values = [scores["pointing"] for scores in layers.values()]
        look = {"marker": "osD^"[number], "color": COLOURS[name], "linestyle": "--" if HATCHES[name] else "-"}
        last.plot(range(1, len(values) + 1), values, markersize=5, label=name, **look)
    last.set(title="Pointing by layer, fine to coarse", xlabel="layer, from the picture on",
             ylabel="pointing on validation (%)")  # fmt: skip
    last.set_ylim(0, None)
    last.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [*axes[0].get_legend_handles_labels()[0], *last.get_legend_handles_labels()[0]]
    fig.legend(handles=handles, loc="outside lower center", ncols=5)
    return fig
