"""Readers of captions: CSV and TSV tables, COCO Captions and Karpathy's JSON.

Each reader yields rows. :func:`collect` checks them, stops at bad ones or leaves them out, and puts the captions of each
picture together. Millions of paths and captions are kept in arrays of numpy's StringDType.
"""

from __future__ import annotations

import codecs
import csv
import errno
import io
import json
import os
import re
import stat
from array import array
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import pandas as pd

from mclip.config import closest, require
from mclip.pictures import NO_FILE
from mclip.text_encoder import clean_caption

OnError = Literal["raise", "skip"]
Row = tuple[int, str | None, Any]
"""The number of a row, its picture, and its caption or a list of captions; without a picture, what is wrong with it."""
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_TEXT = np.dtypes.StringDType()
_WORDS = re.compile(r"[A-Za-z0-9]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TSV_FIELD = re.compile(r'(?:^|\t)(?:"((?:[^"]|"")*)"(?=\t|$)|([^\t]*))')
_AT_ONCE = 20_000  # rows


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line or picture, and the remedy."""


class CaptionLists(Sequence[list[str]]):
    """For each picture the list of its captions.

    Args:
        texts: (M,) of numpy's StringDType: all captions, those of one picture side by side.
        first: (N + 1,) position of each picture's first caption, and M.
    """

    def __init__(self, texts: np.ndarray, first: np.ndarray) -> None:
        self.texts, self.first = texts, first

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        row = range(len(self))[place]
        return self.texts[self.first[row] : self.first[row + 1]].tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


@dataclass(frozen=True)
class Table:
    """``pictures`` (N,) by name, the ``captions`` and the first row of each, and the number of rows left out."""

    pictures: np.ndarray
    captions: CaptionLists
    rows: np.ndarray
    where: str
    skipped: int

    def take(self, numbers: Sequence[int] | np.ndarray) -> Table:
        """The table of the pictures with these numbers, in their order."""
        before, numbers = self.captions.first, np.asarray(numbers, np.int64)
        counts = np.diff(before)[numbers]
        first = np.concatenate([[0], np.cumsum(counts)])
        texts = self.captions.texts[np.arange(first[-1]) + np.repeat(before[numbers] - first[:-1], counts)]
        captions = CaptionLists(texts, first)
        return Table(self.pictures[numbers], captions, self.rows[numbers], self.where, self.skipped)


def reject(message: str, on_error: OnError) -> None:
    """DataError with the remedy, unless bad rows are to be left out."""
    if on_error == "raise":
        raise DataError(f"{message}; mend the row, or pass on_error='skip'.")


def collect(source: str | Path, label: str, rows: Iterable[Row], on_error: OnError) -> Table:
    """The table of ``rows``; captions of one picture may lie apart. ``label`` says what a row's number counts.

    Raises: DataError at the first bad row unless ``on_error`` is "skip", and if no row is left.
    """
    where, skipped = f"{source}, {label}", 0
    numbers: dict[str, int] = {}
    first_rows, owners, texts, arrays = array("q"), array("q"), [], []
    for row, picture, content in rows:
        captions = content if isinstance(content, list) else (content,)
        for caption in captions or (None,):
            if problem := caption if picture is None else _problem(picture, caption):
                reject(f"{where} {row}: {problem}", on_error)
                skipped += 1
                continue
            number = numbers.setdefault(picture, len(first_rows))
            if number == len(first_rows):
                first_rows.append(row)
            owners.append(number)
            texts.append(caption)
        if len(texts) >= _AT_ONCE:
            arrays.append(np.array(texts, _TEXT))
            texts.clear()
    if not numbers:
        raise DataError(f"{source}: no usable rows; it needs at least one picture with a caption.")
    captions, owner = np.concatenate([*arrays, np.array(texts, _TEXT)]), np.array(owners)
    if np.any(np.diff(owner) < 0):
        order = np.argsort(owner, kind="stable")
        captions, owner = captions[order], owner[order]
    first = np.searchsorted(owner, np.arange(len(numbers) + 1))
    pictures = np.array(list(numbers), _TEXT)
    return Table(pictures, CaptionLists(captions, first), np.array(first_rows), where, skipped)


def _problem(picture: str, caption: Any) -> str:
    """What is wrong with a pair; empty if nothing."""
    if type(caption) is str and caption.isascii() and picture.isascii() and _WORDS.search(caption):
        return ""  # the usual case, told apart quickly
    if not isinstance(caption, str):
        return f"the caption is {str(caption)[:40]}, not a text"
    if _WORDS.search(caption) is None and clean_caption(caption) == "":
        return "the caption is empty"
    for text in (picture, caption):
        if not text.isascii() and _SURROGATE.search(text):
            return f"{text!r} is not valid Unicode"
    return ""


class Finder:
    """Finds pictures. Each folder is listed once, since asking the system for every file takes five times as long."""

    def __init__(self) -> None:
        self._names = cache(self._list)

    @staticmethod
    def _list(folder: str) -> set[str]:
        try:
            return set(os.listdir(folder or os.sep))
        except OSError as error:
            if error.errno not in {*NO_FILE, errno.EACCES}:
                raise
        except ValueError:  # a NUL in the name
            pass
        return set()

    def find(self, name: str, folders: Sequence[str]) -> str | None:
        """The path of the picture ``name`` in the first of ``folders`` that has it; a name may also be a whole path.

        Raises: OSError if the system cannot tell whether a file exists.
        """
        for folder in folders:
            if name in self._names(folder):  # the usual case, told apart quickly
                return f"{folder}{os.sep}{name}"
        name = os.path.expanduser(name)
        for path in [name] if os.path.isabs(name) else [f"{folder}{os.sep}{name}" for folder in folders]:
            folder, _, base = path.rpartition(os.sep)
            if (base and base in self._names(folder)) or _is_file(path):
                return path
        return None


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
    except ValueError:  # a NUL in the name
        pass
    return False


def read_csv(path: Path, image_key: str, caption_key: str, separator: str = "") -> Iterator[Row]:
    """The rows of a CSV or TSV file in UTF-8, or in UTF-16 with a byte-order mark.

    ``separator`` is a tab for .tsv files and else a comma, unless one is given. An ``image_path`` column holds the
    folder, relative to the file. Without the two keys, open_clip's columns ``filepath`` and ``title`` are taken.
    """
    separator = separator.replace("\\t", "\t") or ("\t" if path.suffix.lower() == ".tsv" else ",")
    require(len(separator) == 1, "csv_separator", separator, "give one character, such as ';'")
    with path.open("rb") as file:
        utf_16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, parent, finder = "utf-16" if utf_16 else "utf-8-sig", str(path.parent), Finder()
    folder_of = cache(lambda folder: str(Path(parent, os.path.expanduser(folder))))
    with path.open(newline="", encoding=encoding) as handle:
        try:
            records = _records(handle, separator)
            _, header, _, problem = next(records, (0, "", 0, ""))
            if problem or not header:
                problem = problem or "the file is empty; it needs a header line such as file_name,image_path,caption"
                raise DataError(f"{path}: {problem}.")
            names, keys = _columns(path, header, separator, image_key, caption_key)
            places = [names.index(key) for key in ("image_path", *keys) if key in names]
            while chunk := list(islice(records, _AT_ONCE)):
                whole = "".join(text for _, text, fields, problem in chunk if not problem and fields <= len(names))
                columns = _parse(whole, separator, len(names), places)
                for line, _, fields, problem in chunk:
                    if problem:
                        yield line, None, problem
                    elif fields > len(names):
                        remedy = f"put a text that holds {separator!r} in double quotes"
                        yield line, None, f"{fields} fields, but the header has {len(names)}: {remedy}"
                    else:
                        *folders, name, caption = next(columns)
                        folder = folder_of(folders[0]) if folders else parent
                        picture = finder.find(name, [folder])
                        yield line, picture, caption if picture else f"no picture at {os.path.join(folder, name)}"
        except UnicodeDecodeError as error:
            where = "" if utf_16 else f", line {_undecodable_line(path)}"
            raise DataError(f"{path}{where}: not readable as UTF-8 ({error}); save it as UTF-8 text.") from error


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as file:
        return next(number for number, line in enumerate(file, 1) if "\ufffd" in line.decode("utf-8", "replace"))


def _parse(text: str, separator: str, width: int, places: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """The columns at ``places`` of each record in ``text``; fields that a short record lacks are empty."""
    if not text:
        return iter(())
    frame = pd.read_csv(
        io.StringIO(text),
        sep=separator,
        header=None,
        names=range(width),
        usecols=sorted(places),
        dtype=str,
        index_col=False,
        keep_default_na=False,
        skip_blank_lines=False,
    )
    return zip(*(frame[place].tolist() for place in places), strict=True)


def _records(handle: TextIO, separator: str) -> Iterator[tuple[int, str, int, str]]:
    """For each record: its first line, its text as pandas reads it, the number of its fields, and what is wrong.

    pandas drops surplus fields without a word, and after a stray quote it joins lines. Here only lines with a quote need
    a parser. After a bad record the reading goes on at the next line.
    """
    ahead: deque[str] = deque()
    number = 1
    while line := ahead.popleft() if ahead else handle.readline():
        following: list[str] = []
        problem, fields = "", line.count(separator) + 1
        if '"' in line and separator == "\t":
            # A quote that is not closed on its line is a character like any other, so all fields are quoted anew.
            found = [quoted or plain.replace('"', '""') for quoted, plain in _TSV_FIELD.findall(line.rstrip("\r\n"))]
            line, fields = separator.join(f'"{field}"' for field in found) + "\n", len(found)
        elif '"' in line:
            try:
                reader = csv.reader(_and_following(line, ahead, handle, following), delimiter=separator, strict=True)
                fields = len(next(reader))
            except csv.Error as error:
                problem = (
                    f"a double quote is not closed, or stands inside a quoted text without being doubled ({error})"
                )
                ahead.extendleft(reversed(following))
                following = []
        if fields > 1 or line.strip(" \r\n"):
            yield number, line + "".join(following), fields, problem
        number += 1 + len(following)


def _and_following(line: str, ahead: deque[str], handle: TextIO, following: list[str]) -> Iterator[str]:
    yield line
    while line := ahead.popleft() if ahead else handle.readline():
        following.append(line)
        yield line


def _columns(
    path: Path, header: str, separator: str, image_key: str, caption_key: str
) -> tuple[list[str], tuple[str, str]]:
    """All columns, and the two that are wanted; DataError with the likely cause if one is not there."""
    names, keys = next(csv.reader([header], delimiter=separator)), (image_key, caption_key)
    if keys == ("file_name", "caption") and not {*keys} & {*names} and {"filepath", "title"} <= {*names}:
        return names, ("filepath", "title")
    options = dict(zip(keys, ("image_key (--csv_img_key)", "caption_key (--csv_caption_key)"), strict=True))
    for key in keys:
        if names.count(key) == 1:
            continue
        stray = next((name for name in names if name.strip() == key and name != key), None)
        others = [other for other in ",;\t|" if len(names) < 2 and other in header]
        if key in names:
            cause = "two columns have this name: rename one"
        elif "\0" in header:
            cause = "it looks like UTF-16 without a byte-order mark: save it as UTF-8 text"
        elif others:
            cause = f"it seems to be separated by {others[0]!r}: pass csv_separator={others[0]!r} (--csv_separator)"
        elif stray:
            cause = f"a stray space: mend the header, or pass {stray!r} as {options[key]}"
        elif any(name.lower().endswith(PICTURES) for name in names):
            cause = "the first line looks like data: write a header line such as file_name,caption above it"
        else:
            cause = f"{closest(key, names)}; name another column with {options[key]}"
        raise DataError(f"{path}: no column {key!r}; the columns are {', '.join(names)}. {cause}.")
    return names, keys


def read_json(path: Path, split: str) -> Iterator[Row]:
    """The rows of COCO Captions, or of one ``split`` of Karpathy's JSON, where "train" holds "restval" too.

    Pictures lie beside the JSON file or beside its folder, there or in ``images/``, or as COCO unpacks: for
    ``annotations/captions_val2017.json`` in ``val2017/`` beside ``annotations/``.
    """
    try:
        content = json.loads(path.read_bytes())
        images = [image for image in content["images"] if isinstance(image, dict)]
        karpathy = any("sentences" in image for image in images)
        rows = _karpathy(images, split) if karpathy else _coco(images, list(content["annotations"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: not COCO Captions JSON ({error!r}); it needs 'images' (id, file_name) and 'annotations' "
            "(image_id, caption). Of Karpathy's JSON 'images' is enough (filename, split, sentences)."
        ) from error
    here, above, finder = path.parent, path.parent.parent, Finder()
    folders = [str(f) for f in (here, here / "images", above / path.stem.rpartition("_")[2], above, above / "images")]
    for number, name, captions in rows:
        picture = None if name is None else finder.find(name, folders)
        missing = captions if name is None else f"no picture {name} in {' or '.join(folders)}"
        yield number, picture, captions if picture else missing


def _coco(images: list[dict], annotations: list[Any]) -> Iterator[Row]:
    names = {image["id"]: image.get("file_name") for image in images if isinstance(image.get("id"), Hashable)}
    for number, annotation in enumerate(annotations):
        entry = annotation if isinstance(annotation, dict) else {}
        key = entry.get("image_id")
        name = names.get(key) if isinstance(key, Hashable) else None
        found = isinstance(name, str)
        yield number, name if found else None, entry.get("caption") if found else f"no image with id {key}"


def _karpathy(images: list[dict], split: str) -> Iterator[Row]:
    wanted = ("train", "restval") if split == "train" else (split,)
    for number, image in enumerate(images):
        if image.get("split", split) in wanted:
            name = os.path.join(str(image.get("filepath", "")), str(image.get("filename")))
            sentences = image.get("sentences") or []
            yield number, name, [entry.get("raw") if isinstance(entry, dict) else entry for entry in sentences]
