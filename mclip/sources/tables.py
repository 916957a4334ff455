"""CSV and TSV tables of pictures and captions, as spreadsheets, pandas and open_clip's users write them."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections import deque
from collections.abc import Iterator
from functools import cache
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TextIO

import pandas as pd

from mclip.config import closest, require
from mclip.sources.readers import PICTURES, SURROGATE, DataError, Row, picture_finder

_AT_ONCE = 20_000  # records
_TSV_FIELD = re.compile(r'(?:^|\t)(?:"((?:[^"]|"")*)"(?=\t|$)|([^\t]*))')


def read_csv(path: Path, image_key: str, caption_key: str, separator: str = "") -> Iterator[Row]:
    """The rows of a CSV or TSV file in UTF-8, or in UTF-16 with a byte-order mark.

    ``separator`` is a tab for .tsv files and else a comma, unless one is given. An ``image_path`` column holds the
    folder, relative to the file. Without the two keys, open_clip's columns ``filepath`` and ``title`` are taken.
    """
    separator = separator.replace("\\t", "\t") or ("\t" if path.suffix.lower() == ".tsv" else ",")
    require(len(separator) == 1, "csv_separator", separator, "give one character, such as ';'")
    with path.open("rb") as file:
        utf_16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    # A byte that is not UTF-8 becomes a lone surrogate, so that its row can be named.
    coding = {"encoding": "utf-16"} if utf_16 else {"encoding": "utf-8-sig", "errors": "surrogateescape"}
    find = picture_finder()
    folder_of = cache(lambda folder: str(path.parent / os.path.expanduser(folder)))
    with path.open(newline="", **coding) as handle:
        try:
            records = _records(handle, separator)
            _, header, width, problem = next(records, (0, "", 0, "the file is empty; its first line must name columns"))
            if problem:
                raise DataError(f"{path}: {problem}, such as file_name,image_path,caption.")
            columns = _columns(path, header, separator, image_key, caption_key)
            while chunk := list(islice(records, _AT_ONCE)):
                good = [text for _, text, fields, problem in chunk if fields == width and not problem]
                pairs = _parse(good, separator, columns)
                for line, _, fields, problem in chunk:
                    if problem or fields != width:
                        quotes = f"a text with {separator!r} needs double quotes around it"
                        yield line, None, problem or f"{fields} fields, but the header has {width}; {quotes}"
                        continue
                    name, caption, folder = next(pairs)
                    folder = folder_of(folder)
                    picture = find(name, [folder])
                    yield line, picture, caption if picture else f"no picture at {os.path.join(folder, name)}"
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not readable as UTF-16 ({error}); save it as UTF-8 text.") from error


def _parse(records: list[str], separator: str, columns: list[str]) -> Iterator[tuple[str, str, str]]:
    """Name, caption and folder of each record."""
    text = io.StringIO("".join(records) or "\n")
    names = range(len(columns))
    frame = pd.read_csv(
        text, sep=separator, names=names, dtype=str, index_col=False, keep_default_na=False, skip_blank_lines=False
    )
    found = [frame[columns.index(kind)].tolist() for kind in ("name", "caption", "folder") if kind in columns]
    return zip(*found, *[repeat("")] * (3 - len(found)), strict=False)


def _records(handle: TextIO, separator: str) -> Iterator[tuple[int, str, int, str]]:
    """For each record: its first line, its text as pandas reads it, the number of its fields, and what is wrong.

    pandas drops surplus fields without a word, and after a stray quote it joins lines. Only lines with a quote need a
    parser here. After a bad record the reading goes on at the next line.
    """
    number, taken = 1, []
    ahead: deque[str] = deque()

    def lines() -> Iterator[str]:
        while line := ahead.popleft() if ahead else handle.readline():
            taken.append(line)
            yield line

    for text in lines():
        problem, fields = "", text.count(separator) + 1
        if '"' in text and separator == "\t":
            # A quote that is not closed on its line is a character like any other, so all fields are quoted anew.
            cells = [quoted or plain.replace('"', '""') for quoted, plain in _TSV_FIELD.findall(text.rstrip("\r\n"))]
            text, fields = separator.join(f'"{cell}"' for cell in cells) + "\n", len(cells)
        elif '"' in text:
            try:
                fields = len(next(csv.reader(chain([text], lines()), delimiter=separator, strict=True)))
                text = "".join(taken)
            except csv.Error as error:
                problem = f"a double quote is not closed, or not doubled inside a quoted text ({error})"
                ahead.extendleft(reversed(taken[1:]))
                del taken[1:]
        if "\0" in text or (not text.isascii() and SURROGATE.search(text)):
            problem = "not UTF-8 text; save the file as UTF-8"
        if fields > 1 or text.strip(" \r\n"):
            yield number, text, fields, problem
        number += len(taken)
        taken.clear()


def _columns(path: Path, header: str, separator: str, image_key: str, caption_key: str) -> list[str]:
    """What each column is: "name", "caption", "folder" or "". DataError with the likely cause if one is missing."""
    names, keys = next(csv.reader([header], delimiter=separator)), {image_key: "name", caption_key: "caption"}
    if [*keys] == ["file_name", "caption"] and not {*keys} & {*names} and {"filepath", "title"} <= {*names}:
        keys = {"filepath": "name", "title": "caption"}  # open_clip's names
    for key, what in keys.items():
        if names.count(key) == 1:
            continue
        option = "image_key (--csv_img_key)" if what == "name" else "caption_key (--csv_caption_key)"
        spaced = [name for name in names if name.strip() == key]
        others = [other for other in ",;\t|" if len(names) == 1 and other in header]
        if key in names:
            cause = "two columns have this name: rename one"
        elif others:
            cause = f"it seems to be separated by {others[0]!r}: pass csv_separator={others[0]!r} (--csv_separator)"
        elif spaced:
            cause = f"a stray space: mend the header, or pass {spaced[0]!r} as {option}"
        elif any(name.lower().endswith(PICTURES) for name in names):
            cause = "the first line looks like data: write a header line such as file_name,caption above it"
        else:
            cause = f"{closest(key, names)} Name another column with {option}"
        raise DataError(f"{path}: no column {key!r}; the columns are {', '.join(names)}. {cause}.")
    return [keys.get(name) or ("folder" if name == "image_path" else "") for name in names]
