"""Pairs of pictures and captions, from drawn scenes or from files; all readers behind :func:`load_pairs`.

Whatever the source, training reads one form: pictures as uint8 at the student's size, and the captions of each.
Few enough pictures are decoded once and kept memory-mapped in the cache; more are decoded when they are needed.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from mclip.config import require
from mclip.files import cache_dir, content_key, missing_folder, new_array, read_json, write_json
from mclip.pairs import Pairs
from mclip.pictures import DECODING_VERSION, PictureError, met_late, pool, read_picture, square
from mclip.scenes.world import SceneConfig, scene_pairs
from mclip.sources.folders import read_folder, read_shards, read_texts, shards_of, unlabelled_pictures
from mclip.sources.readers import DataError, OnError, Table, collect, fingerprint, read_annotations, read_csv, reject

SCENES = "scenes"
DECODE_ONCE = 4 * 2**30
"""Bytes of decoded pictures that are kept in the cache; a larger set is decoded anew in each epoch."""
Decoding = Literal["auto", "once", "always"]


def decode(name: str, size: int, seed: int | None = None, smallest: float = 1.0) -> np.ndarray:
    """The picture (3, size, size) uint8, as :func:`~mclip.pictures.square`; PictureError if it cannot be read."""
    return square(read_picture(name), size, seed, smallest).numpy()


class Pictures:
    """Pictures (N, 3, S, S) uint8 that are decoded anew whenever they are asked for; indexed like an array."""

    dtype = np.dtype(np.uint8)

    def __init__(self, names: np.ndarray, size: int) -> None:
        self.names, self.shape = names, (len(names), 3, size, size)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: int | slice | np.ndarray | list[int]) -> np.ndarray:
        names, size = self.names[rows], self.shape[-1]
        with met_late():
            if isinstance(names, str):
                return decode(names, size)
            decoded = list(pool().map(lambda name: decode(name, size), names))
        return np.array(decoded, np.uint8).reshape(-1, *self.shape[1:])


class Rows:
    """Some rows of an array, or of several one after the other, read when they are asked for.

    A memory-mapped array is not copied into memory, and pictures that nobody asks for are not decoded.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, *arrays: Any, rows: np.ndarray | None = None) -> None:
        self.arrays, self.ends = arrays, np.cumsum([len(array) for array in arrays])
        self.rows = np.arange(self.ends[-1]) if rows is None else rows
        self.shape = (len(self.rows), *arrays[0].shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> np.ndarray:
        numbers = self.rows[place]
        if np.ndim(numbers) == 0:
            return self[[place]][0]
        picked, owner = np.empty((len(numbers), *self.shape[1:]), np.uint8), self.ends.searchsorted(numbers, "right")
        for number, (array, end) in enumerate(zip(self.arrays, self.ends, strict=True)):
            picked[owner == number] = array[numbers[owner == number] - (end - len(array))]
        return picked


def load_pairs(
    source: str | Path = SCENES,
    image_size: int = 64,
    *,
    split: str = "train",
    data_size: float = 1.0,
    seed: int = 0,
    scenes: SceneConfig | None = None,
    on_error: OnError = "raise",
    image_key: str = "file_name",
    caption_key: str = "caption",
    csv_separator: str = "",
    decoding: Decoding = "auto",
    progress: bool = True,
) -> Pairs:
    """Pairs from "scenes" (or ""), a CSV or TSV file, COCO or Karpathy JSON, a folder of pictures, or WebDataset.

    Args:
        source: "scenes", a path ending in .csv, .tsv or .json, a folder (of .tar files, or of pictures with text
            files or in one folder per class), a .tar file, or a range of them such as "{00000..00009}.tar".
        image_size: side S of the decoded pictures; the shortest side is resized and the centre cut out.
        split: which scenes to draw, or which split of Karpathy's JSON to read.
        data_size: share of the pictures to use, in (0, 1]. Only these are decoded.
        scenes: overrides ``split`` and sets everything else about scenes.
        on_error: "raise" stops at the first bad row; "skip" leaves bad rows out and counts them.
        image_key, caption_key: columns of the CSV; ``caption_key`` also names the captions in WebDataset shards.
        csv_separator: one character; by default a tab for .tsv and a comma for .csv.
        decoding: "once" keeps all pictures in the cache, "always" decodes them in each epoch; "auto" keeps up to 4 GiB.

    Raises: DataError or ConfigError, naming the file and row. A damaged picture is found here if all are decoded
        once or bad rows are skipped; else when it is first needed. OSError if the system fails, whatever ``on_error``.
    """
    require(0 < data_size <= 1, "data_size", data_size, "choose a share of the pictures in (0, 1]")
    require(on_error in ("raise", "skip"), "on_error", on_error, "choose 'raise' or 'skip'")
    if str(source) in ("", SCENES):
        config = scenes or SceneConfig(split=split, seed=seed)
        pairs = scene_pairs(replace(config, image_size=image_size), progress)
        if data_size == 1:
            return pairs
        rows = _random_rows(len(pairs), data_size, seed)
        images, captions = Rows(pairs.images, rows=rows), [pairs.captions[row] for row in rows]
        return replace(pairs, images=images, captions=captions, key=content_key(pairs.key, data_size, seed))
    path = Path(source).expanduser()
    kind = path.suffix.lower()
    if shards := shards_of(path):
        label, rows = "sample", read_shards(shards, caption_key, progress)
    elif path.is_dir():
        label, rows = "picture", read_folder(path)
    elif not path.is_file() or kind not in (".csv", ".tsv", ".json"):
        kinds = "a .csv, .tsv, COCO Captions or Karpathy .json file, a folder of pictures, or WebDataset .tar files"
        problem = f"unknown kind {path.suffix!r}" if path.is_file() else "no such file"
        raise DataError(f"{path}: {problem}; give 'scenes', {kinds}.")
    elif kind == ".json":
        label, rows = "annotation", read_annotations(path, split)
    else:
        label, rows = "line", read_csv(path, image_key, caption_key, csv_separator)
    table = collect(path, label, rows, on_error)
    if data_size < 1:
        table = table.take(_random_rows(len(table.pictures), data_size, seed))
    return pairs_of(path, table, image_size, on_error, decoding, progress)


def add_unpaired(
    pairs: Pairs,
    unlabelled_data_path: str | Path,
    unpaired_texts_path: str | Path = "",
    *,
    image_size: int,
    seed: int = 0,
    on_error: OnError = "raise",
    decoding: Decoding = "auto",
    progress: bool = True,
) -> Pairs:
    """``pairs``, then the pictures of a folder, which stand beside sentences that are not theirs.

    The sentences are those of a text file, or else the captions of ``pairs``, dealt out at random so that each is used.
    ``paired`` says which rows are pairs. Raises: DataError as :func:`unlabelled_pictures` and :func:`read_texts`.
    """
    remedy = "pictures with captions that are files can be joined with others, drawn scenes cannot"
    require(pairs.files is not None, "unlabelled_data_path", str(unlabelled_data_path), remedy)
    path = Path(unlabelled_data_path).expanduser()
    files = unlabelled_pictures(path)
    captions = pairs.captions_at(range(pairs.first_caption[-1]))
    texts = read_texts(unpaired_texts_path) if unpaired_texts_path else captions
    texts = [texts[place] for place in np.random.default_rng(seed).permutation(len(texts))]
    owned = (texts[number :: len(files)] or [texts[number % len(texts)]] for number in range(len(files)))
    table = collect(path, "picture", zip(range(len(files)), files, owned, strict=True), on_error)
    others = pairs_of(path, table, image_size, on_error, decoding, progress)
    paired = np.arange(len(pairs) + len(others)) < len(pairs)
    images, captions = Rows(pairs.images, others.images), pairs.captions + others.captions
    files, skipped = np.concatenate([pairs.files, others.files]), pairs.skipped + others.skipped
    key = content_key(pairs.key, others.key)
    return replace(pairs, images=images, captions=captions, key=key, files=files, skipped=skipped, paired=paired)


def pairs_of(path: Path, table: Table, image_size: int, on_error: OnError, decoding: Decoding, progress: bool) -> Pairs:
    """The pairs of a table, decoded once or whenever they are needed; errors as in :func:`load_pairs`."""
    captions_read = len(table.captions.texts)
    key = content_key("pictures", DECODING_VERSION, _digest(table.pictures), fingerprint(table.pictures), on_error)
    fits = len(table.pictures) * 3 * image_size**2 <= DECODE_ONCE
    once = decoding == "once" or (decoding == "auto" and fits)
    images = None
    if once or on_error == "skip":
        kept, images = _read_all(table, key, image_size, once, on_error, progress)
        if not kept:
            raise DataError(f"{path}: none of its {len(table.pictures)} pictures can be read; try one of them alone.")
        table = table.take(kept)
    captions = table.captions
    key = content_key(key, _digest(captions.texts), hashlib.sha256(captions.first.tobytes()).hexdigest())
    if skipped := table.skipped + captions_read - len(captions.texts):
        print(f"{path}: {skipped} rows left out (on_error='skip').")
    images = Pictures(table.pictures, image_size) if images is None else images
    name = path.stem
    if name in ("train", "val", "test"):  # many folders have one
        name = path.absolute().parent.name or name
    return Pairs(images, captions, key, name, table.pictures, skipped)


def _read_all(
    table: Table, key: str, size: int, once: bool, on_error: OnError, progress: bool
) -> tuple[list[int], np.ndarray | None]:
    """The numbers of the pictures that can be read, and their pixels (N, 3, size, size) if they are decoded ``once``.

    All are tried, by all threads. The answer is kept in the cache, the pixels memory-mapped.
    """
    names = table.pictures
    folder = cache_dir() / ("pixels" if once else "readable") / (content_key(key, size) if once else key)

    def attempt(name: str) -> np.ndarray | PictureError:
        try:
            return decode(name, size if once else 32)
        except PictureError as error:
            return error

    with missing_folder(folder) as temporary:
        if temporary:
            kept: list[int] = []
            if once:
                file, shape = temporary / "images.npy", (len(names), 3, size, size)
                images = new_array(file, shape, np.uint8)
            chunks = range(0, len(names), 64)
            for start in tqdm(chunks, "reading pictures", disable=not progress, leave=False):
                pictures = pool().map(attempt, names[start : start + 64])
                for number, picture in enumerate(pictures, start):
                    if isinstance(picture, PictureError):
                        reject(f"{table.where} {table.rows[number]}: {picture}", on_error)
                        continue
                    if once:
                        images[len(kept)] = picture
                    kept.append(number)
            if once:
                images.flush()
            write_json(temporary / "kept.json", kept)
    kept = read_json(folder / "kept.json")
    return kept, np.load(folder / "images.npy", mmap_mode="r")[: len(kept)] if once else None


def _random_rows(count: int, data_size: float, seed: int) -> np.ndarray:
    """The numbers, in order, of a random ``data_size`` of ``count`` rows; at least one."""
    return np.sort(np.random.default_rng(seed).permutation(count)[: max(1, round(data_size * count))])


def _digest(texts: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(texts), 10_000):
        digest.update("\0".join([*texts[start : start + 10_000], ""]).encode())
    return digest.hexdigest()
