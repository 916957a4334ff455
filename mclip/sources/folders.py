"""Readers of folders: pictures by class or with a text file each, or without captions, and shards of WebDataset.

What is hidden in a folder of pictures, such as ``.ipynb_checkpoints`` and ``._1.jpg``, is never read.
"""

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets import ImageFolder
from tqdm.auto import tqdm

from mclip.files import cache_dir, content_key, missing_folder, read_json
from mclip.pictures import open_picture
from mclip.sources.readers import PICTURES, DataError, Row, fingerprint
from mclip.text_encoder import clean_caption

CLASS_CAPTION = "a photo of a {}"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CAPTION_KEY = re.compile(r"captions?[ ._-]?\d*")


def files_in(path: Path, endings: tuple[str, ...]) -> list[str]:
    """The files below ``path`` with one of ``endings`` in order, at any depth, without what is hidden.

    Other kinds are counted and named, but for text files, which hold captions.
    """
    files: list[str] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up, or to a folder that was read
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    wanted = [file for file in files if file.lower().endswith(endings)]
    others = Counter(Path(file).suffix.lower() or "no suffix" for file in {*files} - {*wanted})
    del others[".txt"]
    if others:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in others.most_common())
        print(f"{path}: {others.total()} files of other kinds left out ({kinds}); read are {', '.join(endings)}.")
    return sorted(wanted)


def read_folder(path: Path) -> Iterator[Row]:
    """Pictures at any depth. The lines of a text file of the same name are a picture's captions.

    Without one, the folder's name is the class of "a photo of a ...".
    """
    for number, file in enumerate(files_in(path, PICTURES)):
        text, folder = Path(file).with_suffix(".txt"), Path(file).parent
        try:
            lines = [line for line in text.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except FileNotFoundError:
            lines = [] if folder == path else [CLASS_CAPTION.format(folder.name.replace("_", " "))]
        except UnicodeDecodeError as error:
            yield number, None, f"{text}: not readable as UTF-8 ({error})"
            continue
        problem = f"{file}: no caption; it needs {text.name} beside it, or a folder named after its class"
        yield number, file if lines else None, lines or problem


def unlabelled_pictures(path: str | Path) -> list[str]:
    """The files of a folder of pictures without captions; DataError where there are none, or where captions are."""
    path = Path(path).expanduser()
    remedy = "unlabelled_data_path is a folder of pictures without captions"
    if not path.is_dir():
        problem = "it may hold captions: give it as train_data_path" if path.is_file() else "no such folder"
        raise DataError(f"{path}: {problem}; {remedy}.")
    files = files_in(path, PICTURES)
    if not files:
        raise DataError(f"{path}: no picture in it; {remedy}.")
    captioned = next((file for file in files if Path(file).with_suffix(".txt").is_file()), None)
    if captioned:
        raise DataError(f"{captioned} has a caption beside it: give {path} as train_data_path; {remedy}.")
    return files


def read_texts(path: str | Path) -> list[str]:
    """The sentences of a text file in UTF-8, one a line. DataError, naming the line, for what cannot be read."""
    path = Path(path).expanduser()
    if path.suffix.lower() != ".txt" or not path.is_file():
        problem = "not a text file" if path.exists() else "no such file"
        raise DataError(f"{path}: {problem}; unpaired_texts_path is a .txt file in UTF-8 with a sentence on each line.")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise DataError(f"{path}, line {line}: not UTF-8 ({error}); save the file as UTF-8.") from error
    for number, line in enumerate(lines, 1):
        if line and not clean_caption(line):
            raise DataError(f"{path}, line {number}: {line!r} has no word in it; mend or delete the line.")
    if not (texts := list(filter(None, lines))):
        raise DataError(f"{path}: no sentence in it; write one on each line.")
    return texts


class VisibleFolder(ImageFolder):
    """torchvision's ImageFolder without what is hidden; pictures are opened as ours."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root), loader=open_picture, is_valid_file=set(files_in(root, PICTURES)).__contains__)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The names of the sub-folders in order, and their numbers; FileNotFoundError if there are none."""
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and entry.name[0] != ".")
        if not names:
            raise FileNotFoundError(f"it has no sub-folder: {directory}")
        return names, {name: number for number, name in enumerate(names)}


