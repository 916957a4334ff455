"""What all readers share, and the readers of tables (CSV, TSV), COCO Captions and Karpathy's JSON.

Each reader yields rows. :func:`collect` checks them, stops at bad ones or leaves them out, and puts the captions of
each picture together. Millions of paths and captions are kept in arrays of numpy's StringDType.
"""

import codecs
import csv
import json
import math
import os
import re
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from mclip.config import closest, require
from mclip.pictures import NO_FILE, split_name
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

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        return self.texts[self.first[row] : self.first[row + 1]].tolist()

    def __add__(self, other: Self) -> Self:
        first = np.concatenate([self.first, self.first[-1] + other.first[1:]])
        return type(self)(np.concatenate([self.texts, other.texts]), first)

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

    def take(self, numbers: Sequence[int] | np.ndarray) -> Self:
        """The table of the pictures with these numbers, in their order."""
        before, numbers = self.captions.first, np.asarray(numbers, np.int64)
        counts = np.diff(before)[numbers]
        first = np.concatenate([[0], np.cumsum(counts)])
        texts = self.captions.texts[np.arange(first[-1]) + np.repeat(before[numbers] - first[:-1], counts)]
        captions = CaptionLists(texts, first)
        return type(self)(self.pictures[numbers], captions, self.rows[numbers], self.where, self.skipped)


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
    if not isinstance(caption, str):
        return f"the caption is {str(caption)[:40]}, not a text"
    if not (_WORDS.search(caption) or clean_caption(caption)):  # a letter or a digit answers at once
        return "the caption is empty"
    pair = picture + caption
    return "" if pair.isascii() or not _SURROGATE.search(pair) else f"{pair!r} is not valid Unicode"


def picture_finder() -> Callable[[str, Sequence[str]], str | None]:
    """A function that looks for a picture by its name, or its whole path, in several folders.

    It returns the path, or None. Each folder is listed once: asking for every file takes five times as long. The
    function raises OSError if the system cannot list a folder that exists.
    """

    @cache
    def listed(folder: str) -> set[str]:
        try:
            return set(os.listdir(folder or os.sep))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            if isinstance(error, OSError) and error.errno not in NO_FILE:
                raise
            return set()

    def find(name: str, folders: Sequence[str]) -> str | None:
        for folder in folders:
            if name in listed(folder):  # the usual case, told apart quickly
                return f"{folder}{os.sep}{name}"
        name = os.path.expanduser(name)
        for path in [name] if os.path.isabs(name) else [f"{folder}{os.sep}{name}" for folder in folders]:
            folder, _, base = path.rpartition(os.sep)
            if base and (base in listed(folder) or os.path.exists(path)):
                return path
        return None

    return find


def fingerprint(names: Sequence[str] | np.ndarray) -> list[tuple[str, int, int]]:
    """Path, bytes and time of change of each picture's file, so that an edited one is seen.

    Of more than 100,000, that many evenly spaced ones: asking for each of millions takes longer than reading the table.
    """
    step = math.ceil(len(names) / 100_000)
    prints = []
    for file in dict.fromkeys(os.path.abspath(split_name(names[row])[0]) for row in range(0, len(names), step)):
        with suppress(FileNotFoundError):  # a link to nothing: its row is reported when the picture is read
            stat = os.stat(file)
            prints.append((file, stat.st_size, stat.st_mtime_ns))
    return prints


