"""One form for every kind of picture that Pillow opens: RGB, upright, and nothing in it made invisible."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

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
