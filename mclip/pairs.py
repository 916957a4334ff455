"""Pairs of pictures and captions, and the batches of an epoch: tensors for the student, and a teacher's embeddings."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as VF

from mclip.config import require
from mclip.pictures import Crops, met_late, middle, open_picture, pool, read_picture, square

READ_AHEAD = 2  # batches, besides the one in use


def normalise(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 pictures (B, 3, H, W) -> the centre, shortest side resized, as standardised float (B, 3, size, size)."""
    height, width = images.shape[-2:]
    left, top, right, bottom = middle(width, height)
    pictures = images[..., top:bottom, left:right].float() / 255
    if (height, width) != (size, size):
        pictures = square(pictures, size).clamp(0, 1)
    # Convolutions on a CPU are a quarter to a third faster when the channels lie innermost.
    return VF.normalize(pictures, list(mean), list(std)).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Pairs:
    """Pictures with their captions."""

    images: Any  # (N, 3, S, S) uint8: an array, in memory or memory-mapped, or what decodes pictures when indexed
    captions: Sequence[list[str]]  # for each picture one or more
    key: str  # changes when pictures or captions do; a teacher's cached targets are kept under it
    name: str  # for messages and results files
    files: Sequence[str] | None = None  # of the pictures, so that a teacher can read them at its own size
    skipped: int = 0  # rows left out by on_error="skip"
    paired: np.ndarray | None = None  # (N,) bool: whether the captions are the picture's own; None if all are

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def first_caption(self) -> np.ndarray:
        """(N + 1,) position of each picture's first caption in the flat list of all captions."""
        if hasattr(self.captions, "first"):  # the readers of files know it
            return self.captions.first
        return np.concatenate([[0], np.cumsum([len(own) for own in self.captions])])

    def captions_at(self, positions: Iterable[int]) -> list[str]:
        """The captions at these positions of the flat list."""
        positions, first = np.array(positions), self.first_caption
        owners = np.searchsorted(first, positions, side="right") - 1
        return [self.captions[p][c] for p, c in zip(owners.tolist(), (positions - first[owners]).tolist(), strict=True)]

    def picture(self, row: int) -> Image.Image:
        """The picture as it came, at its full size."""
        if self.files is None:
            return Image.fromarray(self.images[row].transpose(1, 2, 0))
        with met_late():
            return open_picture(self.files[row])

    def cropped(self, row: int, size: int, seed: int, crops: Crops) -> np.ndarray:
        """The crop of a picture that ``seed`` decides, (3, size, size) uint8."""
        if self.files is not None:
            with met_late():
                return crops.cut(read_picture(self.files[row]), size, seed).numpy()
        return crops.cut(torch.from_numpy(np.array(self.images[row])), size, seed).numpy()