def read_csv(path: Path, image_key: str, caption_key: str, separator: str = "") -> Iterator[Row]:
    """The rows of a CSV or TSV file in UTF-8, or in UTF-16 with a byte-order mark.

    ``separator`` is a tab for .tsv files and else a comma, unless one is given. An ``image_path`` column holds the
    folder, relative to the file. Without the two keys, open_clip's columns ``filepath`` and ``title`` are taken.
    """
    separator = separator.replace("\\t", "\t") or ("\t" if path.suffix.lower() == ".tsv" else ",")
    require(len(separator) == 1, "csv_separator", separator, "give one character, such as ';'")
    records = _records(_lines(path), separator)
    _, header, problem = next(records, (0, [], "the file is empty; its first line must name columns"))
    if problem:
        raise DataError(f"{path}: {problem}, such as file_name,image_path,caption.")
    name, caption = _columns(path, header, image_key, caption_key)
    folder_column = header.index("image_path") if "image_path" in header else None
    folder_of, find = cache(lambda folder: str(path.parent / os.path.expanduser(folder))), picture_finder()
    for line, cells, problem in records:
        if problem or len(cells) != len(header):
            quotes = f"a text with {separator!r} needs double quotes around it"
            yield line, None, problem or f"{len(cells)} fields, but the header has {len(header)}; {quotes}"
            continue
        folder = folder_of("" if folder_column is None else cells[folder_column])
        picture = find(cells[name], [folder])
        yield line, picture, cells[caption] if picture else f"no picture at {os.path.join(folder, cells[name])}"


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file with their ends."""
    with path.open("rb") as file:
        utf_16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    # A byte that is not UTF-8 becomes a lone surrogate, so that its row can be named.
    coding = {"encoding": "utf-16"} if utf_16 else {"encoding": "utf-8-sig", "errors": "surrogateescape"}
    try:
        with path.open(newline="", **coding) as handle:
            yield from handle
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not readable as UTF-16 ({error}); save it as UTF-8 text.") from error


def _records(lines: Iterator[str], separator: str) -> Iterator[tuple[int, list[str], str]]:
    """For each record: its first line, its fields, and what is wrong. After a bad one reading goes on at the next line.

    Only lines with a quote need the csv module. In a TSV a quote that is not closed on its line is a character like
    any other.
    """
    returned: deque[str] = deque()  # lines that a bad record had taken
    number, taken = 1, [""]

    def take() -> str:
        return returned.popleft() if returned else next(lines, "")

    def following() -> Iterator[str]:
        while line := take():
            taken.append(line)
            yield line

    while text := take():
        problem, taken[:] = "", [text]
        if '"' not in text:
            cells = text.rstrip("\r\n").split(separator)
        elif separator == "\t":
            fields = _TSV_FIELD.findall(text.rstrip("\r\n"))
            cells = [quoted.replace('""', '"') or plain for quoted, plain in fields]
        else:
            try:
                cells = next(csv.reader(chain([text], following()), delimiter=separator, strict=True))
                text = "".join(taken)
            except csv.Error as error:
                cells, problem = [], f"a double quote is not closed, or not doubled inside a quoted text ({error})"
                returned.extendleft(reversed(taken[1:]))
                del taken[1:]
        if "\0" in text or (not text.isascii() and _SURROGATE.search(text)):
            problem = "not UTF-8 text; save the file as UTF-8"
        if len(cells) > 1 or text.strip(" \r\n"):
            yield number, cells, problem
        number += len(taken)


def _columns(path: Path, names: list[str], image_key: str, caption_key: str) -> tuple[int, int]:
    """The columns of the pictures' names and of the captions. DataError with the likely cause if one is missing."""
    keys = (image_key, caption_key)
    if keys == ("file_name", "caption") and not {*keys} & {*names} and {"filepath", "title"} <= {*names}:
        keys = ("filepath", "title")  # open_clip's names
    for key, option in zip(keys, ("image_key (--csv_img_key)", "caption_key (--csv_caption_key)"), strict=True):
        if names.count(key) == 1:
            continue
        spaced = [name for name in names if name.strip() == key]
        one, header = len(names) == 1, ",".join(names)
        others = [other for other in ",;\t|" if key in header.split(other) or (one and other in header)]
        if key in names:
            cause = "two columns have this name: rename one"
        elif others:
            cause = f"it seems to be separated by {others[0]!r}: pass csv_separator={others[0]!r} (--csv_separator)"
        elif spaced:
            cause = f"a stray space: mend the header, or pass {spaced[0]!r} as {option}"
        elif any(name.lower().endswith(PICTURES) for name in names):
            cause = "the first line looks like data: write a header line such as file_name,caption above it"
        else:
            near = closest(key, names)  # without one, the columns would be listed twice
            cause = f"Name another column with {option}, or, if this line is data, write a header line above it"
            cause = f"{near} {cause}" if near.endswith("?") else cause
        raise DataError(f"{path}: no column {key!r}; the columns are {', '.join(names)}. {cause}.")
    return names.index(keys[0]), names.index(keys[1])


def read_annotations(path: Path, split: str) -> Iterator[Row]:
    """The rows of COCO Captions, or of one ``split`` of Karpathy's JSON, where "train" holds "restval" too.

    Pictures lie beside the JSON file or beside its folder, there or in ``images/``, or as COCO unpacks: for
    ``annotations/captions_val2017.json`` in ``val2017/`` beside ``annotations/``.
    """
    try:
        content = json.loads(path.read_bytes())
        images = [image for image in content["images"] if isinstance(image, dict)]
        karpathy = any("sentences" in image for image in images)
        rows = _karpathy(path, images, split) if karpathy else _coco(images, list(content["annotations"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: not COCO Captions JSON ({error!r}); it needs 'images' (id, file_name) and 'annotations' "
            "(image_id, caption). Of Karpathy's JSON 'images' is enough (filename, split, sentences)."
        ) from error
    here, above, find = path.parent, path.parent.parent, picture_finder()
    folders = [str(f) for f in (here, here / "images", above / path.stem.rpartition("_")[2], above, above / "images")]
    for number, name, captions in rows:
        picture = None if name is None else find(name, folders)
        missing = captions if name is None else f"no picture {name} in {' or '.join(folders)}"
        yield number, picture, captions if picture else missing


def _coco(images: list[dict], annotations: list[Any]) -> Iterator[Row]:
    names = {image["id"]: image.get("file_name") for image in images if isinstance(image.get("id"), Hashable)}
    for number, annotation in enumerate(annotations):
        entry = annotation if isinstance(annotation, dict) else {}
        key = entry.get("image_id")
        name = names.get(key) if isinstance(key, Hashable) else None
        known = isinstance(name, str)
        yield number, name if known else None, entry.get("caption") if known else f"no image with id {key}"


def _karpathy(path: Path, images: list[dict], split: str) -> Iterator[Row]:
    wanted = ("train", "restval") if split == "train" else (split,)
    splits = sorted({str(image.get("split", split)) for image in images})
    if not {*wanted} & {*splits}:
        raise DataError(f"{path}: no picture of the split {split!r}; it has {', '.join(splits)}")
    for number, image in enumerate(images):
        if image.get("split", split) in wanted:
            name = os.path.join(str(image.get("filepath", "")), str(image.get("filename")))
            sentences = image.get("sentences") or []
            yield number, name, [entry.get("raw") if isinstance(entry, dict) else entry for entry in sentences]
