"""What a student learns from: the teacher's embedding of every picture and caption, computed once and cached.

The cache is a folder of two arrays in fp16, memory-mapped, that are filled shard by shard. A finished shard leaves a
marker, so that a killed run goes on with the next one. Several processes share the work: each takes shards that no
other has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from mclip.config import TrainConfig, require
from mclip.files import atomic_path, cache_dir, content_key
from mclip.pairs import Pairs, Targets, TeacherTargets, join_targets
from mclip.pictures import Crops, pool, square
from mclip.results import weights_sha256
from mclip.teacher import Teacher, TeacherError

PICTURES_IN_SHARD, CAPTIONS_IN_SHARD, BATCH = 8192, 65536, 256

Compute = Callable[[range], np.ndarray]
Report = Callable[[str], None]


def teacher_targets(
    teacher: Teacher,
    pairs: Pairs,
    progress: bool = True,
    crops: Crops | None = None,
    report: Report = lambda line: None,
) -> Targets:
    """The teacher's embeddings of every picture and every caption of ``pairs``, from the cache where they are.

    Kept under a key of the teacher's layers, weights and tokens, the data and the view (the teacher's own
    preparation), so that targets of another teacher or of edited data are never used. With ``crops``, of K views of
    each picture (dataset reinforcement, Faghri et al. 2023). ``report`` is told pace and size.

    Raises: TeacherError if all captions look alike to the teacher: distilling such targets teaches nothing; or if a
        stored file is damaged.
    """
    view = (teacher.image_size, teacher.mean, teacher.std, crops)
    # Layers without weights (activations) and the tokenizer's merges show in neither the weights nor the data.
    sample = teacher.tokenize([pairs.captions[i][0] for i in range(min(256, len(pairs)))]).tolist()
    identity = (str(teacher.model), sample, weights_sha256(teacher.model))
    folder = cache_dir() / "targets" / content_key("targets", identity, pairs.key, view)
    width, first = teacher.embed_dim, pairs.first_caption
    views = () if crops is None else (crops.views,)

    def captions(rows: range) -> np.ndarray:
        return embed_captions(teacher, pairs, first, rows)

    def pictures(rows: range) -> np.ndarray:
        if crops is None:
            return embed_pictures(teacher, pairs, np.array(rows))
        numbers, view = np.repeat(rows, crops.views), np.tile(np.arange(crops.views), len(rows))
        embeddings = embed_pictures(teacher, pairs, numbers, crops.seeds(numbers, view), crops)
        return embeddings.reshape(len(rows), *views, width)

    texts, images = folder / "texts.npy", folder / "images.npy"
    stored = Targets(
        texts=fill(texts, (int(first[-1]), width), CAPTIONS_IN_SHARD, captions, "captions", progress, report),
        images=fill(images, (len(pairs), *views, width), PICTURES_IN_SHARD, pictures, "pictures", progress, report),
        logit_scale=teacher.logit_scale,
        key=folder.name,
        crops=crops,
    )
    check_targets(stored)
    return stored


def fill(
    file: Path, shape: tuple[int, ...], size: int, compute: Compute, label: str, progress: bool, report: Report
) -> np.ndarray:
    """The fp16 array of ``shape`` in ``file``, memory-mapped; of its shards of ``size`` rows, the missing are computed.

    TeacherError for a file that is damaged or holds something else.
    """
    array, rows, done = _mapped(file, shape), shape[0], 0
    begun = time.perf_counter()
    with tqdm(total=rows, desc=f"teacher {label}", disable=not progress, leave=False) as bar:
        for patience in (0, -1):  # first the shards that nobody works on; then wait, and stand in for the dead
            for number, start in enumerate(range(0, rows, size)):
                marker, here = _marker(file, number), range(start, min(rows, start + size))
                try:
                    with FileLock(file.with_name(f".{marker.name}.lock"), timeout=patience):
                        if marker.exists():
                            continue
                        values = compute(here)
                        # Not through the map: two machines would overwrite each other's part of a shared page.
                        with file.open("r+b") as handle:
                            handle.seek(array.offset + start * values[0].nbytes)
                            handle.write(values.tobytes())
                        marker.touch()
                except Timeout:
                    continue
                done += len(here)
                bar.update(len(here))
    seconds = time.perf_counter() - begun
    pace = f"in {seconds:.1f} s ({done / seconds:.0f} a second), {array[0].nbytes} bytes each" if done else ""
    report(f"{rows - done} {label} were there; {done} computed {pace}".rstrip())
    return array


def _marker(file: Path, number: int | str) -> Path:
    return file.with_name(f"{file.stem}-{number:05}.done")


def _mapped(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The array in ``file``, created without a finished shard where it is missing; TeacherError if it is another."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        if not file.exists():
            for marker in file.parent.glob(f"{file.stem}-*.done"):  # of an array that somebody deleted
                marker.unlink()
            with atomic_path(file) as temporary:
                np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
    try:
        array = np.load(file, mmap_mode="r")  # never unpickles
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise TeacherError(f"{file}: damaged ({error}); delete it, and it is computed again.") from error
    if array.shape != shape or array.dtype != np.float16:
        held = f"{array.dtype} of shape {array.shape}, not float16 of {shape}"
        raise TeacherError(f"{file}: holds {held}; delete it, and it is computed again.")
    return array


def embed_captions(teacher: Teacher, pairs: Pairs, first: np.ndarray, rows: range) -> np.ndarray:
    """(len(rows), D) fp16: the teacher's normalised embeddings of captions by number; equal ones are embedded once."""
    owners = np.searchsorted(first, np.array(rows), side="right") - 1
    captions = [pairs.captions[int(owner)][row - first[owner]] for owner, row in zip(owners, rows, strict=True)]
    texts = sorted(set(captions))
    place = {text: row for row, text in enumerate(texts)}
    inputs = (teacher.tokenize(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH))
    return embed(teacher, teacher.model.encode_text, inputs)[[place[text] for text in captions]]


