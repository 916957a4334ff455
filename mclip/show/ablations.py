"""What the ablations and the defects say: differences with intervals, verdicts, tables and figures.

``details.experiment`` of a record holds the configuration's title, its group, and what it is compared with.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import fdtrc, stdtrit

from mclip.config import DistillConfig, TrainConfig, get_profile
from mclip.results import ResultError
from mclip.show.figures import MORE_SETS, set_means
from mclip.show.style import PALETTE, NotebookFigure, figure, label, name_rows, whiskers
from mclip.show.tables import by_model, markdown

Records = Iterable[Mapping[str, Any]]
Means = Mapping[str, Mapping[int, float]]
DEFAULTS: dict[str, Any] = json.loads(json.dumps(asdict(TrainConfig()) | asdict(DistillConfig())))  # lists for tuples
"""What a setting was in a record that was made before the setting was there."""
UNLIKE = 0.001  # how improbable the scatter of a configuration must be, if all were alike, to stay out of the pool
VERDICTS = {
    "helps": (PALETTE[2], "^"),
    "hurts": (PALETTE[3], "v"),
    "undecided": (PALETTE[7], "o"),
    "identical": ("black", "x"),
}
"""Colour and marker of a difference whose interval lies above 0, below 0, or holds it, and of one that is no run."""
MEASURES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "R@10": lambda metrics: metrics["retrieval"]["r10"],
    "held-out": lambda metrics: metrics["sets"]["held-out"]["value"],
    "mean top-1": lambda metrics: metrics["mean"],
}
"""What a recipe of scenes is judged by, in percent: retrieval, new pairs of colour and shape, and all seven sets."""
PHOTOGRAPH_MEASURES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "R@5": lambda metrics: metrics["sets"]["flickr8k"]["value"],
    "mean top-1 of four sets": lambda metrics: statistics.fmean(
        score["value"] for name, score in metrics["sets"].items() if name != "flickr8k"
    ),
}
"""What one of photographs is judged by, in percent: retrieval, and the zero-shot sets."""


def plan_of(records: Records) -> dict[str, Mapping[str, Any]]:
    """What each configuration is, ``{name: {"title", "group", "question", "against", "student"}}``, as they come."""
    return {record["model"]["name"]: record["details"]["experiment"] for record in records}


def means_of(records: Records, measure: str = "mean top-1") -> dict[str, dict[int, float]]:
    """One of ``MEASURES`` or ``PHOTOGRAPH_MEASURES``, by configuration and seed; failures have none.

    ResultError for a configuration whose records differ in more than the seed.
    """
    means, settings, value_of = {}, {}, (MEASURES | PHOTOGRAPH_MEASURES)[measure]
    for record in records:
        name, own = record["model"]["name"], DEFAULTS | record["details"]["configuration"] | {"seed": None}
        if settings.setdefault(name, own) != own:
            raise ResultError(f"{name}: its records differ in more than the seed; keep those of one setting.")
        if "error" not in record:
            means.setdefault(name, {})[record["seed"]] = value_of(record["metrics"])
    return means


def pooled_deviation(means: Means) -> tuple[float, int, set[str]]:
    """Standard deviation of a difference of two runs of one seed, and its degrees of freedom, from all configurations.

    It is what is left of the scores when each configuration and each seed has a level of its own (two-way analysis
    of variance: Fisher 1925), times sqrt(2) for a difference of two. A configuration whose scores are another's, bit
    for bit, is no run of its own and is left out. (nan, 0) where no configuration has two seeds.

    Pooling assumes that all scatter alike. The third item names those that are left out because they do not: an F test
    of such a one against the rest has a p-value below ``UNLIKE``, times the number of configurations (Bonferroni).
    """
    scores, unlike = pd.DataFrame(means).T.drop_duplicates().stack().dropna(), set()
    while True:
        levels = [pd.get_dummies(scores.index.get_level_values(level)) for level in (0, 1)]
        matrix = np.concatenate(levels, axis=1).astype(float)
        fitted, _, rank, _ = np.linalg.lstsq(matrix, scores.to_numpy())
        freedom = len(scores) - int(rank)
        squares = ((scores - matrix @ fitted) ** 2).groupby(level=0).sum()
        own = scores.groupby(level=0).size() - 1
        own = own[(own > 0) & (own < freedom)]
        rest = (squares.sum() - squares[own.index]) / (freedom - own)
        chances = pd.Series(fdtrc(own, freedom - own, squares[own.index] / own / rest), own.index) * len(own)
        if not (chances < UNLIKE).any():
            return math.sqrt(2 * squares.sum() / freedom) if freedom else math.nan, freedom, unlike
        unlike.add(chances.idxmin())
        scores = scores.drop(chances.idxmin(), level=0)


def difference(means: Means, name: str, against: str) -> dict[str, Any]:
    """Points by which ``name`` scores more than ``against``, seed by seed; ResultError where no seed has both.

    The keys are ``value``, number of seeds ``n``, ``verdict``, and the interval ``low`` to ``high``, Student's 95 %
    with :func:`pooled_deviation`; where one of the two is not pooled, that of these differences alone. Where no
    configuration has two seeds it is missing, and nothing is decided.
    """
    own, other = means.get(name, {}), means.get(against, {})
    points = [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]
    if not points:
        remedy = "train both with one seed: python -m mclip study"
        raise ResultError(f"{name}: no seed has a record of it and of {against}; {remedy}")
    value, (deviation, freedom, unlike) = statistics.fmean(points), pooled_deviation(means)
    if {name, against} & unlike:
        return paired_difference(means, name, against)
    effect = {"value": value, "n": len(points)}
    if len(points) > 1 and not any(points):  # in one seed, two runs may score the same by chance
        return effect | {"low": 0.0, "high": 0.0, "verdict": "identical"}
    if not freedom:
        return effect | {"verdict": "undecided"}
    half = float(stdtrit(freedom, 0.975)) * deviation / math.sqrt(len(points))
    verdict = "helps" if value > half else "hurts" if value < -half else "undecided"
    return effect | {"low": value - half, "high": value + half, "verdict": verdict}


def paired_difference(means: Means, name: str, against: str) -> dict[str, Any]:
    """The :func:`difference` with the plain Student's interval, of the scatter of these differences alone."""
    return difference({each: means.get(each, {}) for each in (name, against)}, name, against)


