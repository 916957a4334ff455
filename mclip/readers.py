"""Readers of pairs: CSV, COCO Captions JSON, folders of pictures, and WebDataset shards.

Each returns a :class:`Table`: names of pictures, and their captions. No picture is opened here.
"""

from __future__ import annotations

import csv
import json
import os
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .columns import Captions, Texts
from .text_encoder import clean_caption

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
        # Nearly every caption has a letter; cleaning each one of a million would take a minute.
        if not _WORDS.search(caption) and not clean_caption(caption):
            self.bad(f"{self.where(row)}: the caption is empty")
            return
        number = self._numbers.setdefault(picture, len(self._numbers))
        if number == len(self._places):
            self._places.append(row)
        self._captions.append(caption)
        self._owners.append(number)

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
    """``columns``: of the folder, if there is one, the picture and the caption."""
    *at_folder, at_image, at_caption = columns
    widest, listing, folder, prefix, names = max(columns), Listing(), None, "", set()
    for row in reader:
        if len(row) <= widest:
            if not row:
                continue
            row += [""] * (widest + 1 - len(row))
        here = row[at_folder[0]] if at_folder else ""
        if here != folder:
            folder = here
            prefix = str(builder.path.parent / folder)
            names = listing.names(prefix)
        file = f"{prefix}{os.sep}{row[at_image]}"
        if row[at_image] in names or (row[at_image] and os.path.isfile(file)):
            builder.add(file, row[at_caption], reader.line_num)
        else:
            builder.bad(f"{builder.where(reader.line_num)}: no picture at {file}")


def read_json(path: Path, on_error: OnError) -> Table:
    """COCO Captions; pictures lie beside the JSON file, in ``images/``, or in a folder named as the file says."""
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
    folders = (str(path.parent), str(path.parent / "images"))
    for number, (image_id, caption) in enumerate(annotations):
        where = builder.where(number)
        if image_id not in pictures:
            builder.bad(f"{where}: no image with id {image_id}")
            continue
        name = pictures[image_id]
        file = next((file for file in (f"{folder}{os.sep}{name}" for folder in folders)
                     if name in listing.names(os.path.dirname(file)) or os.path.isfile(file)), None)  # fmt: skip
        if file is None:
            builder.bad(f"{where}: no picture {name} in {path.parent} or its folder images")
        else:
            builder.add(file, caption, number)
    return builder.table()
