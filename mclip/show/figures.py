"""Figures from results records and logs, drawn without a screen and without training anything."""

import json
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from os import PathLike
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from contourpy import contour_generator
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, NullLocator
from scipy.special import softmax
from scipy.stats import entropy

from mclip.config import PRESETS, closest
from mclip.files import DATA
from mclip.model import MobileCLIP
from mclip.results import ResultError
from mclip.show import style, tables
from mclip.show.tables import Groups, Scores, by_model, over_seeds, score_of

Records = Sequence[Mapping[str, Any]]
CLIP_VIT_B32_PARAMETERS = 151_277_313
MORE_SETS = ("cifar100", "fgvc_aircraft", "oxford_pets")
"""Photographs that are judged where they have been downloaded; means over the photograph sets leave them out."""
LABEL_AT = {
    "mobile-256": (6, -12),
    "MobileCLIP2-S0": (6, -12),
    "MobileCLIP-S1": (7, -8),
    "MobileCLIP-S2": (-38, 7),
    "ViT-M-32-alt": (-60, 6),
    "ViT-B-32": (-42, -3),
    "MobileCLIP-B": (-26, 7),
}
"""Places of labels, in points from the model's mark, where the usual one would lie on another mark."""


def parameter_counts(model: MobileCLIP) -> dict[str, int]:
    """Numbers of parameters by part; the token embedding is not counted in the text encoder."""
    parts = ("image_encoder", "text_encoder", "token_embedding", "image_projection", "text_projection")
    counts = dict.fromkeys((*parts, "other"), 0)
    for name, parameter in model.named_parameters():
        part = "token_embedding" if ".token_embedding." in name else name.split(".")[0]
        counts[part if part in counts else "other"] += parameter.numel()
    return {**counts, "total": sum(counts.values())}


def performance_comparison(records: Records, photographs: Records = ()) -> style.NotebookFigure:
    """Zero-shot top-1 of base, clip, kd and teacher with 95 % intervals; beside it the published series.

    Other models have their own names below. ``photographs``, where there are any, come first, with their retrieval; the
    scenes are then small and without numbers.
    """
    groups, measured = by_model(records), tables.zero_shot_table(records)
    if not groups:
        raise ResultError(f"results={len(records)} records hold no zero-shot record; evaluate a model first.")
    by_set = pd.read_csv(DATA / "published.csv").groupby("dataset", sort=False)
    published = {name: {row.model: {"value": row.top1} for row in rows.itertuples()} for name, rows in by_set}
    photos = photograph_scores(photographs)
    models = style.in_order(dict.fromkeys([*style.LABELS, *(name for row in measured.values() for name in row)]))
    panels, rows = [["scenes", "published"]], [max(len(measured), len(published))]
    title = "Measured here,\nwith 95 % intervals and chance"
    if photos:
        names = style.in_order({name for row in photos.values() for name in row})
        panels = [["photos", "published"], ["scenes", "scenes"]]
        rows = [max(len(photos), len(published)) * max(len(names), len(style.LABELS)) / len(style.LABELS)]
        rows.append(0.55 * len(measured))
        title = "Drawn scenes, measured here, with 95 % intervals and chance"
    fig = style.figure(8.3, 1.2 + 0.3 * len(rows) + 0.66 * sum(rows) * len(models) / len(style.LABELS))
    axes = fig.subplot_mosaic(panels, height_ratios=rows)
    if photos:
        style.grouped_bars(axes["photos"], photos, names)
        about = "Photographs, measured here, with 95 % intervals"
        if any(record["seed"] for record in photographs):
            about += ",\nover the seeds where a model has several"
        teachers = {record.get("details", {}).get("configuration", {}).get("teacher_model") for record in photographs}
        if "photographs" in teachers or "photo-teacher" in {record["model"]["name"] for record in photographs}:
            about += ".\nThe teacher's trunk has learnt Imagenette's classes,\nits students saw uncaptioned photographs"
        axes["photos"].set(title=about, xlabel="top-1, or recall at 5 (%)")
        _mark_chance(axes["photos"], list(photos), photographs, set_label)
    left, right = axes["scenes"], axes["published"]
    style.grouped_bars(left, measured, models, numbers=not photos)
    style.grouped_bars(right, published, list(style.LABELS))
    _mark_chance(left, list(measured), records, itemgetter("dataset"))
    left.set(title=title, xlabel="zero-shot top-1 accuracy (%)")
    right.set(title="Published by KLmobile / open_clip,\nnot measured here", xlabel="zero-shot top-1 accuracy (%)")
    handles, labels = axes["photos" if photos else "scenes"].get_legend_handles_labels()
    handles.append(Line2D([], [], color="black", linestyle="dotted"))
    fig.legend(handles, [*labels, "chance"], loc="outside lower center", ncols=5)
    fig.suptitle("What distillation adds: solid bars against the same student alone, and against the teacher")
    return fig


