"""Millions of short texts in little memory: one block of bytes and the places where each begins."""

from __future__ import annotations

import hashlib
import operator
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice
from typing import Any, overload

import numpy as np


class Texts(Sequence[str]):
    """A sequence of strings that takes their bytes and eight more for each, where a list takes some fifty more."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.block, self.ends = bytearray(), array("q")
        texts = iter(texts)
        while some := list(islice(texts, 10_000)):
            self.extend(some)

    def extend(self, texts: Iterable[str]) -> None:
        """Add some at the end."""
        texts = list(texts)
        joined = "".join(texts)
        # As many bytes as characters: the usual case needs no bytes of each text.
        parts = texts if joined.isascii() else [text.encode("utf-8", "surrogatepass") for text in texts]
        self.ends.extend(islice(accumulate(map(len, parts), initial=len(self.block)), 1, None))
        self.block += joined.encode("utf-8", "surrogatepass")

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Texts: ...
    def __getitem__(self, place: int | slice) -> str | Texts:
        if isinstance(place, slice):
            return Texts(self[i] for i in range(*place.indices(len(self))))
        if not -len(self) <= place < len(self):
            raise IndexError(f"no text {place} of {len(self)}")
        place %= len(self)
        start = self.ends[place - 1] if place else 0
        return self.block[start : self.ends[place]].decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    def digest(self) -> str:
        """A fingerprint of all texts."""
        found = hashlib.sha256(self.block)
        found.update(self.ends)
        return found.hexdigest()


class Captions(Sequence[list[str]]):
    """For each picture the list of its captions, held as :class:`Texts`.

    Args:
        texts: all captions, those of a picture beside each other.
        first: (N + 1,) position of each picture's first caption, and the number of all.
    """

    def __init__(self, texts: Texts, first: np.ndarray) -> None:
        self.texts, self.first = texts, first

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"no picture {place} of {len(self)}")
        place %= len(self)
        return [self.texts[i] for i in range(int(self.first[place]), int(self.first[place + 1]))]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    def subset(self, pictures: np.ndarray) -> Captions:
        """The captions of the ``pictures`` with these numbers, in their order."""
        chosen = [self[int(i)] for i in pictures]
        first = np.concatenate([[0], np.cumsum([len(own) for own in chosen], dtype=np.int64)])
        return Captions(Texts(text for own in chosen for text in own), first)
