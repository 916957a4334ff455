"""The photograph sets: four zero-shot test sets and the captions of Flickr8k, in archives' folders or as published.

A test set without a part for validation gives a fifth of its pictures, by a hash of each file's name, for choosing;
results are of the rest.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch.utils.data import Subset

from mclip.evaluate import ZeroShotSet
from mclip.files import cache_dir
from mclip.sources.caption_sets import caption_set
from mclip.sources.folders import VisibleFolder
from mclip.sources.zero_shot import published_words, torchvision_set

Part = Literal["choose", "report", "all"]
EXCERPTS = {
    "cifar10": ("cifar10-test", "test"),
    "food101": ("food101-64px", "20 of 250 test photographs a class, 64 px"),
    "caltech101": ("caltech101-40", "up to 40 photographs a class, chosen by hash"),
    "imagenette": ("imagenette-val", "val"),
}
"""Folders of pictures by class, and what of the official set each holds."""
OWN_SPLIT = "1,000 photographs by a hash of the name"


def photograph_set(name: str, root_dir: str | Path = "", part: Part = "report", download: bool = False) -> ZeroShotSet:
    """One of ``EXCERPTS`` from its folder below ``root_dir`` if it is there, else torchvision's official test split.

    Raises: ConfigError where neither is there, as :func:`~mclip.sources.zero_shot.torchvision_set`.
    """
    root, (folder, split) = Path(root_dir or cache_dir()).expanduser(), EXCERPTS[name]
    if not (root / folder).is_dir():
        return part_of(torchvision_set(name, root, download), part)
    data = VisibleFolder(root / folder)
    class_names, templates = published_words(name, data.classes)
    return part_of(ZeroShotSet(name, data, None, class_names, templates, split), part)


def part_of(test: ZeroShotSet, part: Part) -> ZeroShotSet:
    """A fifth of the pictures, to choose by, or the others, to report."""
    if part == "all":
        return test
    samples = getattr(test.images, "samples", None)
    names = ["/".join(Path(file).parts[-2:]) for file, _ in samples] if samples else map(str, range(len(test.images)))
    fifth = [int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 == 0 for name in names]
    rows = [row for row, chosen in enumerate(fifth) if chosen == (part == "choose")]
    fraction = "a fifth, to choose by" if part == "choose" else "four fifths"
    return replace(test, images=Subset(test.images, rows), split=f"{test.split} ({fraction})")


def flickr8k(split: Literal["train", "val", "test"], root_dir: str | Path = "", download: bool = False) -> Path:
    """The captions of a split of Flickr8k: below ``root_dir`` as a CSV, or the official split."""
    folder = Path(root_dir or cache_dir()).expanduser() / "flickr8k"
    if (folder / "images").is_dir() and (folder / f"{split}.csv").is_file():
        return folder / f"{split}.csv"
    return caption_set("flickr8k", root_dir or None, download, split)
