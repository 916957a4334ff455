"""Millions of short texts in little memory: one block of bytes and the places where each begins."""

from __future__ import annotations

import csv
import hashlib
import json
import operator
import os
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from mclip.text_encoder import clean_caption


class Texts(Sequence[str]):
    """A sequence of strings that takes their bytes and eight more for each, where a list takes some fifty more."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.block, self.ends = bytearray(), array("q")
        texts = iter(texts)
        while some := list(islice(texts, 10_000)):
            self.extend(some)

    def extend(self, texts: Iterable[str]) -> None:
        """Add some at the end."""
        texts = list(texts)
        joined = "".join(texts)
        # As many bytes as characters: the usual case needs no bytes of each text.
        parts = texts if joined.isascii() else [text.encode("utf-8", "surrogatepass") for text in texts]
        self.ends.extend(islice(accumulate(map(len, parts), initial=len(self.block)), 1, None))
        self.block += joined.encode("utf-8", "surrogatepass")

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Texts: ...
    def __getitem__(self, place: int | slice) -> str | Texts:
        if isinstance(place, slice):
            return Texts(self[i] for i in range(*place.indices(len(self))))
        if not -len(self) <= place < len(self):
            raise IndexError(f"no text {place} of {len(self)}")
        place %= len(self)
        start = self.ends[place - 1] if place else 0
        return self.block[start : self.ends[place]].decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    def digest(self) -> str:
        """A fingerprint of all texts."""
        found = hashlib.sha256(self.block)
        found.update(self.ends)
        return found.hexdigest()


class Captions(Sequence[list[str]]):
    """For each picture the list of its captions, held as :class:`Texts`.

    Args:
        texts: all captions, those of a picture beside each other.
        first: (N + 1,) position of each picture's first caption, and the number of all.
    """

    def __init__(self, texts: Texts, first: np.ndarray) -> None:
        self.texts, self.first = texts, first

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"no picture {place} of {len(self)}")
        place %= len(self)
        return [self.texts[i] for i in range(int(self.first[place]), int(self.first[place + 1]))]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    def subset(self, pictures: np.ndarray) -> Captions:
        """The captions of the ``pictures`` with these numbers, in their order."""
        chosen = [self[int(i)] for i in pictures]
        first = np.concatenate([[0], np.cumsum([len(own) for own in chosen], dtype=np.int64)])
        return Captions(Texts(text for own in chosen for text in own), first)


OnError = Literal["raise", "skip"]
_WORDS = re.compile(r"[A-Za-z0-9]")


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line or picture, and the remedy."""


@dataclass(frozen=True)
class Table:
    """Pictures by name, the captions of each, where each was read (for messages), and the rows left out."""

    pictures: Texts
    captions: Captions
    place: Callable[[int], str]
    skipped: int

    def keep(self, numbers: Sequence[int]) -> Table:
        """The table of these pictures alone; the captions of the others count as left out."""
        if len(numbers) == len(self.pictures):
            return self
        captions = self.captions.subset(np.asarray(numbers))
        lost = len(self.captions.texts) - len(captions.texts)
        pictures = Texts(self.pictures[number] for number in numbers)
        return Table(pictures, captions, lambda number: self.place(numbers[number]), self.skipped + lost)


@dataclass
class TableBuilder:
    """Collects rows; captions of one picture may lie apart. ``label`` says what a number of a row counts."""

    path: Path
    on_error: OnError
    label: str
    skipped: int = 0
    _numbers: dict[str, int] = field(default_factory=dict)
    _places: array = field(default_factory=lambda: array("q"))
    _captions: Texts = field(default_factory=Texts)
    _owners: array = field(default_factory=lambda: array("q"))

    def where(self, row: int) -> str:
        """The file and the row, for messages."""
        return f"{self.path}, {self.label} {row}"

    def bad(self, message: str) -> None:
        """Raise DataError, or count the row."""
        reject(message, self.on_error)
        self.skipped += 1

    def add(self, picture: str, caption: str, row: int) -> None:
        """One pair; a caption without a word is a bad row."""
        if has_words(caption):
            self.extend([picture], [caption], [row])
        else:
            self.bad(f"{self.where(row)}: the caption is empty")

    def extend(self, pictures: Sequence[str], captions: Sequence[str], rows: Sequence[int]) -> None:
        """Many pairs whose captions are known to have words."""
        known, before = self._numbers, len(self._numbers)
        numbers = [known.setdefault(picture, len(known)) for picture in pictures]
        if len(known) == before + len(pictures):  # all are new, as they mostly are
            self._places.extend(rows)
        else:
            first_rows = dict(zip(reversed(numbers), reversed(rows), strict=True))
            self._places.extend(first_rows[number] for number in range(before, len(known)))
        self._owners.extend(numbers)
        self._captions.extend(captions)

    def table(self) -> Table:
        """What was collected, captions beside their picture; DataError if it is nothing."""
        if not self._numbers:
            raise DataError(f"{self.path}: no usable rows; it needs at least one picture with a caption.")
        pictures = Texts(self._numbers)
        self._numbers.clear()
        owners, captions = np.array(self._owners), self._captions
        if np.any(np.diff(owners) < 0):
            order = np.argsort(owners, kind="stable")
            owners, captions = owners[order], Texts(captions[int(row)] for row in order)
        first = np.searchsorted(owners, np.arange(len(pictures) + 1))
        places = self._places
        return Table(pictures, Captions(captions, first), lambda number: self.where(places[number]), self.skipped)


