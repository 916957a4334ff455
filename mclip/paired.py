"""Two models on the same pictures: where their answers differ, and whether that is more than luck.

A picture that is hard is hard for both, so the difference of two accuracies is known better than either of them.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mclip.files import content_key
from mclip.metrics import bootstrap_interval
from mclip.results import ResultError, make_result, save_result


def answers(hits: np.ndarray, truth: Sequence[Any]) -> dict[str, str]:
    """What a record keeps of single pictures: ``correct``, a bit for each, and ``pictures``, a key of the truth.

    Args:
        hits: (N,) whether each picture was classified rightly.
        truth: (N,) the right answers, which tell other pictures, or another order of them.
    """
    packed = base64.b64encode(np.packbits(np.asarray(hits, dtype=bool)).tobytes()).decode("ascii")
    return {"correct": packed, "pictures": content_key(list(truth))}


def correct_of(record: Mapping[str, Any]) -> np.ndarray:
    """Which pictures (N,) a zero-shot record counts as right; ResultError where it does not say."""
    name = f"{record['model']['name']} on {record['dataset']}"
    if "error" in record:
        raise ResultError(f"{name} failed ({record['error']}); there is nothing to compare.")
    if "correct" not in record.get("details", {}):
        raise ResultError(f"the record of {name} says nothing of single pictures; evaluate it again.")
    packed = np.frombuffer(base64.b64decode(record["details"]["correct"]), dtype=np.uint8)
    return np.unpackbits(packed, count=record["n"]).astype(bool)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided p-value of the exact test of McNemar (1947), from the pictures that one model alone got right.

    If neither model is better, each of these is as likely to be the first one's as the second one's: their
    number is binomial with probability 1/2.
    """
    discordant, term, tail = first_only + second_only, 1, 1
    for k in range(min(first_only, second_only)):
        term = term * (discordant - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**discordant)


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The record, of task "paired", of two zero-shot records of the same pictures and prompts.

    Its metrics are ``difference``, first minus second in points of top-1 with the 95 % interval of a bootstrap over
    pictures; ``p_value`` of :func:`mcnemar`; and ``first_only`` and ``second_only``, the pictures that decide it.
    All of this is about the pictures: how far training with another seed would move either model, it cannot say.
    """
    start = time.perf_counter()
    hits, others = correct_of(first), correct_of(second)
    for key in ("dataset", "split", "n", "templates"):
        if first[key] != second[key]:
            raise ResultError(
                f"{key}={first[key]!r} against {second[key]!r}: compare on the same pictures and prompts."
            )
    if first["details"]["pictures"] != second["details"]["pictures"]:
        raise ResultError(f"{first['dataset']}: the two records are of other pictures, or in another order.")
    difference = bootstrap_interval(hits.astype(float) - others, first["seed"])
    only = int((hits & ~others).sum()), int((others & ~hits).sum())
    metrics = {
        "difference": dict(zip(("value", "low", "high"), (100 * x for x in difference), strict=True)),
        "p_value": mcnemar(*only),
        "first_only": only[0],
        "second_only": only[1],
    }
    return make_result(
        "paired", first["dataset"], first["split"], first["n"], first["model"], metrics, templates=first["templates"],
        seed=first["seed"], seconds=time.perf_counter() - start, details={"against": second["model"]},
    )  # fmt: skip


def compare_all(
    records: Iterable[Mapping[str, Any]],
    first: str = "kd",
    second: str = "base",
    save_results: str | Path | None = None,
) -> list[dict[str, Any]]:
    """:func:`compare` of the models called ``first`` and ``second`` on every set where both have a number."""
    measured = {(r["model"]["name"], r["dataset"]): r for r in records if r["task"] == "zero_shot" and "error" not in r}
    sets = [dataset for name, dataset in measured if name == first and (second, dataset) in measured]
    found = [compare(measured[first, dataset], measured[second, dataset]) for dataset in sets]
    for record in found if save_results else ():
        save_result(Path(save_results) / f"paired_{record['dataset']}_{first}-{second}.json", record)
    return found


def describe(record: Mapping[str, Any]) -> str:
    """A "paired" record in a line: "+70.3 points (68.2 to 72.4), p < 0.001, n=2000 (1412 against 6)"."""
    metrics, p = record["metrics"], record["metrics"]["p_value"]
    points = "{value:+.1f} points ({low:+.1f} to {high:+.1f})".format(**metrics["difference"])
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"{points}, {shown}, n={record['n']} ({metrics['first_only']} against {metrics['second_only']})"