@dataclass(frozen=True)
class Targets:
    """A frozen teacher's embeddings of every picture and every caption, and its logit scale."""

    images: np.ndarray  # (N, D); with crops (N, K, D), of the K views of each picture
    texts: np.ndarray  # (M, D)
    logit_scale: float
    key: str = ""  # changes with the teacher's weights, its view of the pictures and the data
    crops: Crops | None = None
    basis: Tensor | None = None  # (D, d): turns the embeddings to a student of another width d

    def of(self, pictures: np.ndarray, captions: np.ndarray, view: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """The embeddings (B, D or d) of these pictures, each in its view, and of these captions."""
        rows = self.images[pictures] if self.crops is None else self.images[pictures, view]
        image, text = (torch.from_numpy(np.asarray(side, np.float32)) for side in (rows, self.texts[captions]))
        if self.basis is None:
            return image, text
        return F.normalize(image @ self.basis, dim=-1), F.normalize(text @ self.basis, dim=-1)


@dataclass(frozen=True)
class Batch:
    """What one step reads: pictures, token ids (B, T), and the teacher's embeddings (B, D) if there is a teacher.

    ``paired`` (B,) is False for rows whose caption is not the picture's; None if there are none.
    """

    pixels: Tensor  # (B, 3, S, S), uint8 until the model needs them: a quarter of the memory of float32
    tokens: Tensor
    index: Tensor
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None
    paired: Tensor | None = None
    prepare: Callable[[Tensor], Tensor] | None = None

    @property
    def images(self) -> Tensor:
        """What the model reads, (B, 3, S', S')."""
        return self.prepare(self.pixels) if self.prepare else self.pixels

    def to(self, move: Callable[[Tensor], Tensor]) -> Self:
        """All tensors through ``move``."""
        return replace(self, **{key: move(value) for key, value in vars(self).items() if isinstance(value, Tensor)})


def spread(order: np.ndarray, paired: np.ndarray) -> np.ndarray:
    """``order`` (N,) rearranged so that every batch has its share of pairs: both kinds keep their order."""
    position = np.empty(len(order))
    for kind in (paired, ~paired):
        position[kind] = (np.arange(kind.sum()) + 0.5) / max(1, kind.sum())
    return order[np.argsort(position, kind="stable")]


@dataclass
class BatchSource:
    """The batches of each epoch. They depend on (seed, epoch) alone, so that a resumed run sees the same ones.

    Every epoch visits each picture once, in a new order, with one of its captions chosen at random. The last,
    incomplete batch is left out, because its pairs would have fewer in-batch negatives.
    """

    pairs: Pairs
    tokenizer: Callable[[list[str]], Tensor]
    prepare: Callable[[Tensor], Tensor]
    batch_size: int
    seed: int
    targets: Any = None  # a teacher's: Targets, or what has its ``key`` and its ``of``
    crops: Crops | None = None

    def __post_init__(self) -> None:
        remedy = f"there are {len(self.pairs)} pictures; choose a smaller batch"
        require(self.batch_size <= len(self.pairs), "batch_size", self.batch_size, remedy)
        if self.pairs.paired is not None:
            pairs = int(self.batch_size * self.pairs.paired.mean())
            remedy = f"only {pairs} of them would be pairs, and each needs another as its negative; use a larger batch"
            require(pairs >= 2, "batch_size", self.batch_size, remedy)

    def __len__(self) -> int:
        return len(self.pairs) // self.batch_size

    def epoch(self, epoch: int, start: int = 0, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        """The batches of ``epoch`` from number ``start`` on; of each, the part of one of several processes."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.pairs))
        if self.pairs.paired is not None:
            order = spread(order, self.pairs.paired[order])
        offset = (rng.random(len(order)) * np.diff(self.pairs.first_caption)[order]).astype(np.int64)

        def batch(number: int) -> Batch:
            whole = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
            rows = np.array_split(whole, processes)[process]
            return self._batch(order[rows], offset[rows], epoch)

        with ThreadPoolExecutor(1, "batches") as reader:
            waiting = deque()
            try:
                for number in range(start, len(self)):
                    waiting.append(reader.submit(batch, number))
                    if len(waiting) > READ_AHEAD:
                        yield waiting.popleft().result()
                yield from (last.result() for last in waiting)
            finally:
                reader.shutdown(wait=True, cancel_futures=True)

    def _batch(self, pictures: np.ndarray, offset: np.ndarray, epoch: int) -> Batch:
        captions = self.pairs.first_caption[pictures] + offset
        view = image = text = None
        if self.crops is None:
            pixels = np.ascontiguousarray(self.pairs.images[pictures])
        else:
            view, size = self.crops.view(pictures, epoch), self.pairs.images.shape[-1]
            seeds = self.crops.seeds(pictures, view)
            crops = pool().map(lambda row, seed: self.pairs.cropped(row, size, seed, self.crops), pictures, seeds)
            pixels = np.stack(list(crops))
        if self.targets is not None:
            image, text = self.targets.of(pictures, captions, view)
        tokens = self.tokenizer(self.pairs.captions_at(captions))
        paired = None if self.pairs.paired is None else torch.from_numpy(self.pairs.paired[pictures])
        return Batch(torch.from_numpy(pixels), tokens, torch.from_numpy(pictures), image, text, paired, self.prepare)
