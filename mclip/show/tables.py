"""Tables made from results records: grouped by dataset and model, and summed up over seeds."""

import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy.special import stdtrit
from scipy.stats import sem

from mclip.results import ResultError

Records = Iterable[Mapping[str, Any]]
ALONE = "1 thread, batch 1"
Groups = dict[str, dict[str, list[Mapping[str, Any]]]]
Scores = dict[str, dict[str, dict[str, float]]]  # {row: {model: {"value", "low", "high"}}}, in percent


def over_seeds(intervals: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One interval stays; those of several seeds give their mean and Student's 95 % interval, in percent."""
    if len(intervals) == 1:
        return dict(intervals[0])
    values = [interval["value"] for interval in intervals]
    mean, half = statistics.fmean(values), float(stdtrit(len(values) - 1, 0.975) * sem(values))
    return {"value": mean, "low": max(0.0, mean - half), "high": min(100.0, mean + half)}


def by_model(records: Records, task: str = "zero_shot") -> Groups:
    """``{dataset: {model: [record of each seed]}}`` of the records of ``task``; failures leave models out.

    ResultError for a seed that a model has twice on one dataset, and for seeds on different parts of it.
    """
    groups: Groups = {}
    for record in (record for record in records if record["task"] == task):
        dataset, model, seed = record["dataset"], record["model"]["name"], record["seed"]
        models = groups.setdefault(dataset, {})
        if "error" not in record:
            group = models.setdefault(model, [])
            if seed in [other["seed"] for other in group]:
                raise ResultError(f"seed={seed} is not valid: {model} on {dataset} has two records with it; keep one.")
            if group and record["split"] != group[0]["split"]:
                parts = f"{group[0]['split']!r} and {record['split']!r}"
                raise ResultError(f"split is not valid: {model} on {dataset} has records of {parts}; keep one part.")
            group.append(record)
    return groups


def score_of(record: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """The number by which a set judges a model: its name, and its value with the interval, in percent.

    Top-1 of a zero-shot record; of one of retrieval, recall at 5 of pictures by their captions.
    """
    if record["task"] == "retrieval":
        return "text to image R@5", record["metrics"]["text_to_image"]["r5"]
    return "top-1", record["metrics"]["top1"]


def chance_of(record: Mapping[str, Any]) -> float | None:
    """What guessing would make of :func:`score_of`, in percent; None where the record does not say."""
    return 100 * 5 / record["n"] if record["task"] == "retrieval" else record["metrics"].get("chance")


def scores_over_seeds(groups: Groups) -> Scores:
    """:func:`score_of` of each model on each dataset, over seeds as :func:`over_seeds` does."""
    return {
        dataset: {model: over_seeds([score_of(record)[1] for record in group]) for model, group in models.items()}
        for dataset, models in groups.items()
    }


def zero_shot_table(records: Records) -> Scores:
    """``{dataset: {model: {"value", "low", "high"}}}`` of top-1, over seeds.

    A failed measurement has no entry: it is not a zero.
    """
    return scores_over_seeds(by_model(records))


def retrieval_table(records: Records) -> Scores:
    """``{"image to text, R@5": {model: {"value", "low", "high"}}}`` in percent, over seeds.

    Of several datasets each row begins with its own: ``"flickr8k, image to text, R@5"``. Failures have no entry.
    """
    groups, table = by_model(records, "retrieval"), {}
    for dataset, models in groups.items():
        for model, group in models.items():
            for way, recalls in group[0]["metrics"].items():
                for key in recalls:
                    row = f"{dataset}, " * (len(groups) > 1) + f"{way.replace('_', ' ')}, R@{key[1:]}"
                    recall = over_seeds([record["metrics"][way][key] for record in group])
                    table.setdefault(row, {})[model] = recall
    return table


def markdown(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; a vertical bar in a cell is escaped."""
    lines = [list(header), *([str(cell).replace("|", r"\|") for cell in row] for row in rows)]
    first, *others = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, "|" + "---|" * len(lines[0]), *others])


def reached(value: float, aim: str) -> str:
    """Whether ``value`` keeps to an ``aim`` such as "at least 20" or "at most 1.3": yes or no; "" where it is ""."""
    if not aim:
        return ""
    side, _, limit = aim.rpartition(" ")
    return "yes" if {"at least": operator.ge, "at most": operator.le}[side](value, float(limit)) else "no"


def milliseconds(model: Mapping[str, Any]) -> dict[str, float]:
    """Median latency of a model of ``efficiency.json`` for one sample on one thread: image and text."""
    measured = model.get("latency", {})
    if ALONE not in measured:
        raise ResultError(f"latency={list(measured)} lack {ALONE!r}; run: python -m mclip efficiency")
    return {half: numbers["median"] for half, numbers in measured[ALONE].items()}


def efficiency_table(costs: Mapping[str, Any]) -> str:
    """A Markdown table of the models of ``efficiency.json``, and how many times as long ViT-B/32 takes."""
    millions = ("parameters, M", "of them token table", "M-adds, image", "M-adds, text")
    header = ("", *millions, "MB", "image, ms (p95)", "text, ms (p95)", "ViT-B/32 takes", "peak, MB")
    reference, rows = sum(milliseconds(costs["models"]["ViT-B-32"]).values()), []
    for name, model in costs["models"].items():
        clock, adds = model.get("latency", {}).get(ALONE, {}), model.get("multiply_adds", {})
        cells = [f"{model['parameters'][part] / 1e6:.1f}" for part in ("total", "token table")]
        cells += [f"{adds[half] / 1e6:,.0f}" if adds else "" for half in ("image", "text")]
        cells += [f"{model['megabytes']:,.0f}"]
        cells += [f"{numbers['median']:.1f} ({numbers['p95']:.1f})" for numbers in clock.values()] or ["", ""]
        cells += [f"{reference / sum(milliseconds(model).values()):.1f} times" if clock else ""]
        cells += [f"{costs['memory'][name]:,.0f}" if name in costs.get("memory", {}) else ""]
        rows.append([name, *cells])
    return markdown(header, rows)


def efficiency_goals(costs: Mapping[str, Any]) -> str:
    """A Markdown table of the aims: latency of our presets against the rivals', batch 1, one thread."""
    times = {name: sum(milliseconds(model).values()) for name, model in costs["models"].items()}
    text = {name: milliseconds(costs["models"][name])["text"] for name in ("ViT-B-32", "mobile-256")}
    ratios = {}
    for ours, aims in {"mobile-256": (12, 8), "pocket-256": (30, 20), "pocket-256, ONNX": (30, 20)}.items():
        for rival, aim in zip(("ViT-B-32", "MobileCLIP2-S0"), aims, strict=True):
            ratios[f"image and text, {rival} against {ours}"] = (times[rival] / times[ours], f"at least {aim}")
    ratios["text of ten words, ViT-B-32 against mobile-256"] = (text["ViT-B-32"] / text["mobile-256"], "at least 15")
    rows = [(what, f"{value:.1f} times", aim, reached(value, aim)) for what, (value, aim) in ratios.items()]
    return markdown(("latency", "measured", "aim", "reached"), rows)


def forms_table(forms: Mapping[str, Any]) -> str:
    """A Markdown table of the forms of a student of photographs, the record "forms" of ``efficiency.json``.

    For each set of photographs top-1, and in brackets how often the answer is PyTorch's, both in percent.
    """
    rows, sets = [], list(forms["PyTorch"]["top1"])
    header = ("", "MB", "image, ms (p95)", "text, ms (p95)", "cosine, image", "cosine, text", *sets)
    for form, row in forms.items():
        clock = ["{median:.2f} ({p95:.2f})".format(**row["latency"][half]) for half in ("image", "text")]
        cosines = [f"{row['cosine'][half]:.4f}" for half in ("image", "text")]
        answers = [f"{row['top1'][name]:.1f} ({row['same answer'][name]:.1f})" for name in sets]
        rows.append([form, f"{row['megabytes']:.2f}", *clock, *cosines, *answers])
    return markdown(header, rows)
