"""Pairs of pictures and captions: readers for drawn scenes, CSV and COCO Captions, and the batches of an epoch.

Whatever the source, training reads one form: pictures decoded once to uint8 at the student's size, kept
memory-mapped in the cache, and five or so captions for each, tokenised once.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as VF
from tqdm.auto import tqdm

from .config import require
from .files import atomic_path, cache_dir, content_key
from .scenes import SceneConfig, make_scenes
from .text_encoder import clean_caption

OnError = Literal["raise", "skip"]
SCENES = "scenes"


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line or picture, and the remedy."""


@dataclass(frozen=True)
class Pairs:
    """Pictures with their captions.

    Attributes:
        images: (N, 3, S, S) uint8, in memory or memory-mapped.
        captions: for each picture one caption or more.
        key: changes whenever pictures or captions do; cached teacher targets are kept under it.
        name: for messages and results files.
        files: where the pictures came from, so that a teacher can read them at its own size; None for scenes.
        skipped: number of rows left out by ``on_error="skip"``.
    """

    images: np.ndarray
    captions: list[list[str]]
    key: str
    name: str
    files: list[Path] | None = None
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.images)

    @property
    def first_caption(self) -> np.ndarray:
        """(N + 1,) position of each picture's first caption in the flat list of all captions."""
        return np.concatenate([[0], np.cumsum([len(own) for own in self.captions])])

    def fraction(self, data_size: float, seed: int = 0) -> Pairs:
        """A random ``data_size`` of the pictures, chosen by ``seed``, in their old order; at least one."""
        require(0 < data_size <= 1, "data_size", data_size, "choose a share of the pictures in (0, 1]")
        if data_size == 1:
            return self
        count = max(1, round(data_size * len(self)))
        rows = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        return replace(
            self, images=self.images[rows], captions=[self.captions[r] for r in rows],
            key=content_key(self.key, data_size, seed), files=self.files and [self.files[r] for r in rows])  # fmt: skip


def load_pairs(
    source: str | Path = SCENES, image_size: int = 64, *, split: str = "train", data_size: float = 1.0, seed: int = 0,
    scenes: SceneConfig | None = None, on_error: OnError = "raise", image_key: str = "file_name", caption_key: str = "caption",
    progress: bool = True,
) -> Pairs:  # fmt: skip
    """Pairs from "scenes" (or ""), a CSV file, or a COCO Captions JSON file.

    Args:
        source: "scenes", or a path ending in .csv or .json.
        image_size: side S of the decoded pictures; the shortest side is resized and the centre cut out.
        split, scenes: which scenes to draw; ``scenes`` overrides ``split`` and sets everything else.
        data_size: share of the pictures to use, in (0, 1].
        on_error: "raise" stops at the first bad row; "skip" leaves bad rows out and counts them.
        image_key, caption_key: columns of the CSV. An ``image_path`` column holds the folder, relative to the CSV.

    Raises: DataError or ConfigError, naming the file and row.
    """
    require(0 < data_size <= 1, "data_size", data_size, "choose a share of the pictures in (0, 1]")
    require(on_error in ("raise", "skip"), "on_error", on_error, "choose 'raise' or 'skip'")
    if str(source) in ("", SCENES):
        config = scenes or SceneConfig(split=split, image_size=image_size, seed=seed)
        drawn = make_scenes(replace(config, image_size=image_size), progress)
        key = content_key("scenes", config, image_size)
        return Pairs(drawn.images, drawn.captions, key, f"scenes-{config.split}").fraction(data_size, seed)
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give 'scenes', a .csv file or a COCO Captions .json file.")
    if path.suffix.lower() not in (".csv", ".json"):
        raise DataError(f"{path}: unknown kind {path.suffix!r}; give a .csv file or a COCO Captions .json file.")
    rows, skipped = (
        _read_json(path, on_error)
        if path.suffix.lower() == ".json"
        else _read_csv(path, image_key, caption_key, on_error)
    )
    files: dict[Path, list[str]] = {}
    for file, caption in rows:
        files.setdefault(file, []).append(caption)
    if not files:
        raise DataError(f"{path}: no usable rows; it needs at least one picture with a caption.")
    images, kept, key = decode_images(list(files), image_size, on_error, progress)
    names = list(files)
    captions = [files[names[i]] for i in kept]
    skipped += sum(len(own) for own in files.values()) - sum(len(own) for own in captions)
    if skipped:
        print(f"{path}: {skipped} rows left out (on_error='skip').")
    pairs = Pairs(images, captions, content_key(key, captions), path.stem, [names[i] for i in kept], skipped)
    return pairs.fraction(data_size, seed)


