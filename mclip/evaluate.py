"""Embeddings of pictures and texts by a model, in batches.

A model is anything with open_clip's ``encode_image(images, normalize=True)`` and
``encode_text(tokens, normalize=True)``.
"""

from __future__ import annotations

import hashlib
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import get_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mclip.config import ConfigError, require
from mclip.metrics import (
    EvaluationError,
    answers,
    class_ranks,
    rank_metrics,
    require_finite,
    retrieval,
    zero_shot_metrics,
)
from mclip.pairs import Pairs, normalise
from mclip.pictures import UNREADABLE, PictureError, as_rgb
from mclip.results import describe_model, make_result

if TYPE_CHECKING:
    from mclip.deploy.reader import Deployed
from dataclasses import dataclass

BATCH_SIZE = 128  # beyond it the feature maps leave a processor's cache: 256 is slower on two cores


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


def embed_texts(model: nn.Module, tokenizer: Any, texts: Sequence[str], batch_size: int = 512) -> Tensor:
    """Normalised float32 embeddings (N, d) on the CPU.

    ``tokenizer`` is the model's own: prompts must be cleaned as the captions that it was trained on.
    ConfigError if there are none.
    """
    require(len(texts) > 0, "texts", texts, "give at least one")
    embeddings = []
    with evaluating(model) as device:
        for start in range(0, len(texts), batch_size):
            tokens = tokenizer(list(texts[start : start + batch_size])).to(device)
            embeddings.append(model.encode_text(tokens, normalize=True).float().cpu())
    return require_finite(torch.cat(embeddings), "text")


def image_size_of(model: nn.Module) -> int:
    """Side of the pictures that the model reads, in pixels."""
    return input_of(model)[0]


def preprocess_of(model: nn.Module) -> Callable[[Image], Tensor]:
    """The model's own transform for evaluation: PIL picture -> (3, S, S)."""
    return input_of(model)[3]


def input_of(model: nn.Module) -> tuple[int, Sequence[float], Sequence[float], Any]:
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
            picture = as_rgb(picture)
        except PictureError as error:  # which names the file
            raise EvaluationError(f"{error}.") from error
        except UNREADABLE as error:
            samples = getattr(self.images, "samples", None)
            where = samples[index][0] if samples else f"picture {index}"
            raise EvaluationError(f"{where}: not readable as a picture ({error}).") from error
        try:
            number = operator.index(label)
        except TypeError:
            raise ConfigError(f"labels={label!r} cannot work: give class numbers as whole numbers.") from None
        return self.transform(picture), number


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
    size, mean, std, transform = input_of(model)
    if not hasattr(images, "shape"):
        yield from DataLoader(_Prepared(images, transform), batch_size, num_workers=workers)
        return
    valid = images.dtype in (torch.uint8, np.uint8) and len(images.shape) == 4 and images.shape[1] == 3
    require(valid, "images", f"{images.dtype} {tuple(images.shape)}", "give uint8 pictures (N, 3, H, W)")
    for start in range(0, len(images), batch_size):
        batch = torch.tensor(np.asarray(images[start : start + batch_size]))  # a copy: the file may be mapped
        yield normalise(batch, size, mean, std), torch.full((len(batch),), -1)


def embed_images(
    model: nn.Module, images: Any, batch_size: int = BATCH_SIZE, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Normalised float32 embeddings (N, d) on the CPU, and the labels (N,) that came with the pictures.

    ``images`` as in :class:`~mclip.datasets.ZeroShotSet`, or :class:`~mclip.pictures.Pictures`, which are decoded a
    batch at a time; the model's own preparation is applied. A picture without a label has -1.

    Raises: ConfigError for none, or arrays of another kind; EvaluationError, naming a picture that cannot be read.
    """
    require(len(images) > 0, "images", len(images), "give at least one picture")
    embeddings, labels = [], []
    with evaluating(model) as device, _naming_dead_workers():
        for batch, label in _batches(model, images, batch_size, workers):
            embeddings.append(model.encode_image(batch.to(device), normalize=True).float().cpu())
            labels.append(label)
    return require_finite(torch.cat(embeddings), "image"), torch.cat(labels)


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


@dataclass(frozen=True)
class ZeroShotSet:
    """Pictures to classify, and the words to classify them with.

    Attributes:
        images: uint8 tensor or array (N, 3, H, W), list of PIL pictures, or dataset of (PIL picture, label).
        labels: (N,) class numbers; None where ``images`` is a dataset that gives them.
        class_names: one name per class number.
        templates: prompts with "{}" in the place of the class name; several are averaged.
        metric: the one that the literature reports for this set: "top1" or "mean_per_class_recall".
    """

    name: str
    images: Tensor | np.ndarray | Sequence[Image] | Dataset
    labels: Tensor | np.ndarray | None
    class_names: list[str]
    templates: list[str]
    split: str = "test"
    metric: str = "top1"

    def __post_init__(self) -> None:
        key, names = f"{self.name}.class_names", self.class_names
        require(len(self.images) > 0, f"{self.name}.images", self.images, "a test set needs a picture")
        different = len(set(names)) == len(names) or self.name == "imagenet"  # CLIP has two missiles, two sunglasses
        require(different and len(names) > 1, key, names, "give at least two names, all different")
