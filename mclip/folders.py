"""Readers of folders: pictures by class or with a text file each, and WebDataset shards as img2dataset writes them."""

from __future__ import annotations

import json
import os
import re
import tarfile
from pathlib import Path

from tqdm.auto import tqdm

from .files import cache_dir, content_key, missing_folder, write_json
from .pictures import IN_ARCHIVE, fingerprint
from .readers import DataError, OnError, Table, TableBuilder

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
CLASS_CAPTION = "a photo of a {}"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def read_folder(path: Path, on_error: OnError) -> Table:
    """Pictures at any depth: the lines of the text file of the same name are captions; without one, the folder's
    name is the class of "a photo of a ..."."""
    builder = TableBuilder(path, on_error, "picture")
    files = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(path, followlinks=True)
        for name in names
        if name.lower().endswith(PICTURES)
    )
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
