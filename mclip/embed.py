"""Embeddings of pictures and texts by a model, in batches.

A model is anything with open_clip's ``encode_image(images, normalize=True)`` and
``encode_text(tokens, normalize=True)``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from open_clip.model import get_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mclip.config import ConfigError, require
from mclip.data import normalise
from mclip.metrics import EvaluationError, require_finite
from mclip.rgb import UNREADABLE, PictureError, as_rgb

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
