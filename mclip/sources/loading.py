"""Pairs of pictures and captions, from drawn scenes or from files; all readers behind :func:`load_pairs`.

Whatever the source, training reads one form: pictures as uint8 at the student's size, and the captions of each.
Few enough pictures are decoded once and kept memory-mapped in the cache; more are decoded when they are needed.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from mclip.config import require
from mclip.files import content_key
from mclip.pairs import Pairs
from mclip.pictures import DECODING_VERSION, PictureError
from mclip.scenes.world import SceneConfig, scene_pairs
from mclip.sources.decoding import Pictures, Rows, decoded_once, fingerprint, readable
from mclip.sources.folders import read_folder, read_shards, shards_of
from mclip.sources.readers import DataError, OnError, Table, collect, read_json, reject
from mclip.sources.tables import read_csv

SCENES = "scenes"
DECODE_ONCE = 4 * 2**30
"""Bytes of decoded pictures that are kept in the cache; a larger set is decoded anew in each epoch."""
Decoding = Literal["auto", "once", "always"]


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
        image_key, caption_key: columns of the CSV; ``caption_key`` also names the captions in WebDataset shards. An
            ``image_path`` column holds the folder, relative to the CSV. open_clip's columns need no option.
        csv_separator: one character; by default a tab for .tsv and a comma for .csv.
        decoding: "once" keeps all pictures in the cache, "always" decodes them in each epoch; "auto" keeps up to 4 GiB.
        progress: show bars.

    Raises: DataError or ConfigError, naming the file and row. A damaged picture is found here if all are decoded
        once or bad rows are skipped; else when it is first needed. OSError if the system fails, whatever ``on_error``.
    """
    require(0 < data_size <= 1, "data_size", data_size, "choose a share of the pictures in (0, 1]")
    require(on_error in ("raise", "skip"), "on_error", on_error, "choose 'raise' or 'skip'")
    require(decoding in ("auto", "once", "always"), "decoding", decoding, "choose 'auto', 'once' or 'always'")
    if str(source) in ("", SCENES):
        config = scenes or SceneConfig(split=split, image_size=image_size, seed=seed)
        pairs = scene_pairs(replace(config, image_size=image_size), progress)
        if data_size == 1:
            return pairs
        rows, key = _random_rows(len(pairs), data_size, seed), content_key(pairs.key, data_size, seed)
        return replace(pairs, images=Rows(pairs.images, rows), captions=[pairs.captions[row] for row in rows], key=key)
    path = Path(source).expanduser()
    kind = path.suffix.lower()
    if shards_of(path):
        label, rows = "sample", read_shards(path, caption_key, progress)
    elif path.is_dir():
        label, rows = "picture", read_folder(path)
    elif not path.is_file() or kind not in (".csv", ".tsv", ".json"):
        kinds = "a .csv, .tsv, COCO Captions or Karpathy .json file, a folder of pictures, or WebDataset .tar files"
        problem = f"unknown kind {path.suffix!r}" if path.is_file() else "no such file"
        raise DataError(f"{path}: {problem}; give 'scenes', {kinds}.")
    elif kind == ".json":
        label, rows = "annotation", read_json(path, split)
    else:
        label, rows = "line", read_csv(path, image_key, caption_key, csv_separator)
    table = collect(path, label, rows, on_error)
    if data_size < 1:
        table = table.take(_random_rows(len(table.pictures), data_size, seed))
    pairs = _with_pictures(table, path.stem, image_size, on_error, decoding, progress)
    if pairs.skipped:
        print(f"{path}: {pairs.skipped} rows left out (on_error='skip').")
    return pairs


def _with_pictures(table: Table, name: str, size: int, on_error: OnError, decoding: Decoding, progress: bool) -> Pairs:
    def bad(number: int, error: PictureError) -> None:
        reject(f"{table.where} {table.rows[number]}: {error}", on_error)

    names, whole = table.pictures, len(table.captions.texts)
    key = content_key("pictures", DECODING_VERSION, _digest(names), fingerprint(names), on_error)
    images = None
    if decoding == "once" or (decoding == "auto" and len(names) * 3 * size * size <= DECODE_ONCE):
        images, kept = decoded_once(names, size, content_key(key, size), bad, progress)
        table = table.take(kept)
    elif on_error == "skip":
        table = table.take(readable(names, key, bad, progress))
    captions = table.captions
    key = content_key(key, _digest(captions.texts), hashlib.sha256(captions.first.tobytes()).hexdigest())
    images = Pictures(table.pictures, size) if images is None else images
    return Pairs(images, captions, key, name, table.pictures, table.skipped + whole - len(captions.texts))


def _random_rows(count: int, data_size: float, seed: int) -> np.ndarray:
    """The numbers, in order, of a random ``data_size`` of ``count`` rows; at least one."""
    return np.sort(np.random.default_rng(seed).permutation(count)[: max(1, round(data_size * count))])


def _digest(texts: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(texts), 10_000):
        digest.update("\0".join([*texts[start : start + 10_000], ""]).encode())
    return digest.hexdigest()
