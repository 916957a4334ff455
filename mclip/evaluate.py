"""Zero-shot classification and retrieval of a model, from pictures and prompts to a results record."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mclip.config import require
from mclip.data import Pairs
from mclip.data import normalise as normalise
from mclip.datasets import ZeroShotSet as ZeroShotSet
from mclip.embed import BATCH_SIZE, evaluating
from mclip.embed import device_of as device_of
from mclip.embed import embed_images as embed_images
from mclip.embed import embed_texts as embed_texts
from mclip.metrics import class_ranks, rank_metrics, retrieval, zero_shot_metrics
from mclip.paired import answers
from mclip.results import describe_model, make_result

if TYPE_CHECKING:
    from mclip.deployed import Deployed


def as_templates(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several, as templates: "a photo of a" becomes "a photo of a {}"."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    require(len(prompts) > 0, "prompt", prompt, 'give a text, for example "a photo of a"')
    templates = [p if "{}" in p else f"{p} {{}}".strip() for p in prompts]
    for template in templates:
        require(template.count("{}") == 1, "prompt", template, 'the class name has one place, "{}"')
    return templates


def build_classifier(
    model: nn.Module, tokenizer: Any, class_names: Sequence[str], templates: str | Sequence[str]
) -> Tensor:
    """Class embeddings (d, n_classes): each the mean of its normalised prompt embeddings, normalised again.

    The ensemble of Radford et al. 2021, section 3.1.4.
    """
    templates = as_templates(templates)
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    embeddings = embed_texts(model, tokenizer, prompts).view(len(class_names), len(templates), -1)
    return F.normalize(embeddings.mean(1), dim=-1).T


def zero_shot(
    model: nn.Module,
    tokenizer: Any,
    images: Tensor | Iterable[Tensor],
    labels: Tensor,
    class_names: Sequence[str],
    templates: str | Sequence[str],
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> dict[str, Any]:
    """:func:`zero_shot_metrics` of float pictures prepared for the model: one (N, 3, S, S), or batches."""
    classifier = build_classifier(model, tokenizer, class_names, templates)
    batches = images.split(batch_size) if isinstance(images, Tensor) else images
    with evaluating(model) as device:
        parts = [model.encode_image(batch.to(device), normalize=True).float().cpu() for batch in batches]
    return zero_shot_metrics(torch.cat(parts), classifier, labels.cpu(), class_names, seed)


def evaluate_zero_shot(
    model: nn.Module,
    tokenizer: Any,
    dataset: ZeroShotSet,
    name: str,
    *,
    prompt: str | Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    workers: int = 0,
    embeddings: Tensor | None = None,
) -> dict[str, Any]:
    """The results record of ``model``, called ``name``, on ``dataset``.

    ``prompt``, one or several, replaces the set's own templates. ``embeddings`` (N, d) are those of the set's
    pictures by :func:`embed_images`, where another set has the same pictures; the set must then bring its labels.
    """
    start, templates = time.perf_counter(), as_templates(dataset.templates if prompt is None else prompt)
    classifier = build_classifier(model, tokenizer, dataset.class_names, templates)
    found = None
    if embeddings is None:
        embeddings, found = embed_images(model, dataset.images, batch_size, workers)
    labels = found if dataset.labels is None else torch.as_tensor(dataset.labels).cpu()
    described = describe_model(name, model)
    return _record(dataset, templates, described, classifier, embeddings, labels, seed, start, device_of(model))


def evaluate_deployed(reader: Deployed, dataset: ZeroShotSet, name: str, *, seed: int = 0) -> dict[str, Any]:
    """The results record of an exported student: preparation, tokens and graphs are those that a device has.

    The pictures of ``dataset`` are an array (N, 3, H, W), and their labels are known. The record's SHA-256 is over
    those of both graphs.
    """
    start, templates = time.perf_counter(), as_templates(dataset.templates)
    classifier = torch.from_numpy(reader.classifier(dataset.class_names, templates))
    embeddings = torch.from_numpy(reader.encode_images(np.asarray(dataset.images).transpose(0, 2, 3, 1)))
    graphs = "".join(reader.manifest["files"][graph]["sha256"] for graph in reader.graphs)
    described = {**reader.manifest["model"], "name": name, "sha256": hashlib.sha256(graphs.encode()).hexdigest()}
    labels = torch.as_tensor(dataset.labels)
    return _record(dataset, templates, described, classifier, embeddings, labels, seed, start, "cpu")


def _record(
    dataset: ZeroShotSet,
    templates: list[str],
    described: dict[str, Any],
    classifier: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    seed: int,
    start: float,
    device: torch.device | str,
) -> dict[str, Any]:
    ranks = class_ranks(embeddings, classifier, labels)
    metrics = rank_metrics(ranks, labels, dataset.class_names, seed)
    return make_result(
        "zero_shot",
        dataset.name,
        dataset.split,
        len(labels),
        described,
        metrics,
        templates=templates,
        seed=seed,
        seconds=time.perf_counter() - start,
        device=device,
        details={"metric": dataset.metric, **answers(ranks < 1, labels.tolist())},
    )


def evaluate_retrieval(
    model: nn.Module,
    tokenizer: Any,
    pairs: Pairs,
    name: str,
    *,
    split: str = "val",
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> dict[str, Any]:
    """The results record of retrieval both ways between the pictures of ``pairs`` and all their captions."""
    start = time.perf_counter()
    owner = torch.tensor([i for i, own in enumerate(pairs.captions) for _ in own])
    texts = embed_texts(model, tokenizer, [text for own in pairs.captions for text in own])
    images, _ = embed_images(model, pairs.images, batch_size)
    metrics, seconds = retrieval(images, texts, owner, seed), time.perf_counter() - start
    return make_result(
        "retrieval",
        pairs.name,
        split,
        len(pairs),
        describe_model(name, model),
        metrics,
        seed=seed,
        seconds=seconds,
        device=device_of(model),
    )