def embed_pictures(
    teacher: Teacher, pairs: Pairs, rows: np.ndarray, seeds: np.ndarray | None = None, crops: Crops | None = None
) -> np.ndarray:
    """(len(rows), D) fp16: the teacher's normalised embeddings of pictures by number, or of their crops."""

    def read(row: int, seed: int | None) -> Tensor:
        picture = pairs.picture(row)
        return teacher.transform(square(picture, teacher.image_size, seed, crops.smallest) if crops else picture)

    def batch(here: slice) -> Tensor:
        if crops is None and pairs.files is None:  # pictures in memory have one size, and are prepared together
            return teacher.prepare(torch.from_numpy(np.array(pairs.images[rows[here]])))
        return torch.stack(list(pool().map(read, rows[here], repeat(None) if seeds is None else seeds[here])))

    inputs = (batch(slice(start, start + BATCH)) for start in range(0, len(rows), BATCH))
    return embed(teacher, teacher.model.encode_image, inputs)


def embed(teacher: Teacher, encode: Callable[..., Tensor], inputs: Iterable[Tensor]) -> np.ndarray:
    """Normalised embeddings (N, D) of all batches of ``inputs``, in fp16."""
    device = next(teacher.model.parameters()).device
    teacher.model.eval()
    with torch.inference_mode():
        return np.concatenate([encode(each.to(device), normalize=True).half().cpu().numpy() for each in inputs])


@dataclass(frozen=True)
class OnlineTargets:
    """Teachers that embed each batch while the student trains: any crop, at the price of their forward pass."""

    teachers: list[Teacher]
    pairs: Pairs
    crops: Crops | None = None

    @property
    def logit_scale(self) -> float:
        """As of cached targets."""
        return math.prod(teacher.logit_scale for teacher in self.teachers) ** (1 / len(self.teachers))

    @property
    def key(self) -> str:
        """Changes with the teachers' weights."""
        return "online " + "+".join(weights_sha256(teacher.model)[:16] for teacher in self.teachers)

    def of(self, pictures: np.ndarray, captions: np.ndarray, view: Any, seeds: Any) -> tuple[Tensor, Tensor]:
        """As :meth:`~mclip.pairs.Targets.of`."""
        first = self.pairs.first_caption
        words = [self.pairs.captions[int(p)][c - first[p]] for p, c in zip(pictures, captions, strict=True)]
        images = [embed_pictures(teacher, self.pairs, pictures, seeds, self.crops) for teacher in self.teachers]
        texts = [embed(teacher, teacher.model.encode_text, [teacher.tokenize(words)]) for teacher in self.teachers]
        return tuple(
            torch.from_numpy(np.concatenate(parts, 1).astype(np.float32)) / math.sqrt(len(parts))
            for parts in (images, texts)
        )


def check_targets(targets: Targets) -> None:
    """TeacherError unless the text targets differ from caption to caption."""
    sample = torch.from_numpy(targets.texts[:: max(1, len(targets.texts) // 512)].astype(np.float32))
    if len(sample) > 1 and (sample - sample[0]).abs().max() < 1e-3:
        raise TeacherError(
            "the teacher's embeddings of all captions are equal, so they hold nothing to distil: "
            "it must be given the captions of the data, not one constant text."
        )


def get_crops(settings: TrainConfig, online: bool = False) -> Crops | None:
    """The random crops that a run shows, if any; an online teacher has a new one in each epoch."""
    views = 0 if online else settings.views
    return Crops(settings.crop_scale, views, settings.seed) if settings.crop_scale < 1 else None


def get_targets(
    teachers: list[Teacher],
    pairs: Pairs,
    online: bool = False,
    crops: Crops | None = None,
    progress: bool = True,
    report: Report = lambda line: None,
) -> TeacherTargets:
    """What ``teachers`` say of ``pairs``: from the cache, where it is computed if need be, or batch by batch."""
    if online:
        return OnlineTargets(teachers, pairs, crops)
    remedy = "cached targets are of a number of crops; give one, for example 4, or online_teacher=True"
    require(crops is None or crops.views > 0, "views", 0, remedy)
    return join_targets([teacher_targets(teacher, pairs, progress, crops, report) for teacher in teachers])
