"""Embeddings of pictures and texts by a model, and the results records of zero-shot classification.

A model is anything with open_clip's ``encode_image`` and ``encode_text``.
"""

import ctypes
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import get_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose

from mclip.config import ConfigError, require
from mclip.metrics import answers, class_ranks, rank_metrics, require_finite
from mclip.pairs import normalise
from mclip.pictures import as_rgb, named, open_picture, pool
from mclip.results import describe_model, make_result

BATCH_SIZE = 128  # beyond it the feature maps leave a processor's cache: 256 is slower on two cores


@dataclass(frozen=True)
class ZeroShotSet:
    """Pictures to classify, and the words to classify them with."""

    name: str
    images: Any  # uint8 tensor or array (N, 3, H, W), list of PIL pictures, or dataset of (PIL picture, label)
    labels: Tensor | np.ndarray | None  # (N,) class numbers; None where ``images`` gives them
    class_names: list[str]  # one per class number
    templates: list[str]  # prompts with "{}" in the place of the class name; several are averaged
    split: str = "test"
    metric: str = "top1"  # what the literature reports for this set: this, or "mean_per_class_recall"

    def __post_init__(self) -> None:
        key, names = f"{self.name}.class_names", self.class_names
        different = len(set(names)) == len(names) or self.name == "imagenet"  # CLIP has two missiles, two sunglasses
        require(different and len(names) > 1, key, names, "give at least two names, all different")


class Input(NamedTuple):
    """What a model reads."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transform: Callable[[Image], Tensor]  # PIL picture -> (3, S, S)


def input_of(model: nn.Module) -> Input:
    """What ``model``, a student or open_clip's, reads in evaluation; its transform takes pictures of any mode."""
    if hasattr(model, "preprocess"):
        return Input(model.config.image.image_size, model.MEAN, model.STD, model.preprocess)
    settings = PreprocessCfg(**get_model_preprocess_cfg(model))
    size = settings.size if isinstance(settings.size, int) else settings.size[0]
    transform = Compose([open_picture, image_transform_v2(settings, is_train=False)])
    return Input(size, tuple(settings.mean), tuple(settings.std), transform)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are; the CPU for a model that has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode, no gradients; every submodule gets its own mode back. Yields the model's device."""
    keep_freed_memory()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield device_of(model)
    finally:
        for module, training in modes.items():
            module.training = training


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep what is freed; other systems have no such setting.

    Mapping the largest activations anew in every step takes as long as the arithmetic at 224 pixels.
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # malloc.h
        allocator.mallopt(mmap_max, 0)
        allocator.mallopt(trim_threshold, 2**31 - 1)


def embed_texts(model: nn.Module, tokenizer: Any, texts: Sequence[str], batch_size: int = 512) -> Tensor:
    """Normalised float32 embeddings (N, d) on the CPU, of texts as the model's own ``tokenizer`` reads them."""
    require(len(texts) > 0, "texts", texts, "give at least one")
    parts = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    with evaluating(model) as device:
        embeddings = [model.encode_text(tokenizer(part).to(device), normalize=True).float().cpu() for part in parts]
    return require_finite(torch.cat(embeddings), "text")


def embed_images(model: nn.Module, images: Any, batch_size: int = BATCH_SIZE) -> tuple[Tensor, Tensor]:
    """Normalised float32 embeddings (N, d), on the CPU, of a :class:`ZeroShotSet`'s images, and labels (N,) or -1."""
    require(len(images) > 0, "images", len(images), "give at least one picture")
    embeddings, labels = [], []
    with evaluating(model) as device:
        for batch, label in _batches(input_of(model), images, batch_size):
            embeddings.append(model.encode_image(batch.to(device), normalize=True).float().cpu())
            labels.append(label)
    return require_finite(torch.cat(embeddings), "image"), torch.cat(labels)


