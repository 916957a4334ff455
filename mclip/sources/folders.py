"""Readers of folders: pictures by class or with a text file each, and WebDataset shards as img2dataset writes them.

What is hidden in a folder of pictures is never read.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file
from tqdm.auto import tqdm

from mclip.files import cache_dir, content_key, missing_folder, write_json
from mclip.pictures import IN_ARCHIVE, fingerprint, open_picture
from mclip.sources.readers import DataError, OnError, Table, TableBuilder

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
CLASS_CAPTION = "a photo of a {}"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def hidden(name: str) -> bool:
    """Whether a file or folder is hidden, as what tools keep for themselves is: ``.ipynb_checkpoints``, ``._1.jpg``."""
    return name.startswith(".")


def read_folder(path: Path, on_error: OnError) -> Table:
    """Pictures at any depth: the lines of the text file of the same name are captions; without one, the folder's
    name is the class of "a photo of a ...". What is hidden is left out."""
    builder = TableBuilder(path, on_error, "picture")
    files = []
    for folder, subfolders, names in os.walk(path, followlinks=True):
        subfolders[:] = [name for name in subfolders if not hidden(name)]
        files += [os.path.join(folder, name) for name in names if name.lower().endswith(PICTURES) and not hidden(name)]
    files.sort()
    for number, file in enumerate(files):
        text = Path(file).with_suffix(".txt")
        folder = Path(file).parent
        if text.is_file():
            try:
                lines = [line for line in text.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            except UnicodeDecodeError as error:
                builder.bad(f"{text}: not readable as UTF-8 ({error})")
                continue
        else:
            lines = [] if folder == path else [CLASS_CAPTION.format(folder.name.replace("_", " "))]
        if not lines:
            builder.bad(f"{file}: no caption; it needs {text.name} beside it, or a folder named after its class")
        for line in lines:
            builder.add(file, line, number)
    return builder.table()


class VisibleFolder(ImageFolder):
    """torchvision's ImageFolder without what is hidden, such as ``.ipynb_checkpoints``; pictures are read as ours."""

    def __init__(self, root: Path) -> None:
        def seen(file: str) -> bool:
            return is_image_file(file) and not any(map(hidden, Path(file).relative_to(root).parts))

        super().__init__(str(root), loader=open_picture, is_valid_file=seen)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The names of the sub-folders in order, and their numbers; FileNotFoundError if there are none."""
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and not hidden(entry.name))
        if not names:
            raise FileNotFoundError(f"it has no sub-folder: {directory}")
        return names, {name: number for number, name in enumerate(names)}


def shards_of(source: str) -> list[str]:
    """The archives that ``source`` names: a folder of .tar files, one file, or a range "{00000..00099}.tar"."""
    found = _RANGE.search(source)
    if found:
        first, last = found.groups()
        numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
        shards = [source[: found.start()] + number + source[found.end() :] for number in numbers]
    else:
        shards = sorted(map(str, Path(source).glob("*.tar"))) if Path(source).is_dir() else [source]
    for shard in shards:
        if not os.path.isfile(shard):
            raise DataError(f"{shard}: no such file; give a folder of .tar files, one of them, or a range of them.")
    return shards


def _index(shard: str) -> list[list[str]]:
    """(where the picture lies, caption) of each sample of a shard that has both; kept in the cache.

    Members of one sample share the name up to its first dot. Nothing is unpacked, so a member's name is never a path.
    """
    folder = cache_dir() / "shards" / content_key("shard", fingerprint([shard]))
    with missing_folder(folder) as temporary:
        if temporary:
            samples: dict[str, list[str]] = {}
            try:
                with tarfile.open(shard, "r:") as archive:
                    for member in archive:
                        base, _, extension = member.name.rpartition("/")[2].partition(".")
                        sample = samples.setdefault(f"{member.name.rpartition('/')[0]}/{base}", ["", ""])
                        if not member.isfile():
                            continue
                        if f".{extension.lower()}" in PICTURES:
                            sample[0] = f"{os.path.abspath(shard)}{IN_ARCHIVE}{member.offset_data}:{member.size}"
                        elif extension in ("txt", "json") and (extension == "txt" or not sample[1]):
                            content = archive.extractfile(member).read().decode("utf-8")
                            sample[1] = content if extension == "txt" else str(json.loads(content)["caption"] or "")
            except (tarfile.TarError, ValueError, KeyError, TypeError, OSError, EOFError) as error:
                raise DataError(
                    f"{shard}: not a WebDataset shard ({error!r}); it needs members NAME.jpg with NAME.txt, or "
                    "NAME.json with a 'caption'. Copy or write it again."
                ) from error
            write_json(temporary / "samples.json", [[name, *sample] for name, sample in samples.items()])
    return json.loads((folder / "samples.json").read_text(encoding="utf-8"))


def read_shards(source: str, on_error: OnError, progress: bool) -> Table:
    """WebDataset shards on a disk. Pictures are read in place, in any order; the archives' indexes are cached."""
    builder = TableBuilder(Path(source), on_error, "sample")
    row = 0
    for shard in tqdm(shards_of(source), "reading shards", disable=not progress, leave=False):
        for name, picture, caption in _index(shard):
            if picture:
                builder.add(picture, caption, row)
            else:
                builder.bad(f"{shard}: the sample {name} has no picture ({', '.join(PICTURES)})")
            row += 1
    return builder.table()