def _bad(message: str, on_error: OnError) -> int:
    if on_error == "raise":
        raise DataError(f"{message}; mend the row, or pass on_error='skip'.")
    return 1


def _read_csv(path: Path, image_key: str, caption_key: str, on_error: OnError) -> tuple[list[tuple[Path, str]], int]:
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
                    rows.append((file, caption))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: not readable as UTF-8 CSV ({error}); save it as UTF-8 text.") from error
    return rows, skipped


def _read_json(path: Path, on_error: OnError) -> tuple[list[tuple[Path, str]], int]:
    """COCO Captions; pictures lie beside the JSON file, in ``images/``, or in a folder named as the file says."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pictures = {entry["id"]: str(entry["file_name"]) for entry in content["images"]}
        annotations = [(entry["image_id"], str(entry["caption"])) for entry in content["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not COCO Captions JSON ({error!r}); it needs 'images' (id, file_name) and "
                        "'annotations' (image_id, caption).") from error  # fmt: skip
    rows, skipped, found = [], 0, {}
    for number, (image_id, caption) in enumerate(annotations):
        where = f"{path}, annotation {number}"
        if image_id not in pictures:
            skipped += _bad(f"{where}: no image with id {image_id}", on_error)
        elif not clean_caption(caption):
            skipped += _bad(f"{where}: the caption is empty", on_error)
        else:
            name = pictures[image_id]
            if name not in found:
                places = (path.parent / name, path.parent / "images" / name)
                found[name] = next((place for place in places if place.is_file()), None)
            if found[name] is None:
                skipped += _bad(f"{where}: no picture {name} in {path.parent} or its folder images", on_error)
            else:
                rows.append((found[name], caption))
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
    files: Sequence[Path], size: int, on_error: OnError = "raise", progress: bool = True
) -> tuple[np.ndarray, list[int], str]:
    """Pictures (N, 3, size, size) uint8 from the cache or from ``files``; positions of those kept; their key.

    The key covers every file's path, length and time of change, so an edited picture is decoded anew.
    """
    stats = [(str(file.resolve()), *os.stat(file)[6:9:2]) for file in files]
    key = content_key("pixels", size, on_error, stats)
    stored, kept_file = cache_dir() / "pixels" / f"{key}.npy", cache_dir() / "pixels" / f"{key}.json"
    if not (stored.exists() and kept_file.exists()):
        kept: list[int] = []
        with atomic_path(stored) as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
            shape = (len(files), 3, size, size)
            images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            decoded = pool.map(lambda file: _decode(file, size), files)
            for index, picture in enumerate(
                tqdm(decoded, "decoding pictures", len(files), disable=not progress, leave=False)
            ):
                if isinstance(picture, str):
                    _bad(picture, on_error)
                else:
                    images[len(kept)] = picture
                    kept.append(index)
            images.flush()
        with atomic_path(kept_file) as temporary:
            temporary.write_text(json.dumps(kept), encoding="utf-8")
    kept = json.loads(kept_file.read_text(encoding="utf-8"))
    return np.load(stored, mmap_mode="r")[: len(kept)], kept, key


def normalise(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 pictures (B, 3, H, W) -> standardised float (B, 3, size, size).

    The shortest side is resized (bicubic) and the centre cut out, as for PIL pictures: nothing is squashed.
    """
    pictures = images.float() / 255
    if tuple(images.shape[-2:]) != (size, size):
        pictures = VF.resize(pictures, [size], interpolation=InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        pictures = VF.center_crop(pictures, [size, size])
    return VF.normalize(pictures, list(mean), list(std))


@dataclass(frozen=True)
class Targets:
    """A frozen teacher's embeddings of every picture (N, D) and every caption (M, D), and its logit scale."""

    images: np.ndarray
    texts: np.ndarray
    logit_scale: float


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

    def __init__(self, pairs: Pairs, tokenizer: Any, prepare: Any, batch_size: int, seed: int,
                 targets: Targets | None = None, trim: bool = True) -> None:  # fmt: skip
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

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from number ``start`` on."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.pairs))
        counts = np.diff(self.first_caption)[order]
        caption = self.first_caption[order] + (rng.random(len(order)) * counts).astype(np.int64)
        for number in range(start, len(self)):
            rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
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
