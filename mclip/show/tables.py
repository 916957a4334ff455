"""Tables made from results records: grouped by dataset and model, and summed up over seeds."""

from __future__ import annotations

import csv
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mclip.files import DATA
from mclip.metrics import describe, over_seeds
from mclip.results import ResultError, load_results


def read_published(path: str | Path) -> dict[str, dict[str, dict[str, float]]]:
    """``{dataset: {model: {"value"}}}``, percent, of a CSV with the columns model, dataset, top1, source."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    with Path(path).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            table.setdefault(row["dataset"], {})[row["model"]] = {"value": float(row["top1"])}
    return table


def by_model(records: Iterable[Mapping[str, Any]], task: str = "zero_shot") -> dict[str, dict[str, list]]:
    """``{dataset: {model: [record of each seed]}}`` of the records of ``task``; failures leave models out.

    ResultError for a seed that a model has twice on one dataset.
    """
    groups: dict[str, dict[str, list]] = {}
    for record in records:
        if record["task"] != task:
            continue
        dataset, model, seed = record["dataset"], record["model"]["name"], record["seed"]
        models = groups.setdefault(dataset, {})
        if "error" in record:
            continue
        group = models.setdefault(model, [])
        if seed in [other["seed"] for other in group]:
            raise ResultError(f"seed={seed} is not valid: {model} on {dataset} has two records with it; keep one.")
        group.append(record)
    return groups


def zero_shot_table(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """``{dataset: {model: {"top1", "low", "high", "n"}}}`` in percent, over seeds as :func:`over_seeds` does.

    A failed measurement has no entry: it is not a zero.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for dataset, models in by_model(records).items():
        for model, group in models.items():
            top1 = over_seeds([record["metrics"]["top1"] for record in group])
            table.setdefault(dataset, {})[model] = {
                "top1": top1["value"],
                "low": top1["low"],
                "high": top1["high"],
                "n": group[0]["n"],
            }
    return table


