"""Tables made from results records: grouped by dataset and model, and summed up over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mclip.metrics import over_seeds
from mclip.results import ResultError


def by_model(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list]]:
    """``{dataset: {model: [record of each seed]}}`` of the zero-shot records; failures leave models out."""
    groups: dict[str, dict[str, list]] = {}
    for record in records:
        if record["task"] != "zero_shot":
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
