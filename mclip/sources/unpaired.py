"""Pictures without captions and sentences without pictures, which a student can learn from its teacher all the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mclip.config import require
from mclip.files import content_key
from mclip.pairs import Pairs
from mclip.sources.folders import pictures_in
from mclip.sources.loading import Decoding, pairs_of
from mclip.sources.readers import CaptionLists, DataError, OnError, Row, collect


@dataclass(frozen=True)
class Joined:
    """Two arrays (N, ...) one after the other; rows are read when they are asked for."""

    first: Any
    second: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return (len(self), *self.first.shape[1:])

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        numbers = np.arange(len(self))[rows]
        if np.ndim(numbers) == 0:
            return self[[int(numbers)]][0]
        here = numbers < len(self.first)
        picked = np.empty((len(numbers), *self.shape[1:]), np.uint8)
        picked[here], picked[~here] = self.first[numbers[here]], self.second[numbers[~here] - len(self.first)]
        return picked


def read_texts(path: str | Path) -> list[str]:
    """The sentences of a text file in UTF-8, one a line. DataError, naming the line, for what cannot be read."""
    path = Path(path).expanduser()
    if path.suffix.lower() != ".txt" or not path.is_file():
        problem = "not a text file" if path.exists() else "no such file"
        raise DataError(f"{path}: {problem}; unpaired_texts_path is a .txt file in UTF-8 with a sentence on each line.")
    texts = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            texts.append(line.decode("utf-8-sig").strip())
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: not UTF-8 ({error}); save the file as UTF-8.") from error
    texts = [text for text in texts if text]
    if not texts:
        raise DataError(f"{path}: no sentence in it; write one on each line.")
    return texts


def unlabelled_pictures(path: str | Path) -> list[str]:
    """The files of a folder of pictures without captions; DataError where there are none, or where captions are."""
    path = Path(path).expanduser()
    remedy = "unlabelled_data_path is a folder of pictures without captions"
    if not path.is_dir():
        problem = "it may hold captions: give it as train_data_path" if path.is_file() else "no such folder"
        raise DataError(f"{path}: {problem}; {remedy}.")
    files = pictures_in(path)
    if not files:
        raise DataError(f"{path}: no picture in it; {remedy}.")
    captioned = next((file for file in files if Path(file).with_suffix(".txt").is_file()), None)
    if captioned:
        raise DataError(f"{captioned} has a caption beside it: give {path} as train_data_path; {remedy}.")
    return files


def add_unpaired(
    pairs: Pairs,
    unlabelled_data_path: str | Path,
    unpaired_texts_path: str | Path = "",
    *,
    image_size: int,
    seed: int = 0,
    on_error: OnError = "raise",
    decoding: Decoding = "auto",
    progress: bool = True,
) -> Pairs:
    """``pairs``, then the pictures of a folder, which stand beside sentences that are not theirs.

    The sentences are those of a text file, or else the captions of ``pairs``, dealt out at random so that each is used.
    ``paired`` says which rows are pairs. Raises: DataError as :func:`unlabelled_pictures` and :func:`read_texts`.
    """
    remedy = "pictures with captions that are files can be joined with others, drawn scenes cannot"
    require(pairs.files is not None, "unlabelled_data_path", str(unlabelled_data_path), remedy)
    path = Path(unlabelled_data_path).expanduser()
    files = unlabelled_pictures(path)
    texts = (
        read_texts(unpaired_texts_path) if unpaired_texts_path else pairs.captions_at(range(pairs.first_caption[-1]))
    )
    texts = [texts[place] for place in np.random.default_rng(seed).permutation(len(texts))]

    def rows() -> Iterator[Row]:
        for number, file in enumerate(files):
            own = texts[number :: len(files)]
            yield number, file, own or [texts[number % len(texts)]]

    others = pairs_of(path, collect(path, "picture", rows(), on_error), image_size, on_error, decoding, progress)
    paired = np.arange(len(pairs) + len(others)) < len(pairs)
    first = np.concatenate([pairs.first_caption, pairs.first_caption[-1] + others.first_caption[1:]])
    captions = CaptionLists(np.concatenate([pairs.captions.texts, others.captions.texts]), first)
    names = np.concatenate([pairs.files, others.files])
    key, skipped = content_key(pairs.key, others.key), pairs.skipped + others.skipped
    images = Joined(pairs.images, others.images)
    return replace(pairs, images=images, captions=captions, key=key, files=names, skipped=skipped, paired=paired)
