"""Numbers from embeddings: top-k accuracy, retrieval recall, their 95 % intervals, and the comparison of two models.

Every decision is taken on cosine similarities: a softmax of 100 cos underflows in float32 and invents ties.
"""

from __future__ import annotations

import base64
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import bdtr, stdtrit
from torch import Tensor

from mclip.config import require
from mclip.files import content_key
from mclip.results import ResultError, make_result

CHUNK = 256  # queries ranked at a time: 256 x 25,000 similarities take 26 MB
RESAMPLES = 1000


class EvaluationError(ValueError):
    """A measurement that cannot be made; to be recorded as a failure, never as a number."""


def require_finite(embeddings: Tensor, what: str) -> Tensor:
    """``embeddings`` (N, d), or :class:`EvaluationError`: NaN compares false, so it would rank first."""
    bad = int((~embeddings.isfinite().all(1)).sum())
    if bad:
        raise EvaluationError(f"{bad} of {len(embeddings)} {what} embeddings are not finite; it diverged.")
    return embeddings


def first_hit_ranks(queries: Tensor, keys: Tensor, query_groups: Tensor, key_groups: Tensor) -> Tensor:
    """How many keys (M, d) come before the best key of each query's (N, d) own group, (N,): 0 is a top-1 hit.

    Keys are ordered by falling similarity, equal ones by rising index. Works through CHUNK queries at a time.
    ConfigError if there is no query or no key.
    """
    require(len(queries) > 0 and len(keys) > 0, "queries, keys", (len(queries), len(keys)), "give at least one of each")
    require_finite(queries, "query")
    require_finite(keys, "key")
    index, ranks = torch.arange(len(keys)), []
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ keys.T
        own = query_groups[start : start + CHUNK, None] == key_groups[None, :]
        if not own.any(1).all():
            query = start + int((~own.any(1)).nonzero()[0])
            raise EvaluationError(f"query {query} has no key of its own group, {int(query_groups[query])}.")
        best, position = scores.masked_fill(~own, -torch.inf).max(1, keepdim=True)
        ranks.append(((scores > best) | ((scores == best) & (index < position))).sum(1))
    return torch.cat(ranks)


def bootstrap_interval(
    values: Any, seed: int = 0, samples: int = RESAMPLES, weights: Any = None
) -> tuple[float, float, float]:
    """Mean of ``values`` (N,), weighted by ``weights`` (N,), and its bootstrap percentiles (Efron 1979).

    The mean of a resample depends only on how often each distinct (value, weight) is drawn, and these counts
    are multinomial: for hits and misses that is one binomial number instead of N draws. Where all values are
    equal the interval has no width, however small N is.
    """
    values = np.asarray(values, dtype=np.float64)
    require(values.ndim == 1 and len(values) > 0, "values", values.shape, "give a list of at least one value")
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    pairs, counts = np.unique(np.stack([values, weights]), axis=1, return_counts=True)
    mean = float(np.average(pairs[0], weights=pairs[1] * counts))
    rng, means = np.random.default_rng(seed), []
    step = max(1, 4_000_000 // len(counts))
    for start in range(0, samples, step):
        draws = rng.multinomial(len(values), counts / len(values), size=min(step, samples - start)) * pairs[1]
        means.append(draws @ pairs[0] / draws.sum(1))
    return _interval(mean, np.concatenate(means))


def _interval(mean: float, resampled: np.ndarray) -> tuple[float, float, float]:
    low, high = np.quantile(resampled, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    return mean, min(float(low), mean), max(float(high), mean)  # rounding must not put the mean outside


def _percent(interval: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), (100 * x for x in interval), strict=True))