def _mark_chance(ax: Axes, rows: Sequence[str], records: Records, name_of: Callable[[Any], str]) -> None:
    """A dotted mark at chance on each of ``rows``; ``name_of`` says which one a record belongs to."""
    measured = [r for r in records if r["task"] in ("zero_shot", "retrieval") and "metrics" in r]
    chances = {name_of(record): tables.chance_of(record) for record in measured}
    for y, name in enumerate(rows):
        if chances.get(name) is not None:
            ax.vlines(chances[name], y - 0.46, y + 0.46, colors="black", linestyles="dotted")


def set_label(record: Mapping[str, Any]) -> str:
    """What figures and tables call the photograph set of a record; a set that is not the official one says so."""
    official = record["split"].partition(" (")[0] in ("test", "val")
    kind, note = ("", ", excerpt") if record["task"] == "zero_shot" else (" R@5", ", own split")
    return record["dataset"] + kind + note * (not official)


def photograph_scores(records: Records) -> Scores:
    """:func:`scores_over_seeds` of the photograph sets; of ``MORE_SETS``, those that all models have.

    The models that ship for photographs have the roles of those of scenes: photo-teacher is the teacher, and photo is
    kd, unless there is a kd that is compared with the others at equal samples.
    """
    compared = any(record["model"]["name"] == "kd" for record in records)
    photo = "photo, which ships" if compared else "kd"
    roles, groups = {"photo": photo, "photo-teacher": "teacher", "photo-base": "base"}, {}
    for record in records:
        if record["task"] in ("zero_shot", "retrieval") and "error" not in record:
            models = groups.setdefault(set_label(record), {})
            models.setdefault(roles.get(record["model"]["name"], record["model"]["name"]), []).append(record)
    everyone = {model for models in groups.values() for model in models}
    kept = {name: own for name, own in groups.items() if name not in MORE_SETS or own.keys() == everyone}
    return tables.scores_over_seeds(kept)


def set_means(groups: Groups) -> dict[str, dict[int, float]]:
    """``{model: {seed: mean over the sets}}`` in percent, of :func:`score_of`; ``groups`` as of :func:`by_model`.

    A seed that lacks one of the sets has no mean, since it would be that of other sets.
    """
    scores: dict[str, dict[int, list[float]]] = {}
    for models in groups.values():
        for model, group in models.items():
            for record in group:
                scores.setdefault(model, {}).setdefault(record["seed"], []).append(score_of(record)[1]["value"])
    whole = {model: {s: own for s, own in seeds.items() if len(own) == len(groups)} for model, seeds in scores.items()}
    return {model: {seed: fmean(values) for seed, values in seeds.items()} for model, seeds in whole.items() if seeds}


