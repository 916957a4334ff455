"""Zero-shot classification and retrieval of a model, from pictures and prompts to a results record.

A model is anything with open_clip's ``encode_image(images, normalize=True)`` and
``encode_text(tokens, normalize=True)``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import get_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mclip.config import require
from mclip.data import Pairs, normalise
from mclip.datasets import ZeroShotSet
from mclip.metrics import EvaluationError, bootstrap_interval, require_finite, retrieval, zero_shot_metrics
from mclip.results import describe_model, make_result

__all__ = [
    "EvaluationError",
    "ZeroShotSet",
    "as_templates",
    "bootstrap_interval",
    "build_classifier",
    "device_of",
    "embed_images",
    "embed_texts",
    "evaluate_retrieval",
    "evaluate_zero_shot",
    "evaluating",
    "normalise",
    "retrieval",
    "zero_shot",
    "zero_shot_metrics",
]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode, no gradients; every submodule gets its own mode back. Yields the model's device."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield device_of(model)
    finally:
        for module, training in modes.items():
            module.training = training


def as_templates(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several, as templates: "a photo of a" becomes "a photo of a {}"."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    require(len(prompts) > 0, "prompt", prompt, 'give a text, for example "a photo of a"')
    templates = [p if "{}" in p else f"{p} {{}}".strip() for p in prompts]
    for template in templates:
        require(template.count("{}") == 1, "prompt", template, 'the class name has one place, "{}"')
    return templates


def embed_texts(model: nn.Module, tokenizer: Any, texts: Sequence[str], batch_size: int = 512) -> Tensor:
    """Normalised float32 embeddings (N, d) on the CPU.

    ``tokenizer`` is the model's own: prompts must be cleaned as the captions that it was trained on.
    """
    embeddings = []
    with evaluating(model) as device:
        for start in range(0, len(texts), batch_size):
            tokens = tokenizer(list(texts[start : start + batch_size])).to(device)
            embeddings.append(model.encode_text(tokens, normalize=True).float().cpu())
    return require_finite(torch.cat(embeddings), "text")


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


def _input_of(model: nn.Module) -> tuple[int, Sequence[float], Sequence[float], Any]:
    """Image size, mean and standard deviation that ``model`` expects, and its transform of PIL pictures."""
    if hasattr(model, "preprocess"):
        return model.config.image.image_size, model.MEAN, model.STD, model.preprocess
    settings = PreprocessCfg(**get_model_preprocess_cfg(model))
    size = settings.size if isinstance(settings.size, int) else settings.size[0]
    return size, settings.mean, settings.std, image_transform_v2(settings, is_train=False)


class _Prepared(Dataset):
    """PIL pictures, alone or with labels, as tensors; one that cannot be read is named."""

    def __init__(self, images: Any, transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            item = self.images[index]
            picture, label = item if isinstance(item, tuple) else (item, -1)
            return self.transform(picture.convert("RGB")), int(label)
        except OSError as error:
            samples = getattr(self.images, "samples", None)
            where = samples[index][0] if samples else f"picture {index}"
            raise EvaluationError(f"{where}: not readable as a picture ({error}).") from error


@contextmanager
def _naming_dead_workers() -> Iterator[None]:
    """EvaluationError for a DataLoader's process that died: PyTorch raises wherever the caller then is."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise EvaluationError(f"{error}; it read pictures: use fewer workers, or workers=0.") from error


def _batches(model: nn.Module, images: Any, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    size, mean, std, transform = _input_of(model)
    if not isinstance(images, Tensor | np.ndarray):
        yield from DataLoader(_Prepared(images, transform), batch_size, num_workers=workers)
        return
    valid = images.dtype in (torch.uint8, np.uint8) and images.ndim == 4 and images.shape[1] == 3
    require(valid, "images", f"{images.dtype} {tuple(images.shape)}", "give uint8 pictures (N, 3, H, W)")
    for start in range(0, len(images), batch_size):
        batch = torch.tensor(np.asarray(images[start : start + batch_size]))  # a copy: the file may be mapped
        yield normalise(batch, size, mean, std), torch.full((len(batch),), -1)


def embed_images(model: nn.Module, images: Any, batch_size: int = 256, workers: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised float32 embeddings (N, d) on the CPU, and the labels (N,) that came with the pictures.

    ``images`` as in :class:`~mclip.datasets.ZeroShotSet`; the model's own preparation is applied. A picture
    without a label has -1.
    """
    embeddings, labels = [], []
    with evaluating(model) as device, _naming_dead_workers():
        for batch, label in _batches(model, images, batch_size, workers):
            embeddings.append(model.encode_image(batch.to(device), normalize=True).float().cpu())
            labels.append(label)
    return require_finite(torch.cat(embeddings), "image"), torch.cat(labels)


def zero_shot(
    model: nn.Module,
    tokenizer: Any,
    images: Tensor | Iterable[Tensor],
    labels: Tensor,
    class_names: Sequence[str],
    templates: str | Sequence[str],
    seed: int = 0,
    batch_size: int = 256,
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
    batch_size: int = 256,
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
    metrics = zero_shot_metrics(embeddings, classifier, labels, dataset.class_names, seed)
    seconds = time.perf_counter() - start
    return make_result(
        "zero_shot",
        dataset.name,
        dataset.split,
        len(labels),
        describe_model(name, model),
        metrics,
        templates=templates,
        seed=seed,
        seconds=seconds,
        device=device_of(model),
    )


def evaluate_retrieval(
    model: nn.Module,
    tokenizer: Any,
    pairs: Pairs,
    name: str,
    *,
    split: str = "val",
    seed: int = 0,
    batch_size: int = 256,
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
