"""One form for every kind of picture that Pillow opens: RGB, upright, and nothing in it made invisible."""

from __future__ import annotations

import io
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as VF
from tqdm.auto import tqdm

from mclip.files import cache_dir, missing_folder, write_json

DECODING_VERSION = 2
"""Part of the keys of cached pictures; to be raised whenever :func:`as_rgb` makes something else of a file."""
UNREADABLE = (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError)
"""What Pillow and :func:`as_rgb` raise for a picture that cannot be read."""


class PictureError(ValueError):
    """A picture that cannot be read; the message names it."""


def as_rgb(picture: Image.Image) -> Image.Image:
    """``picture`` in mode RGB, turned as the camera's note in EXIF says; one that is so already comes back itself.

    Greys of 16 bits are scaled to 8, 65,535 to 255. What is transparent becomes white, as on a page.

    Raises: one of ``UNREADABLE``: ValueError for modes I and F, which do not say what is white, or what Pillow makes
        of a damaged file. Whoever knows the file's name says it.
    """
    picture.load()
    if "exif" in picture.info and picture.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
        picture = ImageOps.exif_transpose(picture)  # takes the note away too, so that nothing is turned twice
    if picture.mode.startswith("I;16"):  # Pillow would cut off at 255
        grey = (np.asarray(picture).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(f"mode {picture.mode} does not say which number is white: save it with 8 or 16 bits")
    if picture.has_transparency_data:
        page = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(page, picture.convert("RGBA")).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


IN_ARCHIVE = "::"
RATIOS = (3 / 4, 4 / 3)  # width to height of a crop, before it is made square


@contextmanager
def met_late() -> Iterator[None]:
    """PictureError with the remedy, where a picture is met for the first time in the middle of a run."""
    try:
        yield
    except PictureError as error:
        raise PictureError(f"{error}; mend it, or pass on_error='skip', which leaves it out at the start.") from error


@lru_cache(64)
def _archive(path: str) -> int:
    return os.open(path, os.O_RDONLY)


def _opened(name: str) -> tuple[bytes, Image.Image]:
    """The bytes of the picture ``name``, and its header as Pillow reads it, which refuses decompression bombs."""
    if IN_ARCHIVE in name:
        archive, place = name.rsplit(IN_ARCHIVE, 1)
        offset, size = map(int, place.split(":"))
        content = os.pread(_archive(archive), size, offset)
    else:
        content = Path(name).read_bytes()
    try:
        return content, Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:  # Pillow would name the buffer by its address
        start = f"begins with {content[:8]!r}" if content else "is empty"
        raise UnidentifiedImageError(f"the file {start}, which no known kind of picture does") from error


def open_picture(picture: str | Path | Image.Image) -> Image.Image:
    """A file, or a picture that Pillow has opened, as :func:`as_rgb` makes it, for a model's own transform.

    Raises: PictureError, which names the file where it is known.
    """
    try:
        return as_rgb(picture if isinstance(picture, Image.Image) else _opened(str(picture))[1])
    except UNREADABLE as error:
        name = getattr(picture, "filename", "") or "a picture" if isinstance(picture, Image.Image) else picture
        raise PictureError(f"{name}: not readable as a picture ({error})") from error


def read_picture(name: str) -> Tensor:
    """The picture ``name`` (3, H, W) uint8; a JPEG in half the time of :func:`open_picture`. Raises: PictureError."""
    try:
        content, opened = _opened(name)
        if opened.format == "JPEG" and opened.mode in ("RGB", "L"):
            with suppress(RuntimeError):  # Pillow, below, reads it all the same or says what is wrong with it
                coded, turned = torch.frombuffer(bytearray(content), dtype=torch.uint8), "exif" in opened.info
                return decode_jpeg(coded, ImageReadMode.RGB, apply_exif_orientation=turned)
        return VF.pil_to_tensor(as_rgb(opened))
    except UNREADABLE as error:
        raise PictureError(f"{name}: not readable as a picture ({error})") from error


def crop_box(seed: int, width: int, height: int, smallest: float) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the crop that ``seed`` decides, in pixels.

    Its share of the picture's area is uniform in [``smallest``, 1], its ratio of sides log-uniform in ``RATIOS``
    (Szegedy et al. 2015, section 6), both to the nearest pixel; where ten draws do not fit, the largest central square.
    """
    rng = np.random.default_rng(int(seed))
    shares, logs, lefts, tops = rng.random((4, 10))
    low, high = math.log(RATIOS[0]), math.log(RATIOS[1])
    for share, log, left, top in zip(shares, logs, lefts, tops, strict=True):
        area, ratio = width * height * (smallest + (1 - smallest) * share), math.exp(low + (high - low) * log)
        w, h = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if w <= width and h <= height:
            x, y = round(left * (width - w)), round(top * (height - h))
            return x, y, x + w, y + h
    side = min(width, height)
    x, y = (width - side) // 2, (height - side) // 2
    return x, y, x + side, y + side


def square(picture: Image.Image | Tensor, size: int, seed: int | None = None, smallest: float = 1.0) -> Any:
    """``size`` x ``size`` pixels: the centre, shortest side resized (bicubic); with a ``seed``, its crop instead."""
    if seed is None:
        resized = VF.resize(picture, [size], interpolation=InterpolationMode.BICUBIC, antialias=True)
        return VF.center_crop(resized, [size, size])
    height, width = VF.get_size(picture)
    left, top, right, bottom = crop_box(seed, width, height, smallest)
    return VF.resized_crop(
        picture, top, left, bottom - top, right - left, [size, size], InterpolationMode.BICUBIC, antialias=True
    )


def decode(name: str, size: int, seed: int | None = None, smallest: float = 1.0) -> np.ndarray:
    """The picture (3, size, size) uint8, as :func:`square`; PictureError if it cannot be read."""
    return square(read_picture(name), size, seed, smallest).numpy()


@cache
def pool() -> ThreadPoolExecutor:
    """Threads that decode: Pillow lets go of Python's lock while it works, so each keeps one core busy."""
    return ThreadPoolExecutor(os.cpu_count(), "pictures")


class Pictures:
    """Pictures (N, 3, S, S) uint8 that are decoded anew whenever they are asked for; indexed like an array."""

    dtype = np.dtype(np.uint8)

    def __init__(self, names: Sequence[str], size: int) -> None:
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
            found = list(pool().map(lambda row: decode(self.names[row], self.size), numbers))
        return np.stack(found) if found else np.empty((0, *self.shape[1:]), np.uint8)


@dataclass(frozen=True)
class Crops:
    """Random crops that can be cut again: the seed of each is a function of ``seed``, picture and view.

    Attributes:
        smallest: share of the picture's area that a crop keeps at least.
        views: number of different crops of a picture, taken in turns; 0: a new one in each epoch.
        seed: of all.
    """

    smallest: float
    views: int
    seed: int

    def view(self, pictures: np.ndarray, epoch: int) -> np.ndarray:
        """Which view of each picture an epoch shows: not the same of all, so that a batch mixes them."""
        return (epoch + pictures) % self.views if self.views else np.full(len(pictures), epoch)

    def seeds(self, pictures: np.ndarray, view: np.ndarray) -> np.ndarray:
        """The seed (uint64) of each view: a mix of the three numbers (SplitMix64, Steele et al. 2014)."""
        with np.errstate(over="ignore"):
            state = np.uint64(self.seed)
            for number in (pictures, view):
                state = state + np.uint64(0x9E3779B97F4A7C15) * (np.asarray(number, np.uint64) + np.uint64(1))
                state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                state = state ^ (state >> np.uint64(31))
        return state


Bad = Callable[[int, PictureError], None]
"""Told the number of a picture that cannot be read: raises, or takes note."""


def _each(names: Sequence[str], work: Callable[[str], Any], bad: Bad, progress: bool, label: str) -> Iterator[Any]:
    """(number, ``work`` of the picture) for each that can be read, in order, by all threads."""

    def attempt(name: str) -> Any:
        try:
            return work(name)
        except PictureError as error:
            return error

    waiting: deque[Future] = deque()
    upcoming = iter(names)
    for number in tqdm(range(len(names)), label, disable=not progress, leave=False):
        while len(waiting) < 64 and (name := next(upcoming, None)) is not None:
            waiting.append(pool().submit(attempt, name))
        found = waiting.popleft().result()
        if isinstance(found, PictureError):
            bad(number, found)
        else:
            yield number, found


def decoded_once(names: Sequence[str], size: int, key: str, bad: Bad, progress: bool) -> tuple[np.ndarray, list[int]]:
    """Pictures (N, 3, size, size) uint8, memory-mapped from the cache, and the numbers of those that could be read."""
    folder = cache_dir() / "pixels" / key
    with missing_folder(folder) as temporary:
        if temporary:
            kept: list[int] = []
            shape = (len(names), 3, size, size)
            images = np.lib.format.open_memmap(temporary / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
            for number, picture in _each(names, lambda name: decode(name, size), bad, progress, "decoding pictures"):
                images[len(kept)] = picture
                kept.append(number)
            images.flush()
            write_json(temporary / "kept.json", kept)
    kept = json.loads((folder / "kept.json").read_text(encoding="utf-8"))
    return np.load(folder / "images.npy", mmap_mode="r")[: len(kept)], kept


def readable(names: Sequence[str], key: str, bad: Bad, progress: bool) -> list[int]:
    """The numbers of the pictures that can be read; all are tried once, and what was found is kept in the cache."""
    folder = cache_dir() / "readable" / key
    with missing_folder(folder) as temporary:
        if temporary:
            found = _each(names, lambda name: decode(name, 32) is not None, bad, progress, "checking pictures")
            write_json(temporary / "kept.json", [number for number, _ in found])
    return json.loads((folder / "kept.json").read_text(encoding="utf-8"))


def fingerprint(names: Sequence[str], at_most: int = 100_000) -> list[tuple[str, int, int]]:
    """Path, bytes and time of change of each picture's file, so that an edited one is seen.

    Of more than ``at_most``, that many evenly spaced ones: asking for each of millions takes longer than reading
    the table that names them.
    """
    step = max(1, math.ceil(len(names) / at_most))
    files = dict.fromkeys(names[row].rsplit(IN_ARCHIVE, 1)[0] for row in range(0, len(names), step))
    stats = ((file, os.stat(file)) for file in files)
    here = os.getcwd()
    return [(os.path.join(here, file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
