"""Pairs of pictures and captions, from drawn scenes or from files; all readers behind :func:`load_pairs`.

Whatever the source, training reads one form: pictures as uint8 at the student's size, and the captions of each.
Few enough pictures are decoded once and kept memory-mapped in the cache; more are decoded when they are needed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from mclip.config import require
from mclip.files import content_key
from mclip.pairs import Pairs
from mclip.pictures import DECODING_VERSION, PictureError, Pictures, decoded_once, fingerprint, readable
from mclip.scenes.world import SceneConfig, scene_pairs
from mclip.sources.folders import read_folder, read_shards, shards_of
from mclip.sources.readers import DataError, OnError, Table, read_csv, read_json, reject

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
    decoding: Decoding = "auto",
    progress: bool = True,
) -> Pairs:
    """Pairs from "scenes" (or ""), a CSV or TSV file, COCO Captions JSON, a folder of pictures, or WebDataset shards.

    Args:
        source: "scenes", a path ending in .csv, .tsv or .json, a folder (of .tar files, or of pictures with text
            files or in one folder per class), a .tar file, or a range of them such as "{00000..00009}.tar".
        image_size: side S of the decoded pictures; the shortest side is resized and the centre cut out.
        split, scenes: which scenes to draw; ``scenes`` overrides ``split`` and sets everything else.
        data_size: share of the pictures to use, in (0, 1].
        on_error: "raise" stops at the first bad row; "skip" leaves bad rows out and counts them.
        image_key, caption_key: columns of the CSV. An ``image_path`` column holds the folder, relative to the CSV.
        decoding: "once" keeps all pictures in the cache, "always" decodes them in each epoch; "auto" keeps up to 4 GiB.

    Raises: DataError or ConfigError, naming the file and row. A damaged picture is found here if all are decoded
        once or bad rows are skipped; else when it is first needed.
    """
    require(0 < data_size <= 1, "data_size", data_size, "choose a share of the pictures in (0, 1]")
    require(on_error in ("raise", "skip"), "on_error", on_error, "choose 'raise' or 'skip'")
    require(decoding in ("auto", "once", "always"), "decoding", decoding, "choose 'auto', 'once' or 'always'")
    if str(source) in ("", SCENES):
        config = scenes or SceneConfig(split=split, image_size=image_size, seed=seed)
        return scene_pairs(replace(config, image_size=image_size), progress).fraction(data_size, seed)
    table = _read(str(source), image_key, caption_key, on_error, progress)
    pairs = _with_pictures(table, Path(source).stem, image_size, on_error, decoding, progress)
    if pairs.skipped:
        print(f"{source}: {pairs.skipped} rows left out (on_error='skip').")
    return pairs.fraction(data_size, seed)


def _read(source: str, image_key: str, caption_key: str, on_error: OnError, progress: bool) -> Table:
    path = Path(source)
    kind = path.suffix.lower()
    kinds = "give 'scenes', a .csv, .tsv or COCO Captions .json file, a folder of pictures, or WebDataset .tar files"
    if kind == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        shards_of(source)
        return read_shards(source, on_error, progress)
    if path.is_dir():
        return read_folder(path, on_error)
    if not path.is_file():
        raise DataError(f"{path}: no such file; {kinds}.")
    if kind not in (".csv", ".tsv", ".json"):
        raise DataError(f"{path}: unknown kind {path.suffix!r}; {kinds}.")
    return read_json(path, on_error) if kind == ".json" else read_csv(path, image_key, caption_key, on_error)


def _with_pictures(table: Table, name: str, size: int, on_error: OnError, decoding: Decoding, progress: bool) -> Pairs:
    def bad(number: int, error: PictureError) -> None:
        reject(f"{table.place(number)}: {error}", on_error)

    names = table.pictures
    prints = fingerprint(names)
    key = content_key("pictures", DECODING_VERSION, names.digest(), prints, on_error)
    if decoding == "once" or (decoding == "auto" and len(names) * 3 * size * size <= DECODE_ONCE):
        images, kept = decoded_once(names, size, content_key(key, size), bad, progress)
        table = table.keep(kept)
    else:
        table = table.keep(readable(names, key, bad, progress)) if on_error == "skip" else table
        images = Pictures(table.pictures, size)
    key = content_key(key, table.captions.texts.digest(), table.captions.first.tolist()[:: max(1, len(names) // 1000)])
    return Pairs(images, table.captions, key, name, table.pictures, table.skipped)