def per_class_recall(records: Records, dataset: str, limit: int = 6) -> style.NotebookFigure:
    """Recall of each class of ``dataset`` by model; of many, the ``limit`` where models differ most."""
    groups = by_model(records)
    if not groups.get(dataset):
        raise ResultError(f"dataset={dataset!r} has no results; {closest(dataset, groups)}")
    models, classes = groups[dataset], {}
    for model, group in models.items():
        recalls = [record["metrics"].get("per_class") for record in group]
        if None in recalls:
            raise ResultError(f"dataset={dataset!r} has no recall of single classes in the records of {model}.")
        for name in recalls[0]:
            classes.setdefault(name, {})[model] = over_seeds([recall[name] for recall in recalls])
    spread = {name: np.ptp([row["value"] for row in rows.values()]) for name, rows in classes.items()}
    chosen = sorted(classes, key=spread.get, reverse=True)[:limit]
    title = f"{dataset}: the {len(chosen)} of {len(classes)} classes where the models differ most"
    label = "recall of the class (%), with 95 % interval"
    return style.bar_chart({name: classes[name] for name in chosen}, style.in_order(models), title, label)


def read_log(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """The records of a JSON-lines log."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def training_curves(log: Records) -> style.NotebookFigure:
    """Loss terms, their weights, the temperature and validation recall by step of a ``log``, over shaded phases.

    What a run lacks has no panel; ResultError for one without a training step.
    """
    if not any("terms" in record for record in log):
        raise ResultError(f"log={len(log)} records hold no training step; give the log of a run.")
    table = pd.json_normalize(list(log)).set_index("step")
    groups = (table.filter(regex=rf"^{key}\.") for key in ("terms", "weights"))
    terms, weights = (group.rename(columns=lambda name: name.partition(".")[2]) for group in groups)
    # Only the response term has a temperature, and one term alone has no weight to balance.
    heat = table.filter(["temperature"] if "response" in terms else [])
    panels = [
        ("Each loss term, before weighting", "loss", terms),
        ("The weight that balancing gives it", "weight", weights if len(weights.columns) > 1 else weights[[]]),
        ("Softening of the response targets", "temperature T", heat),
        ("Retrieval of validation pairs", "recall at 1 (%)", table.filter(["validation.r1"])),
    ]
    panels = [panel for panel in panels if panel[2].notna().any(axis=None)]
    rows = -(-len(panels) // 2)
    fig = style.figure(8.3, 0.9 + 2.25 * rows)
    axes = [fig.add_subplot(rows, 2, number) for number in range(1, len(panels) + 1)]
    for ax, (title, unit, series) in zip(axes, panels, strict=True):
        for name, column in series.items():
            plain = {"color": "black", "marker": "o" if name == "validation.r1" else "", "markersize": 4}
            ax.plot(column.dropna(), label=name, **style.TERMS.get(name, plain))
        ax.set(title=title, xlabel="step", ylabel=unit)
        lowest, highest = series.min(axis=None), series.max(axis=None)
        # Losses above 0, and weights that differ by more than 50 times.
        if lowest > 0 and (unit == "loss" or (unit == "weight" and 50 * lowest < highest)):
            ax.set(yscale="log", ylabel=f"{unit} (log scale)")
            style.plain_numbers(ax.yaxis)
        elif unit != "loss":
            ax.set_ylim(0, None)
    phases = table["phase"].dropna()
    starts = phases[phases != phases.shift()]
    for (left, phase), right in zip(starts.items(), [*starts.index[1:], phases.index[-1]], strict=True):
        for ax in axes:
            ax.axvspan(left, right, color=style.PHASES[phase], alpha=0.2, linewidth=0, zorder=0)
    patches = [Patch(color=style.PHASES[p], alpha=0.4, linewidth=0, label=f"phase {p:g}") for p in sorted(set(starts))]
    handles = [*axes[0].get_lines(), *patches]
    fig.legend(handles=handles, loc="outside lower center", ncols=8, columnspacing=1.2)
    if len(patches) > 1:
        fig.suptitle("What changes at the borders of the phases")
    return fig


def compare_runs(logs: Mapping[str, Records]) -> style.NotebookFigure:
    """The contrastive loss on training pairs, as a moving mean, and recall at 5 of validation pairs, run by run."""
    losses, recalls = {}, {}
    for name, log in logs.items():
        values = pd.Series({r["step"]: r["terms"]["original"] for r in log if "original" in r.get("terms", {})})
        smooth = values.rolling(max(1, min(10, len(values) // 4))).mean()
        losses[name] = smooth.index, smooth
        recalls[name] = zip(*((r["step"], r["validation"]["r5"]) for r in log if "validation" in r), strict=True)
    left, right = "Contrastive loss on training pairs", "Retrieval of validation pairs"
    panels = {(left, "InfoNCE (moving mean)"): losses, (right, "recall at 5 (%)"): recalls}
    return style.line_charts(panels, "step")


def caption_matrix(ax: Axes, values: Any, rows: Sequence[str], lowest: float, highest: float) -> AxesImage:
    """Values (B, B) of pictures by captions as colours; both are counted from 1, and ``rows`` are named."""
    heatmap = ax.imshow(values, cmap="viridis", interpolation="nearest", aspect="auto", vmin=lowest, vmax=highest)
    ticks = range(0, len(rows), -(-len(rows) // 8))
    ax.set_xticks(ticks, [i + 1 for i in ticks])
    ax.set_yticks(range(len(rows)), [f"{style.label(text, 34)}  {i}" for i, text in enumerate(rows, 1)])
    ax.set_xlabel("caption number")
    ax.grid(False)
    return heatmap


def similarity_matrices(
    matrices: Mapping[str, Any],
    captions: Sequence[str],
    title: str = "True pairs lie on the diagonal: how many pictures find their own caption first",
) -> style.NotebookFigure:
    """Cosine similarities (B, B) of pictures (rows) and captions, on one scale; pairs are on the diagonal."""
    arrays = {name: np.asarray(matrix, dtype=float) for name, matrix in matrices.items()}
    limits = min(a.min() for a in arrays.values()), max(a.max() for a in arrays.values())
    size = len(captions)
    fig = style.figure(3.2 + 1.7 * len(arrays), max(2.6, 0.19 * size + 1.7))
    axes = fig.subplots(1, len(arrays), sharey=True, squeeze=False)[0]
    for ax, (name, array) in zip(axes, arrays.items(), strict=True):
        heatmap = caption_matrix(ax, array, captions, *limits)
        hits = int((array.diagonal() > np.where(np.eye(size), -np.inf, array).max(1)).sum())
        ax.set_title(f"{style.LABELS.get(name, name)}:\n{hits} of {size}")
    axes[0].set_ylabel("picture, named by its caption")
    fig.colorbar(heatmap, ax=list(axes), label="cosine similarity", shrink=0.9)
    fig.suptitle(title)
    return fig


def matrices(values: Mapping[str, Any], xlabel: str, ylabel: str, names: Sequence[str] = ()) -> style.NotebookFigure:
    """Non-negative matrices (M, N) as colours side by side, each with its own scale; ``names`` of rows and columns."""
    fig = style.figure(1.0 + 3.6 * len(values), 4.2 if names else 3.4)
    axes = fig.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for ax, (title, matrix) in zip(axes, values.items(), strict=True):
        heatmap = ax.imshow(matrix, cmap="viridis", vmin=0)
        if names:
            ax.set_xticks(range(len(names)), names, rotation=60, ha="right")
            ax.set_yticks(range(len(names)), names)
        else:
            ax.locator_params(integer=True)
        ax.set(title=title, xlabel=xlabel)
        ax.grid(False)
        fig.colorbar(heatmap, ax=ax, shrink=0.6, label="weight")
    axes[0].set_ylabel(ylabel)
    return fig


def image_grid(images: Any, captions: Sequence[str], columns: int = 6) -> style.NotebookFigure:
    """Pictures uint8 (N, 3, H, W), each under its caption."""
    pictures = np.asarray(images).transpose(0, 2, 3, 1)
    texts = [style.label(caption, 18, lines=5) for caption in captions]
    rows, lines = -(-len(pictures) // columns), max(text.count("\n") + 1 for text in texts)
    fig = style.figure(1.45 * columns, rows * (1.5 + 0.16 * lines))
    fig.set_layout_engine("compressed")
    for i, ax in enumerate(fig.subplots(rows, columns, squeeze=False).ravel()):
        ax.axis("off")
        if i < len(pictures):
            ax.imshow(pictures[i], interpolation="nearest")
            ax.set_title(texts[i], fontsize=9, loc="center")
    return fig


def embedding_map(
    points: Any, shapes: Any, colours: Any, outlines: Mapping[str, Callable], paints: Mapping[str, Sequence[float]]
) -> style.NotebookFigure:
    """Mean embeddings (N, d) on their two main directions; right the same without the mean of each shape.

    ``shapes`` and ``colours`` (N,) number the items of ``outlines``, {name: signed distance of x and y}, and of
    ``paints``, {name: RGB}. A mark has the outline and the paint of what it stands for.
    """
    line = np.linspace(-1.2, 1.2, 60, dtype=np.float32)
    paths = [contour_generator(line, -line, of(*np.meshgrid(line, line))).lines(0) for of in outlines.values()]
    markers = [Path.make_compound_path(*(Path(ring, closed=True) for ring in rings)) for rings in paths]
    fig = style.figure(8.3, 4.2)
    centred = points - points.mean(0)
    beside = centred - np.stack([centred[shapes == shape].mean(0) for shape in shapes])
    for ax, rows, groups, names, what in zip(
        fig.subplots(1, 2), (centred, beside), (shapes, colours), (outlines, paints), ("shape", "colour"), strict=True
    ):
        flat = rows @ np.linalg.svd(rows, full_matrices=False)[2][:2].T
        for point, shape, colour in zip(flat, shapes, colours, strict=True):
            paint = list(paints.values())[colour]
            ax.scatter(*point, s=70, color=paint, marker=markers[shape], edgecolor="black", linewidth=0.4)
        for group, position in zip(np.unique(groups), names_beside(flat, groups), strict=True):
            ax.text(*position, list(names)[group], ha="center", va="center")
        ax.margins(0.12)
        ax.set(title=f"The {what}s", xlabel="first principal component", ylabel="second principal component")
    ax.set_title("Without the mean of each shape: the colours")
    fig.suptitle("A map of the teacher's picture embeddings, a mark for each colour and shape")
    return fig


def names_beside(points: np.ndarray, groups: np.ndarray) -> list[np.ndarray]:
    """Where the name of each group of ``points`` (N, 2) goes: beside the group, with room to all marks and names."""
    scale = 240 / np.ptp(points, axis=0)  # to about typographic points, of a panel with margins
    marks, angles = points * scale, np.linspace(0, 2 * np.pi, 32, endpoint=False)
    directions, occupied, positions = np.stack([np.sin(angles), np.cos(angles)], axis=1), list(marks), []
    for group in np.unique(groups):
        own, middle = marks[groups == group], marks[groups == group].mean(0)
        reach = ((own - middle) @ directions.T).max(0)[:, None]
        candidates = np.concatenate([middle + directions * (reach + beyond) * (1.3, 1) for beyond in (10, 16, 22)])
        room = np.hypot(*((candidates[:, None] - occupied) / (2, 1)).T).min(0)  # a name is wider than high
        positions.append(candidates[room.clip(max=12).argmax()])
        occupied += [positions[-1] + (shift, 0) for shift in (-12, 0, 12)]
    return [position / scale for position in positions]


def probe_chart(
    probes: Mapping[str, Mapping[int, style.Row]], zero_shot: Mapping[str, style.Row], title: str, chance: float
) -> style.NotebookFigure:
    """Accuracy of linear probes in percent, {model: {labels a class: row}}; dashed that of the names alone."""
    fig = style.figure(6.3, 3.6)
    ax = fig.subplots()
    for mark, (model, rows) in zip("os^D", probes.items(), strict=False):
        look = {"color": style.COLOURS[model], "marker": mark, "markersize": 4, "label": style.LABELS[model]}
        values = [row["value"] for row in rows.values()]
        ax.errorbar(list(rows), values, style.whiskers(rows.values()), capsize=2, **look)
        ax.axhline(zero_shot[model]["value"], color=look["color"], linestyle="--")
    ax.axhline(chance, color="black", linestyle=":")
    ax.set(title=title, xlabel="labelled pictures a class", ylabel="accuracy (%)", xscale="log", ylim=(0, 100))
    counts = sorted({count for rows in probes.values() for count in rows})
    ax.set_xticks(counts, counts)
    ax.minorticks_off()
    kinds = (("names, no label", "--"), ("chance", ":"))
    lines = [Line2D([], [], color="black", linestyle=dash, label=name) for name, dash in kinds]
    fig.legend(handles=[*ax.containers, *lines], loc="outside lower center", ncols=5, columnspacing=1)
    return fig


def pairs_on_their_way(step: int, embeddings: Any, goals: Any) -> style.NotebookFigure:
    """Embeddings (2N, d) at a ``step``, N pictures and then their captions, with a line from each to its goal (2N, d).

    All are unit vectors. The plane is that of the goals' two main directions, so it is the same at every step.
    """
    rows, ends = np.asarray(embeddings), np.asarray(goals)
    count, plane = len(ends) // 2, np.linalg.svd(ends - ends.mean(0), full_matrices=False)[2][:2].T
    pictures, captions = (rows * ends).sum(1).reshape(2, count).mean(1)
    fig = style.figure(6.3, 4.0)
    ax = fig.subplots()
    for number, line in enumerate(np.stack([rows @ plane, ends @ plane], 1)):
        look = {"marker": "os"[number // count], "color": style.PALETTE[number % count % 10]}
        ax.plot(*line.T, color=look["color"], linewidth=0.5)
        ax.scatter(*line[0], s=40, **look)
        ax.scatter(*line[1], s=90, facecolor="none", **look)
    ax.set(title=f"Step {step}: cosine to the goal {pictures:.2f} for pictures, {captions:.2f} for captions")
    ax.set(xlabel="first main direction of the goals", ylabel="second main direction", xlim=(-1, 1), ylim=(-1, 1))
    ax.grid(False)
    marks = (("picture", "o", "full"), ("its goal", "o", "none"), ("caption", "s", "full"), ("its goal", "s", "none"))
    black = {"color": "black", "linestyle": ""}
    handles = [Line2D([], [], label=name, marker=mark, fillstyle=fill, **black) for name, mark, fill in marks]
    fig.legend(handles=handles, loc="outside lower center", ncols=4)
    return fig


def temperature_effect(
    logits: Any, temperatures: Sequence[float], captions: Sequence[str], images: Any = (), own: Sequence[int] = ()
) -> style.NotebookFigure:
    """softmax(logits / T) of one picture's scaled similarities (K,), one panel per temperature; T = 0 is the limit.

    With ``images`` uint8 (N, 3, H, W) the logits are (N, K): a row of panels beside each picture. The bar of the
    picture's own caption, number ``own`` (N,), is orange and hatched.
    """
    rows, beside = np.atleast_2d(np.asarray(logits, dtype=float)), int(len(images) > 0)
    columns, bars = beside + len(temperatures), range(rows.shape[1])
    fig = style.figure(1.4 + 1.75 * columns, 0.7 + len(rows) * (0.4 + 0.18 * len(bars)))
    axes = fig.subplots(len(rows), columns, squeeze=False)
    for line, image in zip(axes, images, strict=False):
        line[0].imshow(np.asarray(image).transpose(1, 2, 0), interpolation="nearest")
        line[0].axis("off")
    for number, (line, row) in enumerate(zip(axes[:, beside:], rows, strict=True)):
        right = list(own[number : number + 1])
        for ax, temperature in zip(line, temperatures, strict=True):
            shares = softmax(row / max(temperature, 1e-6))
            ax.barh(bars, shares, color=style.PALETTE[2])
            ax.barh(
                right, [shares[i] for i in right], color=style.PALETTE[1], hatch="//", edgecolor="white", linewidth=0
            )
            name = f"T = {temperature:g}" if temperature else "T → 0"
            ax.set(title=f"{name}: {entropy(shares, base=2):.1f} bits", xlim=(0, 1), xticks=(0, 0.5, 1))
            ax.xaxis.set_major_formatter("{x:g}")
            style.name_rows(ax, [style.label(caption, 34) for caption in captions])
            ax.tick_params(labelleft=ax is line[0], labelbottom=number == len(rows) - 1)
    for ax in axes[-1, beside:]:
        ax.set_xlabel("probability")
    fig.suptitle("A higher temperature shows what else the teacher considers")
    return fig


def cost_of_models(record: Mapping[str, Any]) -> style.NotebookFigure:
    """Latency of the deployed models against the size of their weights, and that of both halves as bars."""
    models = {name: m for name, m in record["models"].items() if "," not in name}  # a comma: another form
    latencies = {name: tables.milliseconds(m) for name, m in models.items()}
    points = [(sum(latencies[name].values()), m["megabytes"]) for name, m in models.items()]
    fig = style.figure(8.3, 4.2)
    left, right = fig.subplots(1, 2, width_ratios=(1.25, 1))
    for name, point in zip(models, points, strict=True):
        marker, colour = ("o", style.PALETTE[0]) if name in PRESETS else ("s", style.PALETTE[1])
        left.plot(*point, marker, color=colour, markersize=6)
        left.annotate(name, point, textcoords="offset points", xytext=LABEL_AT.get(name, (6, 4)), fontsize=8)
    left.plot([], [], "o", color=style.PALETTE[0], label="presets of this course")
    left.plot([], [], "s", color=style.PALETTE[1], label="open_clip's")
    left.set(title="Cost, not accuracy: lower left is cheaper", xscale="log", yscale="log")
    left.set(xlabel="picture and caption, batch 1, one thread (ms)", ylabel="weights (MB)")
    left.margins(x=0.25, y=0.12)
    for axis, ticks in ((left.xaxis, (3, 10, 30, 100, 300, 1000)), (left.yaxis, (25, 50, 100, 200, 400, 800))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    left.legend(loc="upper left", fontsize=8)
    for half, colour, hatch, offset in (("image", style.PALETTE[2], "", -0.2), ("text", style.PALETTE[4], "//", 0.2)):
        times = np.array([latencies[name][half] for name in models])
        look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        bars = right.barh(np.arange(len(times)) + offset, times, 0.4, label=half, **look)
        right.bar_label(bars, [f" {time:.{int(time < 10)}f}" for time in times], fontsize=8)
    style.name_rows(right, list(models))
    right.margins(x=0.15)
    right.set(title="Its two halves", xlabel="median latency (ms)")
    right.legend(loc="lower right")
    return fig


def stage_chart(stages: Mapping[str, float]) -> style.NotebookFigure:
    """Milliseconds of each stage of an image encoder, and its share."""
    fig, total = style.figure(5.5, 2.7), sum(stages.values())
    ax = fig.subplots()
    bars = ax.barh(range(len(stages)), list(stages.values()), color=style.PALETTE[2])
    ax.bar_label(bars, [f" {value:.2f} ms, {value / total:.0%}" for value in stages.values()])
    style.name_rows(ax, list(stages))
    ax.margins(x=0.3)
    ax.set(title="Where the time of one picture goes", xlabel="time of one picture (ms)")
    return fig
