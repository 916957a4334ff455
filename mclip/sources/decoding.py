"""Pictures of files, decoded once for all epochs or anew in each; those that cannot be read are found and reported."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from mclip.files import cache_dir, missing_folder, read_json, write_json
from mclip.pictures import PictureError, decode, met_late, pool, split_name

Bad = Callable[[int, PictureError], None]
"""Called with the number of a picture that cannot be read: raises, or takes note."""
Paths = Sequence[str] | np.ndarray


class Pictures:
    """Pictures (N, 3, S, S) uint8 that are decoded anew whenever they are asked for; indexed like an array."""

    dtype = np.dtype(np.uint8)

    def __init__(self, names: Paths, size: int) -> None:
        self.names, self.size = names, size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of an array."""
        return (len(self.names), 3, self.size, self.size)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: int | slice | np.ndarray | list[int]) -> np.ndarray:
        with met_late():
            if isinstance(rows, int | np.integer):
                return decode(self.names[int(rows)], self.size)
            numbers = range(*rows.indices(len(self))) if isinstance(rows, slice) else [int(row) for row in rows]
            decoded = list(pool().map(lambda row: decode(self.names[row], self.size), numbers))
        return np.stack(decoded) if decoded else np.empty((0, *self.shape[1:]), np.uint8)


@dataclass(frozen=True)
class Rows:
    """Some rows of an array, read when they are asked for: a memory-mapped array is not copied into memory."""

    array: Any
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return (len(self.rows), *self.array.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> np.ndarray:
        return self.array[self.rows[place]]


def _each(names: Paths, size: int, bad: Bad, progress: bool, label: str) -> Iterator[tuple[int, np.ndarray]]:
    """Number and pixels of each picture that can be read, in order, decoded by all threads."""

    def attempt(name: str) -> np.ndarray | PictureError:
        try:
            return decode(name, size)
        except PictureError as error:
            return error

    waiting: deque[Future] = deque()
    upcoming = iter(names)
    for number in tqdm(range(len(names)), label, disable=not progress, leave=False):
        waiting.extend(pool().submit(attempt, name) for name in islice(upcoming, 64 - len(waiting)))
        picture = waiting.popleft().result()
        if isinstance(picture, PictureError):
            bad(number, picture)
        else:
            yield number, picture


def decoded_once(names: Paths, size: int, key: str, bad: Bad, progress: bool) -> tuple[np.ndarray, list[int]]:
    """Pictures (N, 3, size, size) uint8, memory-mapped from the cache, and the numbers of those that could be read."""
    folder = cache_dir() / "pixels" / key
    with missing_folder(folder) as temporary:
        if temporary:
            kept: list[int] = []
            shape = (len(names), 3, size, size)
            images = np.lib.format.open_memmap(temporary / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
            for number, picture in _each(names, size, bad, progress, "decoding pictures"):
                images[len(kept)] = picture
                kept.append(number)
            images.flush()
            write_json(temporary / "kept.json", kept)
    kept = read_json(folder / "kept.json")
    return np.load(folder / "images.npy", mmap_mode="r")[: len(kept)], kept


def readable(names: Paths, key: str, bad: Bad, progress: bool) -> list[int]:
    """The numbers of the pictures that can be read. All are tried once; the answer is kept in the cache."""
    folder = cache_dir() / "readable" / key
    with missing_folder(folder) as temporary:
        if temporary:
            kept = [number for number, _ in _each(names, 32, bad, progress, "checking pictures")]
            write_json(temporary / "kept.json", kept)
    return read_json(folder / "kept.json")


def fingerprint(names: Paths, at_most: int = 100_000) -> list[tuple[str, int, int]]:
    """Path, bytes and time of change of each picture's file, so that an edited one is seen.

    Of more than ``at_most``, that many evenly spaced ones: asking for each of millions takes longer than reading
    the table that names them.
    """
    step = max(1, math.ceil(len(names) / at_most))
    files = dict.fromkeys(os.path.abspath(split_name(names[row])[0]) for row in range(0, len(names), step))
    prints = []
    for file in files:
        with suppress(FileNotFoundError):  # a link to nothing: its row is reported when the picture is read
            stat = os.stat(file)
            prints.append((file, stat.st_size, stat.st_mtime_ns))
    return prints
