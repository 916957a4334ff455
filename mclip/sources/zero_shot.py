"""Zero-shot test sets: the ones of torchvision that CLIP is judged on, and folders of pictures.

Class names and templates in ``zero_shot_sets.json`` are those published with CLIP, as is which metric each set is
judged by; torchvision and open_clip have the rest. Of CLIP's 27 sets (Radford et al. 2021, Table 9) torchvision offers
those below, and PASCAL VOC, KITTI and two sets of videos, whose labels or pictures would have to be made first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from torch.utils.data import Dataset
from torchvision import datasets

from mclip.config import ConfigError, closest, require
from mclip.evaluate import ZeroShotSet
from mclip.files import cache_dir
from mclip.sources.folders import VisibleFolder

PHOTO_TEMPLATES = ["a photo of a {}"]


def _spaces(name: str) -> str:
    return name.replace("_", " ")


def _from_three(count: int) -> int:
    return count - 3


@dataclass(frozen=True)
class _Source:
    """How torchvision builds a set, where below ``root_dir`` it looks, how its class names become words."""

    build: Callable[..., Dataset]
    layout: str
    settings: Mapping[str, Any] = field(default_factory=lambda: {"split": "test"})
    rename: Callable[[str], str] = _spaces
    downloads: bool = True
    folder: str = ""


_WHOLE: Mapping[str, Any] = {}  # the set has no official split: all of it is the test set
_SOURCES: dict[str, _Source] = {
    "caltech101": _Source(datasets.Caltech101, "caltech101/101_ObjectCategories/", _WHOLE),
    "caltech256": _Source(
        datasets.Caltech256,
        "caltech256/256_ObjectCategories/",
        _WHOLE,
        lambda name: re.sub(r"^\d+\.|-101$", "", name).replace("-", " "),
    ),
    "cifar10": _Source(datasets.CIFAR10, "cifar-10-batches-py/", {"train": False}),
    "cifar100": _Source(datasets.CIFAR100, "cifar-100-python/", {"train": False}),
    "clevr_counts": _Source(  # the test split has no labels; a picture shows 3 to 10 objects
        datasets.CLEVRClassification, "clevr/CLEVR_v1.0/", {"split": "val", "target_transform": _from_three}
    ),
    "country211": _Source(datasets.Country211, "country211/test/"),
    "dtd": _Source(datasets.DTD, "dtd/dtd/"),
    "eurosat": _Source(datasets.EuroSAT, "eurosat/2750/", _WHOLE),
    "fer2013": _Source(datasets.FER2013, "fer2013/fer2013.csv", downloads=False),
    "fgvc_aircraft": _Source(
        datasets.FGVCAircraft, "fgvc-aircraft-2013b/data/", {"split": "test", "annotation_level": "variant"}
    ),
    "flowers102": _Source(datasets.Flowers102, "flowers-102/"),
    "food101": _Source(datasets.Food101, "food-101/"),
    "gtsrb": _Source(datasets.GTSRB, "gtsrb/GTSRB/Final_Test/Images/ and gtsrb/GT-final_test.csv"),
    "imagenet": _Source(
        datasets.ImageNet,
        "imagenet/ILSVRC2012_img_val.tar and imagenet/ILSVRC2012_devkit_t12.tar.gz",
        {"split": "val"},
        downloads=False,
        folder="imagenet",
    ),
    "mnist": _Source(datasets.MNIST, "MNIST/raw/", {"train": False}),
    "oxford_pets": _Source(datasets.OxfordIIITPet, "oxford-iiit-pet/"),
    "pcam": _Source(datasets.PCAM, "pcam/camelyonpatch_level_2_split_test_x.h5 and ..._y.h5"),
    "rendered_sst2": _Source(datasets.RenderedSST2, "rendered-sst2/test/"),
    "stanford_cars": _Source(
        datasets.StanfordCars,
        "stanford_cars/cars_test/, stanford_cars/devkit/ and stanford_cars/cars_test_annos_withlabels.mat",
        downloads=False,
    ),
    "stl10": _Source(datasets.STL10, "stl10_binary/"),
    "sun397": _Source(datasets.SUN397, "SUN397/", _WHOLE, lambda name: _spaces(name).replace("/", " ")),
    "svhn": _Source(datasets.SVHN, "test_32x32.mat"),
}
TORCHVISION_SETS = tuple(_SOURCES)


def torchvision_set(name: str, root_dir: str | Path | None = None, download: bool = False) -> ZeroShotSet:
    """The test split of one of ``TORCHVISION_SETS`` (all of a set that has no splits).

    ``root_dir`` (default: the cache folder) is looked at first. With ``download`` torchvision fetches what is missing,
    and compares its checksums.

    Raises: ConfigError for an unknown name, and for missing or damaged files; it says where the files go.
    """
    require(name in _SOURCES, "dataset", name, closest(name, _SOURCES))
    source, root = _SOURCES[name], Path(root_dir or cache_dir()).expanduser()
    settings = {**source.settings, **({"download": download} if source.downloads else {})}
    try:
        data: Any = source.build(str(root / source.folder), **settings)
        _, label = data[0]  # a library that is missing, or labels, would show only now
    except ModuleNotFoundError as error:
        library = str(error.name).split(".")[0]
        raise ConfigError(f"dataset={name!r} needs {library}: pip install {library}.") from error
    except (RuntimeError, OSError, IndexError) as error:
        fetched = "let it be downloaded (download=True; in a command, --download true), or "
        advice = fetched if source.downloads and not download else ""
        advice += "" if source.downloads else "it cannot be downloaded from here: "
        raise ConfigError(
            f"dataset={name!r} cannot be read below root_dir={str(root)!r} ({error}); "
            f"{advice}place its files there so that {root / source.layout} exists."
        ) from error
    require(label is not None, "dataset", name, f"these files have no labels; place {root / source.layout} there")
    found = getattr(data, "classes", None) or getattr(data, "categories", None)
    stored = json.loads(resources.files("mclip.sources").joinpath("zero_shot_sets.json").read_text(encoding="utf-8"))
    if name == "imagenet":
        stored["class_names"][name] = list(IMAGENET_CLASSNAMES)
        stored["templates"][name] = [fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES]
    class_names = stored["class_names"].get(name) or [source.rename(c) for c in found or []]
    count, expected = len(found or class_names), len(class_names)
    remedy = f"{root / source.layout} holds {count} classes, not {expected}; place the files there again"
    require(count == expected, "dataset", name, remedy)
    split = "all" if source.settings is _WHOLE else source.settings.get("split", "test")
    metric = "mean_per_class_recall" if name in stored["mean_per_class_recall"] else "top1"
    return ZeroShotSet(name, data, None, class_names, stored["templates"][name], split, metric)


def image_folder_set(path: str | Path, templates: Sequence[str] = PHOTO_TEMPLATES) -> ZeroShotSet:
    """Pictures in one sub-folder per class, named after the class: ``path/<class>/*.jpg``.

    A last component train, val or test names the split, and the folder above it the set.
    """
    path = Path(path).expanduser().resolve()  # "." has a name only as a whole path
    try:
        data = VisibleFolder(path)
    except OSError as error:
        raise ConfigError(f"{path}: not a folder of pictures, one sub-folder per class ({error}).") from error
    named = path.name in ("train", "val", "test")
    name, split = (path.parent.name, path.name) if named else (path.name, "all")
    return ZeroShotSet(name, data, None, [_spaces(c) for c in data.classes], list(templates), split)


def zero_shot_set(
    name: str | Path,
    root_dir: str | Path | None = None,
    download: bool = False,
    embedded: Mapping[str, ZeroShotSet] | None = None,
) -> ZeroShotSet:
    """The set that ``name`` means: one of ``embedded``, one of torchvision's, or a folder of pictures."""
    embedded = embedded or {}
    if name in embedded:
        return embedded[str(name)]
    if str(name) not in _SOURCES and str(name) and Path(name).expanduser().is_dir():
        return image_folder_set(name)
    known = [*embedded, *_SOURCES]
    remedy = f"{closest(str(name), known)} (or name a folder of pictures)"
    require(str(name) in known, "dataset", str(name), remedy)
    return torchvision_set(str(name), root_dir, download)