def retrieval_table(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """``{"image to text, R@5": {model: {"value", "low", "high"}}}`` in percent, over seeds.

    Of several datasets each row begins with its own: ``"flickr8k, image to text, R@5"``. Failures have no entry.
    """
    groups = by_model(records, "retrieval")
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for dataset, models in groups.items():
        for model, group in models.items():
            for way, recalls in group[0]["metrics"].items():
                for key in recalls:
                    row = f"{dataset}, " * (len(groups) > 1) + f"{way.replace('_', ' ')}, R@{key[1:]}"
                    recall = over_seeds([record["metrics"][way][key] for record in group])
                    table.setdefault(row, {})[model] = recall
    return table


def markdown_table(table: Mapping[str, Mapping[str, Mapping[str, float]]], models: Iterable[str]) -> str:
    """A Markdown table of percentages with their intervals: a row for each key, a column for each model."""
    models = list(models)
    lines = [f"| % | {' | '.join(models)} |", "|" + "---|" * (len(models) + 1)]
    for row, values in table.items():
        shown = [values.get(model) for model in models]
        cells = [f"{v.get('value', v.get('top1')):.1f} ({v['low']:.1f}-{v['high']:.1f})" if v else "" for v in shown]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def paired_table(records: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of the records of task "paired": a row for each set, a column for each seed."""
    rows: dict[str, dict[int, str]] = {}
    for record in records:
        if record["task"] == "paired":
            rows.setdefault(record["dataset"], {})[record["seed"]] = describe(record)
    seeds = sorted({seed for row in rows.values() for seed in row})
    lines = ["|".join(["| kd - base ", *(f" seed {seed} " for seed in seeds), ""]), "|" + "---|" * (len(seeds) + 1)]
    lines += [f"| {name} | {' | '.join(row.get(seed, '') for seed in seeds)} |" for name, row in rows.items()]
    return "\n".join(lines)


def reached(value: float, aim: str) -> str:
    """Whether ``value`` keeps to an ``aim`` such as "at least 20" or "at most 1.3": yes or no; "" where it is ""."""
    if not aim:
        return ""
    side, _, limit = aim.rpartition(" ")
    return "yes" if {"at least": operator.ge, "at most": operator.le}[side](value, float(limit)) else "no"


def bench_table(parts: Mapping[str, list[Mapping[str, Any]]]) -> str:
    """A Markdown table of the rows of ``bench.json``."""
    rows = [row for part in parts.values() for row in part]
    cells = [(r["what"], f"{r['value']:.4g} {r['unit']}", r["bar"], reached(r["value"], r["bar"])) for r in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(["| what | measured | aim | reached |", "|---|---|---|---|", *lines])


COST_SETS = {"COCO 2017": (118_287, 5, 30), "CC12M": (12_400_000, 1, 30)}
"""Pictures, captions of each, and passes."""


def cost_table(parts: Mapping[str, list[Mapping[str, Any]]]) -> str:
    """Hours on the machine of ``bench.json``, by the formula in the README: pictures x passes / pace."""
    pace = {row["key"]: row["value"] for part in parts.values() for row in part if "key" in row}
    lines = ["| | targets, hours | targets, GB | training, hours |", "|---|---|---|---|"]
    for name, (pictures, captions, passes) in COST_SETS.items():
        targets = pictures / pace["teacher pictures"] + pictures * captions / pace["teacher captions"]
        size = pictures * (1 + captions) * pace["bytes of a target"] / 1e9
        training = pictures * passes / pace["mobile-512"]
        lines.append(
            f"| {name}: {pictures:,} pictures, {passes} passes of `mobile-512` | {targets / 3600:,.1f} | "
            f"{size:,.2f} | {training / 3600:,.0f} |"
        )
    return "\n".join(lines)


def replace_block(text: str, name: str, block: str) -> str:
    """``text`` with what lies between ``<!-- name -->`` and the next ``<!-- end -->`` replaced by ``block``."""
    start, mark = text.find(f"<!-- {name} -->"), "<!-- end -->"
    end = text.find(mark, start)
    if start < 0 or end < 0:
        raise ResultError(f"no block <!-- {name} --> ... {mark} in the text; restore the two lines.")
    return f"{text[:start]}<!-- {name} -->\n{block}\n{text[end:]}"


def milliseconds(model: Mapping[str, Any], setting: str = "1 thread, batch 1") -> dict[str, float]:
    """Median latency of a model of ``efficiency.json``: image and text."""
    if setting not in model["latency"]:
        raise ResultError(f"latency={list(model['latency'])} lack {setting!r}; run: python -m mclip efficiency")
    return {half: numbers["median"] for half, numbers in model["latency"][setting].items()}


def efficiency_table(record: Mapping[str, Any]) -> str:
    """A Markdown table of the models of ``efficiency.json``, and how many times as long ViT-B/32 takes."""
    columns = (
        "",
        "parameters, M",
        "of them token table",
        "M-adds, image",
        "M-adds, text",
        "MB",
        "image, ms (p95)",
        "text, ms (p95)",
        "ViT-B/32 takes",
        "peak, MB",
    )
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    reference = sum(milliseconds(record["models"]["ViT-B-32"]).values())
    for name, model in record["models"].items():
        own, parts = milliseconds(model), model["parameters"]
        clock = model["latency"]["1 thread, batch 1"]
        adds = [f"{model['multiply_adds'][half] / 1e6:,.0f}" if model["multiply_adds"] else "" for half in own]
        shown = [f"{clock[half]['median']:.1f} ({clock[half]['p95']:.1f})" for half in own]
        peak = "" if record["memory"][name] is None else f"{record['memory'][name]:,.0f}"
        cells = [
            name,
            f"{parts['total'] / 1e6:.1f}",
            f"{parts['token table'] / 1e6:.1f}",
            *adds,
            f"{model['megabytes']:,.0f}",
            *shown,
            f"{reference / sum(own.values()):.1f} times",
            peak,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def efficiency_goals(record: Mapping[str, Any]) -> str:
    """A Markdown table of the aims: latency of ``mobile-256`` against the rivals', batch 1, one thread."""
    models = {name: milliseconds(model) for name, model in record["models"].items()}
    together = {name: sum(halves.values()) for name, halves in models.items()}
    rows = {
        "image and text, ViT-B/32 against mobile-256": (together["ViT-B-32"] / together["mobile-256"], 12),
        "image and text, MobileCLIP2-S0 against mobile-256": (together["MobileCLIP2-S0"] / together["mobile-256"], 8),
        "text of ten words, ViT-B/32 against mobile-256": (
            models["ViT-B-32"]["text"] / models["mobile-256"]["text"],
            15,
        ),
    }
    lines = ["| latency | measured | aim | reached |", "|---|---|---|---|"]
    for what, (value, aim) in rows.items():
        lines.append(f"| {what} | {value:.1f} times | at least {aim} | {reached(value, f'at least {aim}')} |")
    return "\n".join(lines)


def headline(records: Iterable[Mapping[str, Any]], cost: Mapping[str, Any]) -> str:
    """The sentences that open the README: what distillation gained, and what the small model costs."""
    records = list(records)
    classes = round(100 / by_model(records)["colour-shape"]["kd"][0]["metrics"]["chance"])
    top1 = {name: f"{row['top1']:.0f} %" for name, row in zero_shot_table(records)["colour-shape"].items()}
    models = cost["models"]
    small, large = (sum(milliseconds(models[name]).values()) for name in ("mobile-256", "ViT-B-32"))
    size = {name: f"{models[name]['megabytes']:.0f} MB" for name in ("mobile-256", "mobile-256, int8", "ViT-B-32")}
    return (
        f"Shown a drawn picture and the names of {classes} kinds of coloured shapes, the distilled student chooses the "
        f"right one in {top1['kd']} of cases, the same student without a teacher in {top1['base']}, the teacher in "
        f"{top1['teacher']}.\n"
        f"`mobile-256`, the size for a phone, takes {small:.1f} ms for a picture and a caption on one core of a CPU "
        f"where CLIP ViT-B/32 takes {large:.0f} ms, and {size['mobile-256']} of weights "
        f"({size['mobile-256, int8']} in int8) where that takes {size['ViT-B-32']}.\n"
        "These numbers, and all tables below, are written from `data/results` by `make figures`."
    )


def scene_results() -> list[dict[str, Any]]:
    """The committed zero-shot and paired records on scenes, of all seeds."""
    folders = [DATA / "results" / "teacher", *sorted((DATA / "results").glob("seed-*"))]
    return [record for folder in folders if folder.is_dir() for record in load_results(folder)]