def _batches(reads: Input, images: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    array = hasattr(images, "shape")
    valid = not array or (images.dtype in (torch.uint8, np.uint8) and tuple(images.shape[1:-2]) == (3,))
    require(valid, "images", array and f"{images.dtype} {tuple(images.shape)}", "give uint8 pictures (N, 3, H, W)")
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        if array:
            batch = torch.tensor(np.asarray(images[rows]))  # a copy: the file may be mapped
            yield normalise(batch, reads.size, reads.mean, reads.std), torch.full((len(batch),), -1)
        else:
            numbers = range(len(images))[rows]
            pictures, labels = zip(*pool().map(partial(_read, images, reads.transform), numbers), strict=True)
            yield torch.stack(pictures), torch.tensor(labels)


def _read(images: Any, transform: Callable[[Image], Tensor], row: int) -> tuple[Tensor, int]:
    """A PIL picture, alone or with a label, as the model reads it; PictureError names one that cannot be read."""
    samples = getattr(images, "samples", None)
    with named(samples[row][0] if samples else f"picture {row}"):
        item = images[row]
        picture, label = item if isinstance(item, tuple) else (item, -1)
        picture = as_rgb(picture)
    try:
        number = operator.index(label)
    except TypeError:
        raise ConfigError(f"labels={label!r} cannot work: give class numbers as whole numbers.") from None
    return transform(picture), number


def as_templates(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several, as templates: "a photo of a" becomes "a photo of a {}"."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    templates = [text if "{}" in text else f"{text} {{}}".strip() for text in prompts]
    good = len(templates) > 0 and all(template.count("{}") == 1 for template in templates)
    require(good, "prompt", prompt, 'give texts with one place for the class name, for example "a photo of a {}"')
    return templates


def build_classifier(model: nn.Module, tokenizer: Any, class_names: Sequence[str], templates: Any) -> Tensor:
    """Class embeddings (d, n_classes): normalised means over the templates (Radford et al. 2021, section 3.1.4)."""
    templates = as_templates(templates)
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    embeddings = embed_texts(model, tokenizer, prompts).view(len(class_names), len(templates), -1)
    return F.normalize(embeddings.mean(1), dim=-1).T


def evaluate_zero_shot(
    model: nn.Module,
    tokenizer: Any,
    dataset: ZeroShotSet,
    name: str,
    *,
    prompt: str | Sequence[str] | None = None,
    seed: int = 0,
    embeddings: Tensor | None = None,
) -> dict[str, Any]:
    """The results record of ``model``, called ``name``, on ``dataset``.

    ``prompt``, one or several, replaces the set's own templates. ``embeddings`` (N, d) of the set's pictures, where
    they are known, spare :func:`embed_images`; the set must then bring its labels.
    """
    start, templates = time.perf_counter(), as_templates(dataset.templates if prompt is None else prompt)
    classifier, labels = build_classifier(model, tokenizer, dataset.class_names, templates), None
    if embeddings is None:
        embeddings, labels = embed_images(model, dataset.images)
    labels = labels if dataset.labels is None else dataset.labels
    more = {"seed": seed, "templates": templates, "device": device_of(model)}
    return zero_shot_record(dataset, describe_model(name, model), embeddings, classifier, labels, start, **more)


def zero_shot_record(
    dataset: ZeroShotSet, described: Any, embeddings: Tensor, classifier: Tensor, labels: Any, start: float, **more: Any
) -> dict[str, Any]:
    """The results record of embeddings (N, d) of ``dataset`` against a classifier (d, n_classes).

    ``described`` is the record's field "model"; ``start`` is when the measurement began, by ``time.perf_counter``.
    """
    truth = torch.as_tensor(labels).cpu()
    ranks = class_ranks(embeddings, classifier, truth)
    metrics = rank_metrics(ranks, truth, dataset.class_names, more["seed"])
    more["details"] = {"metric": dataset.metric, **answers(ranks < 1, truth.tolist())}
    more["seconds"] = time.perf_counter() - start
    return make_result("zero_shot", dataset.name, dataset.split, len(truth), described, metrics, **more)