def _mean_recall(hits: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    """Recall averaged over the classes present; the bootstrap resamples within each class."""
    counts = np.bincount(labels)
    present, rng = counts > 0, np.random.default_rng(seed)
    recall = np.bincount(labels, hits)[present] / counts[present]
    resampled = rng.binomial(counts[present], recall, size=(RESAMPLES, len(recall))) / counts[present]
    return _percent(_interval(float(recall.mean()), resampled.mean(1)))


def student_quantile(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t: how many standard errors an interval reaches to either side."""
    return float(stdtrit(freedom, 0.975))


def over_seeds(intervals: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One interval stays; those of several seeds give their mean and Student's 95 % interval.

    In percent, cut at 0 and 100. With several seeds it covers the noise of training, on this test set.
    """
    if len(intervals) == 1:
        return dict(intervals[0])
    values = [interval["value"] for interval in intervals]
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = student_quantile(len(values) - 1) * error
    return {"value": mean, "low": max(0.0, mean - half), "high": min(100.0, mean + half)}


def class_ranks(images: Tensor, classifier: Tensor, labels: Tensor) -> np.ndarray:
    """How many classes come before the right one, (N,): embeddings (N, d), classifier (d, n_classes), labels (N,).

    ConfigError for labels that are no whole numbers, or no classes.
    """
    n, classes = len(images), classifier.shape[1]
    require(len(labels) == n > 0, "labels", tuple(labels.shape), f"give one for each of {n} pictures")
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    require(whole, "labels", str(labels.dtype), "give class numbers as whole numbers, for example labels.long()")
    bounds = int(labels.min()), int(labels.max())
    inside = bounds[0] >= 0 and bounds[1] < classes
    require(inside, "labels", bounds, f"class numbers are 0 to {classes - 1}")
    return first_hit_ranks(images, classifier.T.contiguous(), labels, torch.arange(classes)).numpy()


def rank_metrics(ranks: np.ndarray, labels: Tensor, class_names: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Metrics in percent of the ranks (N,) of :func:`class_ranks` and the labels (N,).

    ``top1``, ``top5`` (left out for five classes or fewer, where it says nothing), ``mean_per_class_recall``,
    each with its interval; ``chance``; ``n``; and ``per_class`` recall of the classes present.
    """
    classes, truth, hits = len(class_names), labels.numpy(), ranks < 1
    metrics: dict[str, Any] = {"top1": _percent(bootstrap_interval(hits, seed))}
    if classes > 5:
        metrics["top5"] = _percent(bootstrap_interval(ranks < 5, seed))
    metrics["mean_per_class_recall"] = _mean_recall(hits, truth, seed)
    metrics |= {"chance": 100 / classes, "n": len(ranks), "per_class": {}}
    for number in np.unique(truth):
        name = class_names[number]
        key = f"{name} ({number})" if name in metrics["per_class"] else name  # ImageNet has names that occur twice
        metrics["per_class"][key] = _percent(bootstrap_interval(hits[truth == number], seed))
    return metrics


def zero_shot_metrics(
    images: Tensor, classifier: Tensor, labels: Tensor, class_names: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """:func:`rank_metrics` of image embeddings (N, d) with labels (N,) against a classifier (d, n_classes)."""
    return rank_metrics(class_ranks(images, classifier, labels), labels, class_names, seed)


def retrieval(image_emb: Tensor, text_emb: Tensor, text_to_image: Tensor, seed: int = 0) -> dict[str, Any]:
    """Recall at k in percent, both ways: ``{"image_to_text": {"r1", "r5", "r10"}, "text_to_image": {...}}``.

    A picture counts as found if any of its captions is among the first k. The bootstrap resamples pictures
    together with their captions, because captions of one picture are not independent.

    Args:
        image_emb: (N, d) normalised embeddings.
        text_emb: (M, d) normalised embeddings.
        text_to_image: (M,) the picture of each caption.
    """
    image_emb, text_emb, owner = image_emb.float().cpu(), text_emb.float().cpu(), text_to_image.cpu()
    pictures = torch.arange(len(image_emb))
    found = first_hit_ranks(image_emb, text_emb, pictures, owner).numpy()
    placed = first_hit_ranks(text_emb, image_emb, owner, pictures).numpy()
    captions = np.bincount(owner.numpy())
    both: dict[str, Any] = {"image_to_text": {}, "text_to_image": {}}
    for k in (1, 5, 10):
        share = np.bincount(owner.numpy(), placed < k) / captions
        both["image_to_text"][f"r{k}"] = _percent(bootstrap_interval(found < k, seed))
        both["text_to_image"][f"r{k}"] = _percent(bootstrap_interval(share, seed, weights=captions))
    return both


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
    return min(1.0, 2 * float(bdtr(min(first_only, second_only), first_only + second_only, 0.5)))


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
        "difference": _percent(difference),
        "p_value": mcnemar(*only),
        "first_only": only[0],
        "second_only": only[1],
    }
    return make_result(
        "paired",
        first["dataset"],
        first["split"],
        first["n"],
        first["model"],
        metrics,
        templates=first["templates"],
        seed=first["seed"],
        seconds=time.perf_counter() - start,
        details={"against": second["model"]},
    )


def describe(record: Mapping[str, Any]) -> str:
    """A "paired" record in a line: "+70.3 points (68.2 to 72.4), p < 0.001, n=2000 (1412 against 6)"."""
    metrics, p = record["metrics"], record["metrics"]["p_value"]
    points = "{value:+.1f} points ({low:+.1f} to {high:+.1f})".format(**metrics["difference"])
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"{points}, {shown}, n={record['n']} ({metrics['first_only']} against {metrics['second_only']})"
