"""Named sets of pictures with captions, and the command ``download``."""

import json
from pathlib import Path
from typing import Literal

import pandas as pd

from mclip.config import ConfigError, closest, get_profile, require
from mclip.files import atomic_path, cache_dir
from mclip.sources.downloads import DownloadError, extract, fetch
from mclip.sources.zero_shot import TORCHVISION_SETS, torchvision_set

_STORED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
ARCHIVES: dict[str, dict[str, str]] = _STORED["archives"]
SETS: dict[str, dict[str, list[str]]] = _STORED["sets"]

OWN_SPLIT = "1,000 photographs by a hash of the name"


def caption_set(
    name: str,
    root_dir: str | Path | None = None,
    download: bool = False,
    split: Literal["train", "val", "test"] = "train",
) -> Path:
    """The file of a named set that ``load_pairs`` reads: of "coco" (COCO 2017) JSON, of "flickr8k" CSV.

    ``root_dir/name`` (default: in the cache folder) is looked at first. ``download`` fetches what is missing, and
    unpacks archives that were placed there by hand; once unpacked, the archives may be deleted. COCO may also lie
    as its zip files unpack: ``annotations/``, ``train2017/`` and ``val2017/``. Flickr8k may lie as ``images/`` and a
    CSV file for each split, as ``OWN_SPLIT`` says.

    Raises: ConfigError where files are missing, which says how to get them; DownloadError.
    """
    require(name in SETS, "name", name, closest(name, SETS))
    require(split in SETS[name], "split", split, f"{name} has {', '.join(SETS[name])}")
    top = Path(root_dir or cache_dir()).expanduser()
    root = top / name
    if (root / "images").is_dir() and (root / f"{split}.csv").is_file():
        return root / f"{split}.csv"
    missing = [folder for folder in SETS[name][split] if not (root / folder).is_dir()]
    if missing and not download:
        archives = [f"{ARCHIVES[folder]['url']} ({ARCHIVES[folder]['size']})" for folder in missing]
        unpack = f" The archives (.tar) in {top} must be unpacked there first." if any(top.glob("*.tar")) else ""
        raise ConfigError(
            f"{name}, split {split!r}: no {' and no '.join(str(root / folder) for folder in missing)}. "
            f"Pass download=True, or run: python -m mclip download {name} --root_dir {top}. Or place "
            f"{' and '.join(archives)} in {root} yourself, and run the command to unpack them.{unpack}"
        )
    for folder in missing:
        url = ARCHIVES[folder]["url"]
        extract(fetch(url, root / url.rpartition("/")[2], ARCHIVES[folder]["checksum"]), root / folder)
    return root / "annotations" / f"captions_{split}2017.json" if name == "coco" else _flickr8k_csv(root, split)


def captions_of(profile: str) -> dict[str, str]:
    """``train_data_path`` and ``val_data_path`` of a profile of photographs, downloaded; nothing of one of scenes."""
    name = get_profile(profile).captions
    splits: tuple[Literal["train", "val"], ...] = ("train", "val") if name else ()
    return {f"{split}_data_path": str(caption_set(name, download=True, split=split)) for split in splits}


def _flickr8k_csv(root: Path, split: str) -> Path:
    """Write, once, the captions of one official split as ``split``.csv; some pictures are in none."""
    path, texts = root / f"{split}.csv", root / "Flickr8k_text"
    if path.is_file():
        return path
    listed = texts / f"Flickr_8k.{'dev' if split == 'val' else split}Images.txt"
    try:
        names = listed.read_text(encoding="utf-8").split()
        # Each line is picture.jpg#0<tab>caption; quoting=3: a quote is a character like any other.
        columns = {"sep": "\t", "names": ["key", "caption"], "quoting": 3, "na_filter": False}
        table = pd.read_csv(texts / "Flickr8k.token.txt", **columns)
    except (OSError, ValueError) as error:
        raise DownloadError(f"{texts}: not the captions of Flickr8k ({error}); delete it, fetch it again.") from error
    table.insert(0, "file_name", table.pop("key").str.rpartition("#")[0])
    table.insert(1, "image_path", "Flicker8k_Dataset")
    with atomic_path(path) as temporary:
        table[table["file_name"].isin(names)].to_csv(temporary, index=False)
    return path


def download(name: str, root_dir: str = "") -> None:
    """Fetch a set, and print where it lies; captions go on where a download was cut off, torchvision's sets begin anew.

    Args:
        name: coco, flickr8k, or a test set of torchvision such as cifar10.
        root_dir: where sets lie; the cache folder if empty.
    """
    require(name in SETS or name in TORCHVISION_SETS, "name", name, closest(name, [*SETS, *TORCHVISION_SETS]))
    if name in TORCHVISION_SETS:
        pictures = torchvision_set(name, root_dir or None, download=True).images
        print(f"{name}: {len(pictures)} pictures below {root_dir or cache_dir()}")
    for split in SETS.get(name, ()):
        print(caption_set(name, root_dir or None, True, split))