def effects(records: Sequence[Mapping[str, Any]], measure: str = "mean top-1") -> dict[str, dict[str, Any]]:
    """The :func:`difference` of each configuration to its counterpart, in the order of the records."""
    means, differences = means_of(records, measure), {}
    for name, each in plan_of(records).items():
        other = each["against"]
        if other != name and means.get(name, {}).keys() & means.get(other, {}).keys():
            differences[name] = difference(means, name, other)
    return differences


def in_points(effect: Mapping[str, Any]) -> str:
    """A :func:`difference` for a table, such as "+1.2 (-0.3 to +2.7)"; without an interval where it has none."""
    spread = f" ({effect['low']:+.1f} to {effect['high']:+.1f})" if "low" in effect else ""
    return f"{effect['value']:+.1f}{spread}"


def failures_of(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What befell the configurations that have records but not one mean: ``{name: "failed: ..."}``, on one line."""
    means = means_of(records)
    errors = {r["model"]["name"]: " ".join(r["error"].split()) for r in records if "error" in r}
    return {name: f"failed: {error}" for name, error in errors.items() if name not in means}


def ablation_table(records: Sequence[Mapping[str, Any]], *measures: str) -> str:
    """A Markdown table: ``measures`` over seeds, or the error of all, and the differences to each one's counterpart.

    They are some of ``MEASURES``, or of ``PHOTOGRAPH_MEASURES``.
    """
    means = {measure: means_of(records, measure) for measure in measures}
    effects_by_measure = {measure: effects(records, measure) for measure in measures}
    plan, failed, rows = plan_of(records), failures_of(records), []
    for name, each in plan.items():
        own = [failed[name] if name in failed else f"{statistics.fmean(means[m][name].values()):.1f}" for m in measures]
        differences = [effects_by_measure[measure].get(name) for measure in measures]
        against = plan[each["against"]]["title"] if differences[0] else ""
        points = [in_points(effect) if effect else "" for effect in differences]
        seeds = len(means[measures[0]].get(name, {}))
        rows.append([each["group"], each["title"], seeds, *own, against, *points])
    points = (f"points of {measure}" for measure in measures)
    return markdown(("question", "configuration", "seeds", *measures, "against", *points), rows)


def comparison_table(records: Sequence[Mapping[str, Any]], pairs: Iterable[tuple[str, str]], *measures: str) -> str:
    """A Markdown table: by how many points of ``measures`` the first of each of ``pairs`` is ahead of the second."""
    plan, means, rows = plan_of(records), [means_of(records, measure) for measure in measures], []
    for name, against in pairs:
        effects = [difference(each, name, against) for each in means]
        cells = [f"{in_points(effect)} {effect['verdict']}" for effect in effects]
        rows.append([plan[name]["title"], plan[against]["title"], effects[0]["n"], *cells])
    return markdown(("configuration", "against", "seeds", *(f"points of {each}" for each in measures)), rows)


def claims_table(studies: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A Markdown table of the course's main differences with both intervals, and kd as a share of its teacher.

    ``studies`` are the records of scenes, recipes and photographs by these names.
    """
    photographs = [record for record in studies["photographs"] if record["dataset"] not in MORE_SETS]
    chosen = [record for record in photographs if record["task"] == "choice"]
    what, names = "three phases - feature alone", ("magnitude-crops-80", "feature-crops-80")
    claims = {(what, f"scenes to choose by, {key}"): (means_of(studies["recipes"], key), *names) for key in MEASURES}
    for key in PHOTOGRAPH_MEASURES:
        claims[what, f"photographs to choose by, {key}"] = (means_of(chosen, key), "kd", "kd-feature")
    drawn, taken, retrieval = by_model(studies["scenes"]), by_model(photographs), by_model(photographs, "retrieval")
    reported = {
        "scenes, mean top-1": drawn,
        "scenes, colour-shape": {"colour-shape": drawn["colour-shape"]},
        "photographs, R@5": retrieval,
        "photographs, mean top-1 of four sets": taken,
        "photographs, mean of these five numbers": taken | retrieval,
    }
    claims |= {("kd - base", where): (set_means(groups), "kd", "base") for where, groups in reported.items()}
    rows = []
    for (what, where), claim in claims.items():
        alone, pooled = paired_difference(*claim), difference(*claim)
        rows.append([what, where, alone["n"], in_points(alone), in_points(pooled)])
    table = markdown(("difference", "measured on", "seeds", "points, paired", "points, pooled scatter"), rows)
    six = set_means({name: models for name, models in drawn.items() if name != "relation"})
    shares = [100 * value / six["teacher"][0] for value in six["kd"].values()]
    share, span = statistics.fmean(shares), f"{min(shares):.1f} to {max(shares):.1f}"
    words = "kd as a share of its teacher, mean top-1 of six sets of scenes without relation"
    return f"{table}\n\n{words}: {share:.1f} % ({span} over {len(shares)} seeds)."


def offsets_of_labels(marks: np.ndarray) -> list[np.ndarray]:
    """Where to centre the label of each mark (N, 2), relative to it, away from marks and labels; typographic points."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)[:, None]
    around = np.concatenate([r * np.hstack([1.2 * np.cos(angles), np.sin(angles)]) for r in (9, 11, 14)])
    taken, offsets = list(marks), []
    for mark in marks:
        away = np.abs((mark + around)[:, None] - taken) / (1.4, 1)  # labels are wider than high
        offsets.append(around[np.hypot(*away.T).min(0).clip(max=8.5).argmax()])  # the nearest with enough room
        taken.append(mark + offsets[-1])
    return offsets


def _ships(configuration: Mapping[str, Any]) -> bool:
    """Whether a run of scenes had the settings that are the defaults, and no trial changed a function."""
    training, given = get_profile("cpu").training(), DEFAULTS | configuration
    own = {key: getattr(training, key) for key in ("learning_rate", "crop_scale", "views", "ema_decay")}
    ships = json.loads(json.dumps(asdict(DistillConfig()) | own))
    return "trial" not in given and all(given[key] == value for key, value in ships.items())


def recipe_figure(records: Sequence[Mapping[str, Any]], against: str = "feature") -> NotebookFigure:
    """Each configuration by what it adds to ``against``: points of R@10 over points of mean top-1, numbered.

    Hollow marks are of one seed, and a ring is around the recipe that ships. One that scores far less than the others
    is left out of the picture, and named below it.
    """
    plan, means = plan_of(records), [means_of(records, measure) for measure in ("mean top-1", "R@10")]
    others = [
        name for name, own in means[1].items() if name != against and own.keys() & means[1].get(against, {}).keys()
    ]
    gains = {name: [difference(each, name, against)["value"] for each in means] for name in others}
    near = {name: gain for name, gain in gains.items() if min(gain) > -10}
    fig = figure(8.3, max(4.0, 1.0 + 0.13 * len(near)))
    ax = fig.subplots()
    groups = list(dict.fromkeys(each["group"] for each in plan.values()))
    ships = {record["model"]["name"] for record in records if _ships(record["details"]["configuration"])}
    single = {name for name in near if difference(means[1], name, against)["n"] == 1}
    ax.margins(0.08)
    for number, (name, gain) in enumerate(near.items(), start=1):
        group = groups.index(plan[name]["group"])
        title = f"{number} {plan[name]['title']}"
        style = {"color": PALETTE[group % len(PALETTE)], "fillstyle": "none" if name in single else "full"}
        ax.plot(*gain, "o^sDvPX"[group % 7], **style, label=label(title, 48))
        if name in ships:
            ax.scatter(*gain, s=220, facecolor="none", edgecolor="black")
    scale = 350 / np.ptp(ax.get_xlim()), 300 / np.ptp(ax.get_ylim())  # about the size of the axes
    offsets = offsets_of_labels(np.reshape([*near.values()], (-1, 2)) * scale)
    for number, (gain, offset) in enumerate(zip(near.values(), offsets, strict=True), start=1):
        looks = {"ha": "center", "va": "center", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.2}}
        line = {"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        ax.annotate(str(number), gain, offset, textcoords="offset points", fontsize=8, arrowprops=line, **looks)
    ax.axhline(0, color="black", linewidth=1)
    ax.axvline(0, color="black", linewidth=1)
    far = [f"{plan[name]['title']} ({x:+.0f}, {y:+.0f})" for name, (x, y) in gains.items() if name not in near]
    note = "".join(f"\nfar outside: {each}" for each in far)
    title = plan[against]["title"]
    ax.set(xlabel=f"mean top-1 of seven sets, points above {title}{note}", ylabel=f"R@10, points above {title}")
    marks = {"hollow: one seed": single, "ringed: the recipe that ships": ships & near.keys()}
    legend = "; ".join(meaning for meaning, names in marks.items() if names)
    fig.legend(loc="outside right center", fontsize=7, title=legend, title_fontsize=7)
    ax.set_title("Up and to the right is better:\nwhat each recipe adds to copying embeddings alone")
    return fig


def ablation_figure(records: Sequence[Mapping[str, Any]]) -> NotebookFigure:
    """What :func:`ablation_table` says: means with a dot for each seed, and differences with their intervals."""
    means, plan, found, failed = means_of(records), plan_of(records), effects(records), failures_of(records)
    if not plan:
        raise ResultError("no records; run: python -m mclip study ablations")
    names, groups = list(plan), [each["group"] for each in plan.values()]
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
            colour, marker = VERDICTS[found[name]["verdict"]]
            look = {"fmt": marker, "color": colour, "markersize": 5, "capsize": 2}
            right.errorbar(found[name]["value"], row, xerr=whiskers([found[name]]), **look)
    for name, dash in (("base", ":"), ("kd", "--")):
        if name in means:
            level, title = statistics.fmean(means[name].values()), plan[name]["title"]
            left.axvline(level, color="black", linestyle=dash, linewidth=1, label=title)
    for ax in (left, right):
        ax.grid(False, axis="y")
        for row, (above, below) in enumerate(pairwise(groups)):
            if above != below:
                ax.axhline(row + 0.5, color=PALETTE[7], linewidth=0.6)
    name_rows(left, [plan[name]["title"] for name in names])
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set(title="Mean of seven sets, a dot for each seed", xlabel="zero-shot top-1 (%)", xlim=(0, None))
    right.axvline(0, color="black", linewidth=1)
    interval = ", with 95 % interval" if any("low" in e for e in found.values()) else ""
    right.set(title="Against its counterpart", xlabel=f"difference (points){interval}")
    for verdict, (colour, marker) in VERDICTS.items():
        if verdict in {effect["verdict"] for effect in found.values()}:
            right.plot([], [], marker, color=colour, label=verdict)
    fig.legend(loc="outside lower center", ncols=6, columnspacing=1, handletextpad=0.4)
    fig.suptitle("Which parts of the recipe earn their place, at equal samples seen")
    return fig


def defect_costs(records: Records, healthy: Means) -> dict[str, list[float]]:
    """Points of mean top-1 that each trained defect costs, seed by seed, against the same training without it."""
    costs: dict[str, list[float]] = {}
    for record in records:
        other = healthy.get(record["details"]["experiment"]["against"], {})
        if "error" not in record and record["seed"] in other:
            costs.setdefault(record["model"]["name"], []).append(other[record["seed"]] - record["metrics"]["mean"])
    return costs


def defect_table(records: Sequence[Mapping[str, Any]], healthy: Means) -> str:
    """A Markdown table of all defects: what each does, what it costs or changes, and the test that catches it."""
    costs, rows = defect_costs(records, healthy), []
    firsts = {record["model"]["name"]: record for record in reversed(records)}
    for name, each in plan_of(records).items():
        first = firsts[name]
        if name in costs:
            points = ", ".join(f"{value:.1f}" for value in costs[name])
            cost = f"{statistics.fmean(costs[name]):.1f} points (by seed: {points})"
        elif "error" in first:
            cost = f"the training fails: {first['error']}"
        elif each["against"]:
            cost = "not measured without the defect"
        else:
            numbers = first["metrics"].items()
            cost = "; ".join(f"{what}: {v['healthy']:.3g} → {v['defective']:.3g}" for what, v in numbers)
        number = first["details"]["configuration"]["defect"]
        rows.append((number, each["title"], cost, ", ".join(f"`{check}`" for check in each["checks"])))
    return markdown(("", "defect", "what it costs", "the test that fails"), rows)


def defect_curves(records: Records, healthy: Records) -> NotebookFigure:
    """The training loss of each trained defect (dashed) beside that of the same training without it, seed 0."""
    first = [[r["details"] for r in rows if r["seed"] == 0 and "loss" in r["details"]] for rows in (records, healthy)]
    other = {details["experiment"]["name"]: details["loss"] for details in first[1]}
    own = [details for details in first[0] if details["experiment"]["against"] in other]
    if not own:
        command = "python -m mclip study ablations defects --seeds 1"
        raise ResultError(f"no training of seed 0 has ended both with a defect and without it; run: {command}")
    rows = -(-len(own) // 3)
    fig = figure(8.3, 0.9 + 1.75 * rows)
    axes = [fig.add_subplot(rows, 3, number) for number in range(1, len(own) + 1)]
    for ax, details in zip(axes, own, strict=True):
        experiment, number = details["experiment"], details["configuration"]["defect"]
        ax.plot(*zip(*details["loss"], strict=True), "--", color=PALETTE[1], linewidth=1, label="with the defect")
        ax.plot(*zip(*other[experiment["against"]], strict=True), color=PALETTE[0], linewidth=1, label="without")
        ax.set_title(f"{number}: {experiment['title'].split(':')[0]}", fontsize=9)
        ax.set(xlabel="step", ylabel="loss")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    fig.suptitle("Would you have seen it in the loss?")
    return fig