def shards_of(path: Path) -> list[str]:
    """The archives that ``path`` names: a .tar file, a folder of them, or a range such as "{00000..00099}.tar".

    A folder with an archive in it is a folder of shards. Those of its sub-folders are read as well.
    """
    span = _RANGE.search(str(path))
    if path.is_dir():
        return files_in(path, (".tar",)) if any(path.glob("*.tar")) else []
    if span is None or path.suffix.lower() != ".tar" or path.is_file():
        return [str(path)] if path.suffix.lower() == ".tar" else []
    first, last = span.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [str(path)[: span.start()] + number + str(path)[span.end() :] for number in numbers]


def read_shards(shards: list[str], caption_key: str, progress: bool) -> Iterator[Row]:
    """The samples of WebDataset shards on a disk, as img2dataset writes them.

    Captions are NAME.txt and what NAME.json holds under "caption", "captions", "caption_2" and so on: text or a list.
    Another ``caption_key`` names one key or one kind of member. Pictures are read in place, in any order.
    """
    row = 0
    for shard in tqdm(shards, "reading shards", disable=not progress, leave=False):
        try:
            samples = _index(shard, caption_key)
        except FileNotFoundError:
            samples = [["", f"{shard}: no such file; give a folder of .tar files, one of them, or a range of them"]]
        for picture, content in samples:
            yield row, picture or None, content
            row += 1


def _index(shard: str, caption_key: str) -> list[list]:
    """Where the picture of each sample lies, and its captions; or nothing, and what is wrong. Kept in the cache.

    Members of one sample share the name up to its first dot. Nothing is unpacked, so a member's name is never a path.
    """
    folder = cache_dir() / "shards" / content_key("captions", caption_key, fingerprint([shard]))
    with missing_folder(folder) as temporary:
        if temporary:
            pictures: dict[str, str] = {}
            captions: dict[str, list] = {}
            samples = []
            try:
                with tarfile.open(shard, "r:") as archive:
                    for member in filter(tarfile.TarInfo.isfile, archive):
                        place, _, base = member.name.rpartition("/")
                        base, _, extension = base.partition(".")
                        name = f"{place}/{base}"
                        own = captions.setdefault(name, [])
                        kind = "caption" if extension == "txt" else extension.removesuffix(".txt")
                        if f".{extension}".lower().endswith(PICTURES):
                            pictures[name] = f"{os.path.abspath(shard)}::{member.offset_data}:{member.size}"
                        elif extension == "json" or _is_caption(kind, caption_key):
                            own += _texts(archive.extractfile(member).read(), extension, caption_key)
            except (tarfile.TarError, EOFError) as error:  # what comes before the damage is read all the same
                samples.append(["", f"{shard}: not a whole WebDataset shard ({error!r}); copy or write it again"])
            for name, own in captions.items():
                lacks = "picture" if name not in pictures else "" if own else "caption"
                problem = f"{shard}: the sample {name!r} has no {lacks}"
                samples.append(["", problem] if lacks else [pictures[name], list(dict.fromkeys(own))])
            (temporary / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    return read_json(folder / "samples.json")


def _is_caption(key: str, caption_key: str) -> bool:
    return key == caption_key or (caption_key == "caption" and _CAPTION_KEY.fullmatch(key) is not None)


def _texts(content: bytes, extension: str, caption_key: str) -> list[str]:
    """The captions in a member; none if it is damaged or empty."""
    try:
        if extension != "json":
            values = [content.decode("utf-8")]
        else:
            values = [value for key, value in json.loads(content).items() if _is_caption(key, caption_key)]
    except (ValueError, AttributeError, RecursionError):  # AttributeError: JSON of another shape
        return []
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    return [text for text in texts if isinstance(text, str) and text.strip()]
