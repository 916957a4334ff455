"""Pairs of pictures and captions: readers for drawn scenes, CSV and COCO Captions, and the batches of an epoch.

Whatever the source, training reads one form: pictures decoded once to uint8 at the student's size, kept
memory-mapped in the cache, and five or so captions for each, tokenised once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .batches import Batch as Batch
from .batches import BatchSource as BatchSource
from .batches import Targets as Targets
from .batches import join_targets as join_targets
from .batches import normalise as normalise
from .config import require
from .files import content_key
from .readers import DataError as DataError
from .readers import OnError, decode_images, read_csv, read_json
from .scenes import DRAWING_VERSION, SceneConfig, make_scenes

SCENES = "scenes"


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
            self,
            images=self.images[rows],
            captions=[self.captions[r] for r in rows],
            key=content_key(self.key, data_size, seed),
            files=self.files and [self.files[r] for r in rows],
        )


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
    progress: bool = True,
) -> Pairs:
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
        key = content_key("scenes", DRAWING_VERSION, config, image_size)
        return Pairs(drawn.images, drawn.captions, key, f"scenes-{config.split}").fraction(data_size, seed)
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give 'scenes', a .csv file or a COCO Captions .json file.")
    if path.suffix.lower() not in (".csv", ".json"):
        raise DataError(f"{path}: unknown kind {path.suffix!r}; give a .csv file or a COCO Captions .json file.")
    rows, skipped = (
        read_json(path, on_error)
        if path.suffix.lower() == ".json"
        else read_csv(path, image_key, caption_key, on_error)
    )
    files: dict[Path, list[str]] = {}
    places: dict[Path, str] = {}
    for file, caption, place in rows:
        files.setdefault(file, []).append(caption)
        places.setdefault(file, place)
    if not files:
        raise DataError(f"{path}: no usable rows; it needs at least one picture with a caption.")
    images, kept, key = decode_images(list(files), image_size, on_error, progress, list(places.values()))
    names = list(files)
    captions = [files[names[i]] for i in kept]
    skipped += sum(len(own) for own in files.values()) - sum(len(own) for own in captions)
    if skipped:
        print(f"{path}: {skipped} rows left out (on_error='skip').")
    pairs = Pairs(images, captions, content_key(key, captions), path.stem, [names[i] for i in kept], skipped)
    return pairs.fraction(data_size, seed)