def has_words(caption: str) -> bool:
    """Whether anything is left of a caption once it is cleaned; a letter or digit answers at once."""
    return _WORDS.search(caption) is not None or clean_caption(caption) != ""


def reject(message: str, on_error: OnError) -> None:
    """DataError with the remedy, unless bad rows are to be left out."""
    if on_error == "raise":
        raise DataError(f"{message}; mend the row, or pass on_error='skip'.")


class Listing:
    """Which files exist. Each folder is listed once: asking for every file takes five times as long."""

    def __init__(self) -> None:
        self._folders: dict[str, set[str]] = {}

    def names(self, folder: str) -> set[str]:
        """The names in ``folder``; none if there is no such folder."""
        if folder not in self._folders:
            try:
                self._folders[folder] = set(os.listdir(folder))
            except (OSError, ValueError):
                self._folders[folder] = set()
        return self._folders[folder]


def read_csv(path: Path, image_key: str, caption_key: str, on_error: OnError) -> Table:
    """A CSV file (.tsv: separated by tabs); an ``image_path`` column holds the folder, relative to the file."""
    csv.field_size_limit(2**24)
    builder = TableBuilder(path, on_error, "line")
    with path.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.reader(handle, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            columns = next(reader, [])
            if not columns:
                raise DataError(
                    f"{path}: the file is empty; it needs a header line such as file_name,image_path,caption."
                )
            for key in (image_key, caption_key):
                if key not in columns:
                    raise DataError(f"{path}: no column {key!r}; the columns are {', '.join(columns)}.")
            places = [columns.index(key) for key in ("image_path", image_key, caption_key) if key in columns]
            _read_rows(reader, places, builder)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: not readable as UTF-8 CSV ({error}); save it as UTF-8 text.") from error
    return builder.table()


def _read_rows(reader: Any, columns: list[int], builder: TableBuilder) -> None:
    """``columns``: of the folder, if there is one, the picture and the caption. Rows are taken by the hundred.

    More at once would keep Python's garbage collector busy, which walks all that torch has imported.
    """
    *at_folder, at_image, at_caption = columns
    widest, listing, parent = max(columns), Listing(), str(builder.path.parent)

    def place(row: list[str]) -> tuple[str, bool]:
        folder = str(Path(parent, row[at_folder[0]])) if at_folder else parent
        file, name = f"{folder}{os.sep}{row[at_image]}", row[at_image]
        return file, name in listing.names(folder) or (name != "" and os.path.isfile(file))

    while some := [(reader.line_num, row) for row in islice(reader, 256)]:
        lines, rows = [line for line, row in some if row], [row for _, row in some if row]
        for row in rows:
            if len(row) <= widest:
                row += [""] * (widest + 1 - len(row))
        folders = {row[at_folder[0]] for row in rows} if at_folder else {""}
        names, captions = [row[at_image] for row in rows], [row[at_caption] for row in rows]
        folder = str(Path(parent, *folders)) if len(folders) == 1 else ""
        if folder and all(map(listing.names(folder).__contains__, names)) and all(map(_WORDS.search, captions)):
            builder.extend([f"{folder}{os.sep}{name}" for name in names], captions, lines)
            continue
        for line, row in zip(lines, rows, strict=True):
            file, there = place(row)
            if there:
                builder.add(file, row[at_caption], line)
            else:
                builder.bad(f"{builder.where(line)}: no picture at {file}")


def read_json(path: Path, on_error: OnError) -> Table:
    """COCO Captions; pictures lie beside the JSON file, in ``images/``, or as COCO unpacks.

    That is, for ``annotations/captions_val2017.json``, in ``val2017/`` beside ``annotations/``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pictures = {entry["id"]: str(entry["file_name"]) for entry in content["images"]}
        annotations = [(entry["image_id"], str(entry["caption"])) for entry in content["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not COCO Captions JSON ({error!r}); it needs 'images' (id, file_name) and "
            "'annotations' (image_id, caption)."
        ) from error
    listing, builder = Listing(), TableBuilder(path, on_error, "annotation")
    folders = [str(f) for f in (path.parent, path.parent / "images", path.parent.parent / path.stem.rpartition("_")[2])]
    for number, (image_id, caption) in enumerate(annotations):
        where, name = builder.where(number), pictures.get(image_id)
        if name is None:
            builder.bad(f"{where}: no image with id {image_id}")
            continue
        places = [f"{folder}{os.sep}{name}" for folder in folders]
        there = (
            name in listing.names(folder) or os.path.isfile(place)
            for folder, place in zip(folders, places, strict=True)
        )
        file = next((place for place, found in zip(places, there, strict=True) if found), None)
        if file is None:
            builder.bad(f"{where}: no picture {name} in {' or '.join(folders)}")
        else:
            builder.add(file, caption, number)
    return builder.table()
