"""Zero-shot test sets: the ones of torchvision that CLIP is judged on, excerpts of four, and folders of pictures.

Class names and templates in ``zero_shot_sets.json`` are those published with CLIP, as is which metric each set is
judged by; torchvision and open_clip have the rest. Of CLIP's 27 sets (Radford et al. 2021, Table 9) torchvision offers
those below, and PASCAL VOC, KITTI and two sets of videos, whose labels or pictures would have to be made first.
"""

import hashlib
import json
import operator
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from torch.utils.data import Subset
from torchvision import datasets

from mclip.config import ConfigError, closest, require
from mclip.evaluate import ZeroShotSet
from mclip.files import cache_dir
from mclip.sources.folders import VisibleFolder

_STORED = json.loads(Path(__file__).with_name("zero_shot_sets.json").read_text(encoding="utf-8"))
_SETS: dict[str, dict[str, Any]] = _STORED["sets"]
TORCHVISION_SETS = tuple(_SETS)
EXCERPTS: dict[str, list[str]] = _STORED["excerpts"]
"""Folders of pictures by class, by the set that they are of, and what of the official set each holds."""
Part = Literal["choose", "report", "all"]


def torchvision_set(name: str, root_dir: str | Path | None = None, download: bool = False) -> ZeroShotSet:
    """The test split of one of ``TORCHVISION_SETS``; all of a set that has no official splits.

    ``root_dir`` (default: the cache folder) is looked at first. With ``download`` torchvision fetches what is missing,
    and compares its checksums.

    Raises: ConfigError for an unknown name, and for missing or damaged files; it says where the files go.
    """
    require(name in _SETS, "dataset", name, closest(name, _SETS))
    source, root = _SETS[name], Path(root_dir or cache_dir()).expanduser()
    settings, layout, downloads = source["settings"], root / source["layout"], source.get("downloads", True)
    options = settings | ({"download": download} if downloads else {})
    if "first_label" in source:
        options["target_transform"] = partial(operator.add, -source["first_label"])
    try:
        data: Any = getattr(datasets, source["dataset"])(str(root / source.get("folder", "")), **options)
        _, label = data[0]  # a library that is missing, or labels, would show only now
    except ModuleNotFoundError as error:
        library = str(error.name).split(".")[0]
        raise ConfigError(f"dataset={name!r} needs {library}: pip install {library}.") from error
    except (RuntimeError, OSError, IndexError) as error:
        advice = "" if download else "let it be downloaded (download=True; in a command, --download true), or "
        advice = advice if downloads else "it cannot be downloaded from here: "
        raise ConfigError(
            f"dataset={name!r} cannot be read below root_dir={str(root)!r} ({error}); "
            f"{advice}place its files there so that {layout} exists."
        ) from error
    require(label is not None, "dataset", name, f"these files have no labels; place {layout} there")
    classes = getattr(data, "classes", None) or getattr(data, "categories", None) or ()
    own_names = [each if isinstance(each, str) else each[0] for each in classes]  # Imagenette's have synonyms
    class_names, templates = published_words(name, own_names)
    right = not own_names or len(own_names) == len(class_names)
    remedy = f"{layout} holds {len(own_names)} classes, not {len(class_names)}; place the files there again"
    require(right, "dataset", name, remedy)
    metric = "mean_per_class_recall" if name in _STORED["mean_per_class_recall"] else "top1"
    split = settings.get("split", "test") if settings else "all"
    return ZeroShotSet(name, data, None, class_names, templates, split, metric)


def published_words(name: str, own_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The class names and the templates published with CLIP for a set; where there are no such names, its own."""
    if name == "imagenet":
        return list(IMAGENET_CLASSNAMES), [fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES]
    class_names = _STORED["class_names"].get(name)
    if not class_names:
        class_names = list(own_names)
        for pattern, replacement in _SETS[name].get("rename", [("_", " ")]):
            class_names = [re.sub(pattern, replacement, each) for each in class_names]
    return class_names, _STORED["templates"][name]


def photograph_set(name: str, root_dir: str | Path = "", part: Part = "report", download: bool = False) -> ZeroShotSet:
    """One of ``EXCERPTS`` from its folder below ``root_dir`` if it is there, else torchvision's official test split.

    A test set without a part for validation gives a fifth of its pictures, by a hash of each file's name, or of its
    number where torchvision knows no names, for choosing; results are of the rest. Raises: ConfigError where neither is
    there, as :func:`torchvision_set`.
    """
    root, (folder, split) = Path(root_dir or cache_dir()).expanduser(), EXCERPTS[name]
    if (root / folder).is_dir():
        data = VisibleFolder(root / folder)
        test = ZeroShotSet(name, data, None, *published_words(name, data.classes), split)
    else:
        test = torchvision_set(name, root, download)
    if part == "all":
        return test
    samples = getattr(test.images, "samples", None) or getattr(test.images, "_samples", None)
    names = ["/".join(Path(file).parts[-2:]) for file, _ in samples] if samples else map(str, range(len(test.images)))
    fifth = [int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 == 0 for name in names]
    rows = [row for row, chosen in enumerate(fifth) if chosen == (part == "choose")]
    fraction = "a fifth, to choose by" if part == "choose" else "four fifths"
    return replace(test, images=Subset(test.images, rows), split=f"{test.split} ({fraction})")


def zero_shot_set(name: str | Path, root_dir: str | Path | None = None, download: bool = False) -> ZeroShotSet:
    """One of torchvision's sets, or a folder of pictures in one sub-folder per class: ``name/<class>/*.jpg``.

    If a folder is called train, val or test, that is the split, and the folder above it names the set.

    Raises: ConfigError where ``name`` is neither, or as :func:`torchvision_set`.
    """
    if str(name) in _SETS:
        return torchvision_set(str(name), root_dir, download)
    remedy = f"{closest(str(name), _SETS)} (or name a folder of pictures)"
    require(str(name) != "" and Path(name).expanduser().is_dir(), "dataset", str(name), remedy)
    path = Path(name).expanduser().resolve()  # "." has a name only as a whole path
    try:
        data = VisibleFolder(path)
    except OSError as error:
        raise ConfigError(f"{path}: not a folder of pictures, one sub-folder per class ({error}).") from error
    named = path.name in ("train", "val", "test")
    name, split = (path.parent.name, path.name) if named else (path.name, "all")
    class_names = [folder.replace("_", " ") for folder in data.classes]
    return ZeroShotSet(name, data, None, class_names, ["a photo of a {}"], split)
