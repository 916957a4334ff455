"""The batches of an epoch: tensors for the student, and the teacher's embeddings beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as VF

from .config import require

if TYPE_CHECKING:
    from .data import Pairs


def normalise(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 pictures (B, 3, H, W) -> standardised float (B, 3, size, size).

    The shortest side is resized (bicubic) and the centre cut out, as for PIL pictures: nothing is squashed.
    """
    pictures = images.float() / 255
    if tuple(images.shape[-2:]) != (size, size):
        pictures = VF.resize(pictures, [size], interpolation=InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        pictures = VF.center_crop(pictures, [size, size])
    # Convolutions on a CPU are a quarter to a third faster when the channels lie innermost.
    return VF.normalize(pictures, list(mean), list(std)).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Targets:
    """A frozen teacher's embeddings of every picture (N, D) and every caption (M, D), and its logit scale.

    ``key`` changes with the teacher's weights, its view of the pictures and the data.
    """

    images: np.ndarray
    texts: np.ndarray
    logit_scale: float
    key: str = ""


def join_targets(several: Sequence[Targets]) -> Targets:
    """The targets of several teachers side by side: (N, sum of D), shortened together to unit vectors.

    The cosine of two such vectors is the mean of the teachers' cosines.
    """
    if len(several) == 1:
        return several[0]
    images, texts = (
        np.concatenate([getattr(targets, kind) for targets in several], 1) / math.sqrt(len(several))
        for kind in ("images", "texts")
    )
    scale = math.prod(targets.logit_scale for targets in several) ** (1 / len(several))
    return Targets(images, texts, scale, "+".join(targets.key for targets in several))


@dataclass(frozen=True)
class Batch:
    """What one step reads: pictures (B, 3, S, S), token ids (B, T), and the teacher's embeddings (B, D) if any."""

    images: Tensor
    tokens: Tensor
    index: Tensor
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None


class BatchSource:
    """The batches of each epoch: a function of (seed, epoch) alone, so that a resumed run sees the same ones.

    Every epoch visits each picture once, in a new order, with one of its captions chosen at random; the last
    incomplete batch is left out, since its pairs would have fewer in-batch negatives.
    """

    def __init__(
        self,
        pairs: Pairs,
        tokenizer: Any,
        prepare: Any,
        batch_size: int,
        seed: int,
        targets: Targets | None = None,
        trim: bool = True,
    ) -> None:
        require(
            batch_size <= len(pairs),
            "batch_size",
            batch_size,
            f"there are {len(pairs)} pictures; choose a smaller batch",
        )
        self.pairs, self.prepare, self.batch_size, self.seed, self.targets = pairs, prepare, batch_size, seed, targets
        self.first_caption = pairs.first_caption
        self.tokens = tokenizer([caption for own in pairs.captions for caption in own])
        # Cutting a batch to its longest caption saves work; open_clip's text towers need the full length.
        self.lengths = self._lengths(self.tokens) if trim else torch.full((len(self.tokens),), self.tokens.shape[1])

    @staticmethod
    def _lengths(tokens: Tensor) -> Tensor:
        """Number of ids up to the last that is not 0: ids 0 inside a caption are kept."""
        positions = torch.arange(1, tokens.shape[1] + 1)
        return ((tokens != 0) * positions).amax(1)

    def __len__(self) -> int:
        return len(self.pairs) // self.batch_size

    def epoch(self, epoch: int, start: int = 0, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        """The batches of ``epoch`` from number ``start`` on; of each, the part of one of several processes."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.pairs))
        counts = np.diff(self.first_caption)[order]
        caption = self.first_caption[order] + (rng.random(len(order)) * counts).astype(np.int64)
        for number in range(start, len(self)):
            whole = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
            rows = np.array_split(whole, processes)[process]
            yield self._batch(order[rows], caption[rows])

    def _batch(self, pictures: np.ndarray, captions: np.ndarray) -> Batch:
        images = self.prepare(torch.from_numpy(np.ascontiguousarray(self.pairs.images[pictures])))
        tokens = self.tokens[captions]
        tokens = tokens[:, : int(self.lengths[captions].max())]
        if self.targets is None:
            return Batch(images, tokens, torch.from_numpy(pictures))
        image, text = (
            torch.from_numpy(a[i].astype(np.float32))
            for a, i in ((self.targets.images, pictures), (self.targets.texts, captions))
        )
        return Batch(images, tokens, torch.from_numpy(pictures), image, text)
