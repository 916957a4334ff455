"""Readers of captions and pictures: CSV, COCO Captions JSON, and decoding into the cache."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as VF
from tqdm.auto import tqdm

from .files import cache_dir, content_key, missing_folder, write_json
from .text_encoder import clean_caption

OnError = Literal["raise", "skip"]


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line or picture, and the remedy."""


Row = tuple[Path, str, str]
"""A picture, a caption, and where they were read, for messages."""


def _bad(message: str, on_error: OnError) -> int:
    if on_error == "raise":
        raise DataError(f"{message}; mend the row, or pass on_error='skip'.")
    return 1


def read_csv(path: Path, image_key: str, caption_key: str, on_error: OnError) -> tuple[list[Row], int]:
    """The usable rows, and the number left out; an ``image_path`` column holds the folder."""
    rows, skipped, present = [], 0, {}
    with path.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        try:
            columns = reader.fieldnames or []
            if not columns:
                raise DataError(
                    f"{path}: the file is empty; it needs a header line such as file_name,image_path,caption."
                )
            for key in (image_key, caption_key):
                if key not in columns:
                    raise DataError(f"{path}: no column {key!r}; the columns are {', '.join(columns)}.")
            for row in reader:
                where, caption = f"{path}, line {reader.line_num}", row[caption_key] or ""
                file = path.parent / (row.get("image_path") or "") / (row[image_key] or "")
                if not clean_caption(caption):
                    skipped += _bad(f"{where}: the caption is empty", on_error)
                elif not present.setdefault(file, file.is_file()):
                    skipped += _bad(f"{where}: no picture at {file}", on_error)
                else:
                    rows.append((file, caption, where))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: not readable as UTF-8 CSV ({error}); save it as UTF-8 text.") from error
    return rows, skipped


def read_json(path: Path, on_error: OnError) -> tuple[list[Row], int]:
    """COCO Captions; pictures lie beside the JSON file, in ``images/``, or as COCO unpacks.

    That is, for ``annotations/captions_val2017.json``, in ``val2017/`` beside ``annotations/``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pictures = {entry["id"]: str(entry["file_name"]) for entry in content["images"]}
        annotations = [(entry["image_id"], str(entry["caption"])) for entry in content["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not COCO Captions JSON ({error!r}); it needs 'images' (id, file_name) and "
            "'annotations' (image_id, caption)."
        ) from error
    rows, skipped, found = [], 0, {}
    folders = (path.parent, path.parent / "images", path.parent.parent / path.stem.rpartition("_")[2])
    for number, (image_id, caption) in enumerate(annotations):
        where = f"{path}, annotation {number}"
        if image_id not in pictures:
            skipped += _bad(f"{where}: no image with id {image_id}", on_error)
        elif not clean_caption(caption):
            skipped += _bad(f"{where}: the caption is empty", on_error)
        else:
            name = pictures[image_id]
            if name not in found:
                places = (folder / name for folder in folders)
                found[name] = next((place for place in places if place.is_file()), None)
            if found[name] is None:
                skipped += _bad(f"{where}: no picture {name} in {' or '.join(map(str, folders))}", on_error)
            else:
                rows.append((found[name], caption, where))
    return rows, skipped


def _decode(file: Path, size: int) -> np.ndarray | str:
    """The picture as (3, size, size) uint8, or what is wrong with it."""
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        return f"{file}: not readable as a picture ({error})"
    picture = VF.resize(picture, [size], interpolation=InterpolationMode.BICUBIC)
    return np.asarray(VF.center_crop(picture, [size, size])).transpose(2, 0, 1)


def decode_images(
    files: Sequence[Path],
    size: int,
    on_error: OnError = "raise",
    progress: bool = True,
    places: Sequence[str] | None = None,
) -> tuple[np.ndarray, list[int], str]:
    """Pictures (N, 3, size, size) uint8 from the cache or from ``files``; positions of those kept; their key.

    The key covers every file's path, length and time of change, so an edited picture is decoded anew. ``places``
    says for each file where it was named, for messages.
    """
    stats = [(str(file.resolve()), *os.stat(file)[6:9:2]) for file in files]
    key = content_key("pixels", size, on_error, stats)
    folder = cache_dir() / "pixels" / key
    with missing_folder(folder) as temporary:
        if temporary:
            kept: list[int] = []
            shape = (len(files), 3, size, size)
            images = np.lib.format.open_memmap(temporary / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                decoded = pool.map(lambda file: _decode(file, size), files)
                for index, picture in enumerate(
                    tqdm(decoded, "decoding pictures", len(files), disable=not progress, leave=False)
                ):
                    if isinstance(picture, str):
                        _bad(f"{places[index]}: {picture}" if places else picture, on_error)
                    else:
                        images[len(kept)] = picture
                        kept.append(index)
            images.flush()
            write_json(temporary / "kept.json", kept)
    kept = json.loads((folder / "kept.json").read_text(encoding="utf-8"))
    return np.load(folder / "images.npy", mmap_mode="r")[: len(kept)], kept, key
