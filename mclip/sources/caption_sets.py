"""Named sets of pictures with captions, and the command ``download``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from mclip.config import ConfigError, closest, require
from mclip.files import atomic_path, cache_dir
from mclip.sources.downloads import DownloadError, extract, fetch, human_size
from mclip.sources.zero_shot import TORCHVISION_SETS, torchvision_set

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Archive:
    """A file to download, and the folder of it that is unpacked under the same name.

    ``size`` is in bytes; where no number could be confirmed it is None, and ``about`` says what people report. With
    ``whole`` all of the file is unpacked as ``folder``, because it has no such folder itself.
    """

    folder: str
    url: str
    checksum: str
    size: int | None = None
    about: str = ""
    whole: bool = False

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.url} ({human_size(self.size) if self.size else self.about})"


_STORED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SOURCES: dict[str, dict[str, list[Archive]]] = {
    name: {split: [Archive(key, **_STORED["archives"][key]) for key in keys] for split, keys in splits.items()}
    for name, splits in _STORED["sets"].items()
}


def caption_set(name: str, root_dir: str | Path | None = None, download: bool = False, split: Split = "train") -> Path:
    """The file of a named set that ``load_pairs`` reads: of "coco" (COCO 2017) JSON, of "flickr8k" CSV.

    ``root_dir/name`` (default: in the cache folder) is looked at first. ``download`` fetches what is missing, and
    unpacks archives that were placed there by hand; once unpacked, the archives may be deleted. COCO may also lie
    as its zip files unpack: ``annotations/``, ``train2017/`` and ``val2017/``.

    Raises: ConfigError where files are missing, which says how to get them; DownloadError.
    """
    require(name in SOURCES, "name", name, closest(name, SOURCES))
    require(split in SOURCES[name], "split", split, f"{name} has {', '.join(SOURCES[name])}")
    top = Path(root_dir or cache_dir()).expanduser()
    root, archives = top / name, SOURCES[name][split]
    missing = [archive for archive in archives if not (root / archive.folder).is_dir()]
    if missing and not download:
        raise ConfigError(
            f"{name}, split {split!r}: no {' and no '.join(str(root / archive.folder) for archive in missing)}. "
            f"Pass download=True, or run: python -m mclip download {name} --root_dir {top}. Or place "
            f"{' and '.join(map(str, missing))} in {root} yourself, and run the command to unpack them."
        )
    for archive in missing:
        file = fetch(archive.url, root / archive.name, archive.checksum, archive.size)
        extract(file, root / archive.folder, "" if archive.whole else archive.folder)
    return root / "annotations" / f"captions_{split}2017.json" if name == "coco" else _flickr8k_csv(root, split)


def _flickr8k_csv(root: Path, split: str) -> Path:
    """Write, once, the captions of one official split as ``split``.csv; some pictures are in none."""
    path, texts = root / f"{split}.csv", root / "Flickr8k_text"
    if path.is_file():
        return path
    listed = texts / f"Flickr_8k.{'dev' if split == 'val' else split}Images.txt"
    try:
        names = listed.read_text(encoding="utf-8").split()
        # Each line is picture.jpg#0<tab>caption; quoting=3: a quote is a character like any other.
        table = pd.read_csv(
            texts / "Flickr8k.token.txt", sep="\t", names=["key", "caption"], quoting=3, na_filter=False
        )
    except (OSError, ValueError) as error:
        raise DownloadError(
            f"{texts}: not the captions of Flickr8k ({error}); delete it and fetch it again."
        ) from error
    table = table.assign(file_name=table["key"].str.rpartition("#")[0], image_path="Flicker8k_Dataset")
    with atomic_path(path) as temporary:
        columns = ["file_name", "image_path", "caption"]
        table[table["file_name"].isin(names)].to_csv(temporary, columns=columns, index=False)
    return path


def download(name: str, root_dir: str = "") -> None:
    """Fetch a set, resume what was cut off, and print where it lies.

    Args:
        name: coco, flickr8k, or a test set of torchvision such as cifar10.
        root_dir: where sets lie; the cache folder if empty.
    """
    require(name in SOURCES or name in TORCHVISION_SETS, "name", name, closest(name, [*SOURCES, *TORCHVISION_SETS]))
    if name in TORCHVISION_SETS:
        found = torchvision_set(name, root_dir or None, download=True)
        print(f"{name}: {len(found.images)} pictures below {root_dir or cache_dir()}")
        return
    for split in SOURCES[name]:
        print(caption_set(name, root_dir or None, True, split))
