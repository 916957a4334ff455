"""The way from a file to pixels: opened, upright, in RGB, cropped, resized.

Training, evaluation, ``mclip.load`` and the reader of exported students share :func:`as_rgb`.
"""

import errno
import io
import math
import os
import re
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as VF

DECODING_VERSION = 3  # part of the keys of cached pictures; raised whenever as_rgb makes something else of a file
UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow and :func:`as_rgb` raise for a picture that cannot be read."""
# What the system answers where a name leads to no file. Any other number is trouble of the system itself.
NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
LONGEST = 8  # a picture may be this many times as long as it is wide; of a longer one only the middle is used
RATIOS = (3 / 4, 4 / 3)  # width to height of a crop, before it is made square
COARSE_SHARE = 0.25  # of the views, where some are to be coarse
BICUBIC = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}


class PictureError(ValueError):
    """A picture that cannot be read; the message names it."""


def middle(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part that is used: the whole picture, or the middle of a very long one.

    The model sees a square. Resizing all of a picture of 1 x 60,000 pixels would take gigabytes for pixels that the
    centre crop then throws away. The middle that is left is wide enough for the resampling filter.
    """
    left, top = (max(0, side - LONGEST * min(width, height)) // 2 for side in (width, height))
    return left, top, width - left, height - top


def as_rgb(picture: Image.Image) -> Image.Image:
    """``picture`` in mode RGB, turned as the camera's note in EXIF says; one that is so already comes back itself.

    Greys of 16 bits are scaled to 8, 65,535 to 255. What is transparent becomes white, as on a page. Of an animation
    the first picture is used, of a very long picture the middle (see :func:`middle`).

    Raises: one of ``UNREADABLE``: ValueError for modes I and F, which do not say what is white, or what Pillow makes
        of a damaged file. Whoever knows the file's name says it.
    """
    picture.load()
    if "exif" in picture.info and picture.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
        picture = ImageOps.exif_transpose(picture)  # takes the note away too, so that nothing is turned twice
    box = middle(*picture.size)
    if box != (0, 0, *picture.size):
        picture = picture.crop(box)
    if picture.mode.startswith("I;16"):  # Pillow would cut off at 255
        grey = (np.asarray(picture).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(f"mode {picture.mode} does not say which number is white: save it as a PNG of 8 or 16 bits")
    if picture.has_transparency_data:
        page = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(page, picture.convert("RGBA")).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


@contextmanager
def named(name: str | Path) -> Iterator[None]:
    """PictureError for a picture that cannot be read; trouble of the system (a faulty disk) stays as it is."""
    try:
        yield
    except PictureError:
        raise
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None and error.errno not in NO_FILE:
            raise
        raise PictureError(f"{name}: not readable as a picture ({error})") from error


@contextmanager
def met_late() -> Iterator[None]:
    """PictureError with the remedy, where a picture is met for the first time in the middle of a run."""
    try:
        yield
    except PictureError as error:
        raise PictureError(f"{error}; mend it, or pass on_error='skip', which leaves it out at the start.") from error


def split_name(name: str) -> tuple[str, int, int]:
    """File, first byte and number of bytes (-1: all) of a picture, which may lie in an archive: "a.tar::512:9000"."""
    parts = re.fullmatch(r"(.+)::(\d+):(\d+)", name, re.DOTALL)
    if parts is None or os.path.exists(name):  # a file may have such a name itself
        return name, 0, -1
    return parts[1], int(parts[2]), int(parts[3])


def _opened(name: str) -> tuple[bytes, Image.Image]:
    """The bytes of the picture ``name``, and its header as Pillow reads it, which refuses decompression bombs."""
    file, start, size = split_name(name)
    # Opened anew for each picture: that takes microseconds, and no descriptor stays open for a thousand archives.
    with open(file, "rb") as handle:
        handle.seek(start)
        content = handle.read(size)
    try:
        return content, Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:  # Pillow would name the buffer by its address
        start = f"begins with {content[:8]!r}" if content else "is empty"
        raise UnidentifiedImageError(f"the file {start}, which no known kind of picture does") from error


def open_picture(picture: str | Path | Image.Image) -> Image.Image:
    """A file, or a picture that Pillow has opened, as :func:`as_rgb` makes it. Raises: PictureError."""
    if not isinstance(picture, str | Path | Image.Image):
        raise PictureError(f"a picture of type {type(picture).__name__}: give a PIL picture (Image.fromarray)")
    opened = picture if isinstance(picture, Image.Image) else None
    with named(picture if opened is None else getattr(opened, "filename", "") or "a picture"):
        return as_rgb(opened or _opened(str(picture))[1])


def read_picture(name: str) -> Tensor:
    """The picture ``name`` (3, H, W) uint8; a JPEG in half the time of :func:`open_picture`. Raises: PictureError."""
    with named(name):
        content, opened = _opened(name)
        whole = middle(*opened.size) == (0, 0, *opened.size)
        if opened.format == "JPEG" and opened.mode in ("RGB", "L") and whole:
            with suppress(RuntimeError):  # Pillow, below, reads it all the same or says what is wrong with it
                coded, turned = torch.frombuffer(bytearray(content), dtype=torch.uint8), "exif" in opened.info
                return decode_jpeg(coded, ImageReadMode.RGB, apply_exif_orientation=turned)
        return VF.pil_to_tensor(as_rgb(opened))


def crop_box(seed: int, width: int, height: int, smallest: float) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the crop that ``seed`` decides, in pixels (Szegedy et al. 2015, section 6).

    Its area is uniform in [``smallest``, 1] of the picture's, its ratio of sides log-uniform in ``RATIOS``, both to the
    nearest pixel; where ten draws do not fit, the largest central square.
    """
    low, high = math.log(RATIOS[0]), math.log(RATIOS[1])
    for share, log, left, top in np.random.default_rng(int(seed)).random((4, 10)).T:
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
        return VF.center_crop(VF.resize(picture, [size], **BICUBIC), [size, size])
    height, width = VF.get_size(picture)
    left, top, right, bottom = crop_box(seed, width, height, smallest)
    return VF.resized_crop(picture, top, left, bottom - top, right - left, [size, size], **BICUBIC)


@cache
def pool() -> ThreadPoolExecutor:
    """Threads that decode: Pillow lets go of Python's lock while it works, so each keeps one core busy."""
    return ThreadPoolExecutor(os.cpu_count(), "pictures")


@dataclass(frozen=True)
class Crops:
    """Random crops that can be cut again."""

    smallest: float  # share of the picture's area
    views: int  # different ones of each picture, taken in turns; 0: a new one in each epoch
    seed: int
    mirrored: bool = False
    coarse: int = 0

    def cut(self, picture: Image.Image | Tensor, size: int, seed: int) -> Any:
        """``size`` x ``size`` pixels of ``picture``: the view that ``seed`` decides."""
        view = square(picture, size, seed, self.smallest)
        mirror, blur, side = np.random.default_rng([int(seed), 1]).random(3)
        if self.mirrored and mirror < 0.5:
            view = VF.horizontal_flip(view)
        few = round(self.coarse * 2**side)
        if blur < COARSE_SHARE and 0 < few < size:
            view = VF.resize(VF.resize(view, [few, few], **BICUBIC), [size, size], **BICUBIC)
        return view

    def view(self, pictures: np.ndarray, epoch: int) -> np.ndarray:
        """Which view of each picture an epoch shows: not the same of all, so that a batch mixes them."""
        return (epoch + pictures) % self.views if self.views else np.full(len(pictures), epoch)

    def seeds(self, pictures: np.ndarray, view: np.ndarray) -> np.ndarray:
        """The seed (uint64) of each view: a mix of ``seed``, picture and view (SplitMix64, Steele et al. 2014)."""
        with np.errstate(over="ignore"):
            state = np.uint64(self.seed)
            for number in (pictures, view):
                state = state + np.uint64(0x9E3779B97F4A7C15) * (np.asarray(number, np.uint64) + np.uint64(1))
                state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                state = state ^ (state >> np.uint64(31))
        return state
