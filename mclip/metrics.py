"""Numbers from embeddings: top-k accuracy and retrieval recall, with their 95 % intervals.

Every decision is taken on cosine similarities: a softmax of 100 cos underflows in float32 and invents ties.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mclip.config import require
from mclip.files import content_key

CHUNK = 256  # queries ranked at a time: 256 x 25,000 similarities take 26 MB
RESAMPLES = 1000
Interval = tuple[float, float, float]  # a mean, and the lower and upper end of its 95 % interval


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

    Keys are ordered by falling similarity, equal ones by rising index.
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


def bootstrap_interval(values: Any, seed: int = 0, samples: int = RESAMPLES, weights: Any = None) -> Interval:
    """Mean of ``values`` (N,), weighted by ``weights`` (N,), and its bootstrap percentiles (Efron 1979).

    A resample's mean depends only on how often each distinct (value, weight) is drawn: these counts are multinomial.
    """
    values = np.asarray(values, dtype=np.float64)
    require(values.ndim == 1 and len(values) > 0, "values", values.shape, "give a list of at least one value")
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    pairs, counts = np.unique(np.stack([values, weights]), axis=1, return_counts=True)
    mean = float(np.average(pairs[0], weights=pairs[1] * counts))
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=samples) * pairs[1]
    return _interval(mean, draws @ pairs[0] / draws.sum(1))


def _interval(mean: float, resampled: np.ndarray) -> Interval:
    low, high = np.quantile(resampled, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    return mean, min(float(low), mean), max(float(high), mean)  # rounding must not put the mean outside


def percent(interval: Interval) -> dict[str, float]:
    """An interval as records hold it, ``{"value", "low", "high"}`` in percent."""
    return dict(zip(("value", "low", "high"), (100 * x for x in interval), strict=True))


def class_ranks(images: Tensor, classifier: Tensor, labels: Tensor) -> np.ndarray:
    """How many classes come before the right one, (N,): embeddings (N, d), classifier (d, n_classes), labels (N,)."""
    n, classes = len(images), classifier.shape[1]
    require(len(labels) == n > 0, "labels", tuple(labels.shape), f"give one for each of {n} pictures")
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    require(whole, "labels", str(labels.dtype), "give class numbers as whole numbers, for example labels.long()")
    lowest, highest = int(labels.min()), int(labels.max())
    require(lowest >= 0 and highest < classes, "labels", (lowest, highest), f"class numbers are 0 to {classes - 1}")
    return first_hit_ranks(images, classifier.T.contiguous(), labels, torch.arange(classes)).numpy()


def rank_metrics(ranks: np.ndarray, labels: Tensor, class_names: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Metrics in percent of the ranks (N,) of :func:`class_ranks` and the labels (N,).

    ``top1``, ``top5`` (of more than five classes), ``mean_per_class_recall``, and ``per_class`` recall of the classes
    present, each with its interval; ``chance`` and ``n``. The bootstrap of the mean recall resamples within each class.
    """
    classes, truth, hits = len(class_names), labels.numpy(), ranks < 1
    metrics: dict[str, Any] = {"top1": percent(bootstrap_interval(hits, seed))}
    if classes > 5:
        metrics["top5"] = percent(bootstrap_interval(ranks < 5, seed))
    present, class_of, counts = np.unique(truth, return_inverse=True, return_counts=True)
    recall = np.bincount(class_of, hits) / counts
    resampled = np.random.default_rng(seed).binomial(counts, recall, size=(RESAMPLES, len(recall))) / counts
    metrics["mean_per_class_recall"] = percent(_interval(float(recall.mean()), resampled.mean(1)))
    metrics |= {"chance": 100 / classes, "n": len(ranks), "per_class": {}}
    for number in present:
        name = class_names[number]
        key = f"{name} ({number})" if name in metrics["per_class"] else name  # ImageNet has names that occur twice
        metrics["per_class"][key] = percent(bootstrap_interval(hits[truth == number], seed))
    return metrics


def zero_shot_metrics(
    images: Tensor, classifier: Tensor, labels: Tensor, class_names: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """:func:`rank_metrics` of image embeddings (N, d) with labels (N,) against a classifier (d, n_classes)."""
    return rank_metrics(class_ranks(images, classifier, labels), labels, class_names, seed)


def retrieval(image_emb: Tensor, text_emb: Tensor, owner: Tensor, seed: int = 0) -> dict[str, Any]:
    """Recall at k in percent, both ways: ``{"image_to_text": {"r1", "r5", "r10"}, "text_to_image": {...}}``.

    Embeddings (N, d) and (M, d) are normalised; ``owner`` (M,) is the picture of each caption. Any of a picture's
    captions counts. The bootstrap resamples pictures with their captions, which are not independent.
    """
    pictures = torch.arange(len(image_emb))
    caption_ranks = first_hit_ranks(image_emb, text_emb, pictures, owner).numpy()
    picture_ranks = first_hit_ranks(text_emb, image_emb, owner, pictures).numpy()
    captions = np.bincount(owner.numpy())
    recall: dict[str, Any] = {"image_to_text": {}, "text_to_image": {}}
    for k in (1, 5, 10):
        share = np.bincount(owner.numpy(), picture_ranks < k) / captions
        recall["image_to_text"][f"r{k}"] = percent(bootstrap_interval(caption_ranks < k, seed))
        recall["text_to_image"][f"r{k}"] = percent(bootstrap_interval(share, seed, weights=captions))
    return recall


def answers(hits: np.ndarray, truth: Sequence[Any]) -> dict[str, str]:
    """What a record keeps of single pictures: a bit for each of ``hits`` (N,), and a key of the ``truth`` (N,)."""
    packed = base64.b64encode(np.packbits(np.asarray(hits, dtype=bool)).tobytes()).decode("ascii")
    return {"correct": packed, "pictures": content_key(list(truth))}
