"""Pictures and sentences that readers get wrong, for every reader of an exported student."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import ExifTags, Image

SENTENCES = (
    "A photo of a DOG.",
    "  “Two”\n people’s café, crème brûlée!! ",
    "it's 10 o'clock",
    "",
    "a very long caption " * 40,
    "Straße ½ ﬁ 日本 \N{GRINNING FACE} ΟΔΟΣ İstanbul\x1c",
)


def smooth(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 256, (6, 5, channels), np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def odd_pictures() -> dict[str, bytes]:
    """Files of the kinds that readers get wrong."""
    turned = {}
    for orientation in range(1, 9):
        note = Image.Exif()
        note[ExifTags.Base.Orientation] = orientation
        turned[f"turned {orientation}"] = saved(smooth(300, 200), "JPEG", exif=note)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (333, 500, 3), np.uint8))
    return turned | {
        "noise": saved(noise, "PNG"),
        "large": saved(smooth(2400, 1800), "JPEG"),
        "alpha": saved(smooth(200, 260, 4), "PNG"),
        "palette": saved(smooth(200, 260).quantize(16), "PNG", transparency=bytes(range(0, 256, 17))),
        "animation": saved(smooth(200, 260), "GIF", save_all=True, append_images=[smooth(200, 260, seed=1)]),
        "grey": saved(smooth(201, 260).convert("L"), "JPEG"),
        "cmyk": saved(smooth(300, 200).convert("CMYK"), "JPEG"),
        "one bit": saved(smooth(200, 200).convert("1"), "PNG"),
        "very long": saved(smooth(40, 3000), "PNG"),
        "smaller than the student reads": saved(smooth(9, 7), "PNG"),
    }
