"""What a student learns from: the teacher's embedding of every picture and caption, computed once and cached.

The cache is a folder of shards, arrays in fp16 that are memory-mapped. A shard is written whole or not at all, so
that a killed run goes on with the next one; several processes share the work, each taking shards that no other has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from mclip.config import TrainConfig, require
from mclip.files import atomic_path, cache_dir, content_key
from mclip.pairs import Pairs, Targets, join_targets
from mclip.pictures import Crops, pool, square
from mclip.results import weights_sha256
from mclip.teacher import Teacher, TeacherError

Compute = Callable[[range], dict[str, np.ndarray]]
Report = Callable[[str], None]
PICTURES_IN_SHARD, CAPTIONS_IN_SHARD, BATCH = 8192, 65536, 256


class Shards:
    """Several arrays, each with the rows after those of the one before, indexed by a slice or by row numbers."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        numbers = np.arange(len(self))[rows]
        part = np.searchsorted(self.ends, numbers, side="right")
        out = np.empty((len(numbers), *self.parts[0].shape[1:]), self.parts[0].dtype)
        for each in np.unique(part):
            here = part == each
            out[here] = self.parts[each][numbers[here] - (self.ends[each] - len(self.parts[each]))]
        return out


def open_shards(files: list[Path], row_shape: tuple[int, ...], rows: int) -> np.ndarray | Shards:
    """``files`` as one array of ``rows`` rows, memory-mapped; TeacherError names one that is damaged."""
    parts = [_load(file, row_shape) for file in files]
    if (found := sum(map(len, parts))) != rows:
        raise TeacherError(
            f"{files[0]} and those after it hold {found} rows, not {rows}; delete the folder, and they "
            "are computed again."
        )
    return parts[0] if len(parts) == 1 else Shards(parts)


def _load(file: Path, row_shape: tuple[int, ...]) -> np.ndarray:
    try:
        found = np.load(file, mmap_mode="r")  # never unpickles
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise TeacherError(f"{file}: damaged ({error}); delete it, and it is computed again.") from error
    if found.shape[1:] != row_shape or found.dtype not in (np.float16, np.uint64):
        raise TeacherError(
            f"{file}: holds {found.dtype} of shape {found.shape}, not rows of {row_shape}; "
            "delete it, and it is computed again."
        )
    return found


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
    each picture, and the seeds that cut them again (dataset reinforcement, Faghri et al. 2023). ``report`` is told
    pace and size.

    Raises: TeacherError if all captions look alike to the teacher: distilling such targets teaches nothing; or if a
        stored file is damaged.
    """
    view = (teacher.image_size, teacher.mean, teacher.std, crops)
    # Layers without weights (activations) and the tokenizer's merges show in neither the weights nor the data.
    sample = teacher.tokenize([pairs.captions[i][0] for i in range(min(256, len(pairs)))]).tolist()
    identity = (str(teacher.model), sample, weights_sha256(teacher.model))
    folder = cache_dir() / "targets" / content_key("targets", identity, pairs.key, view)
    count, first = len(pairs), pairs.first_caption

    def captions(rows: range) -> dict[str, np.ndarray]:
        return {"texts": embed_captions(teacher, pairs, first, rows)}

    def pictures(rows: range) -> dict[str, np.ndarray]:
        if crops is None:
            return {"images": embed_pictures(teacher, pairs, np.array(rows))}
        numbers, views = np.repeat(rows, crops.views), np.tile(np.arange(crops.views), len(rows))
        seeds = crops.seeds(numbers, views)
        images = embed_pictures(teacher, pairs, numbers, seeds, crops)
        return {"images": images.reshape(len(rows), crops.views, -1), "seeds": seeds.reshape(len(rows), -1)}

    text_files = _fill(folder, "texts", int(first[-1]), CAPTIONS_IN_SHARD, captions, "captions", progress, report)
    picture_files = _fill(folder, "images", count, PICTURES_IN_SHARD, pictures, "pictures", progress, report)
    width, views = teacher.embed_dim, () if crops is None else (crops.views,)
    seed_files = [file.with_name(file.name.replace("images", "seeds")) for file in picture_files]
    stored = Targets(
        open_shards(picture_files, (*views, width), count),
        open_shards(text_files, (width,), int(first[-1])),
        teacher.logit_scale,
        folder.name,
        open_shards(seed_files, views, count) if crops else None,
    )
    check_targets(stored)
    return stored


def _fill(
    folder: Path, kind: str, rows: int, size: int, compute: Compute, label: str, progress: bool, report: Report
) -> list[Path]:
    """The files of all shards of ``kind``; those that are missing are computed."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{kind}-{number:05d}.npy" for number in range(-(-rows // size))]
    begun, done, written = time.perf_counter(), 0, 0
    bar = tqdm(total=rows, desc=f"teacher {label}", disable=not progress, leave=False)
    for patience in (0, -1):  # first those that nobody works on; then wait for the others, and stand in for the dead
        for number, file in enumerate(files):
            try:
                with FileLock(folder / f".{file.name}.lock", timeout=patience):
                    if file.exists():
                        continue
                    here = range(number * size, min(rows, (number + 1) * size))
                    for name, array in sorted(compute(here).items(), reverse=True):  # "images" last: then all is there
                        target = file.with_name(file.name.replace(kind, name))
                        with atomic_path(target) as temporary, temporary.open("wb") as handle:
                            np.save(handle, array)
                        written += target.stat().st_size
                    done += len(here)
                    bar.update(len(here))
            except Timeout:
                continue
    bar.close()
    seconds = time.perf_counter() - begun
    pace = f"in {seconds:.1f} s ({done / seconds:.0f} a second), {written / done:.0f} bytes each" if done else ""
    report(f"{rows - done} {label} were there; {done} computed {pace}".rstrip())
    return files


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

    def read(row: int, seed: int) -> Tensor:
        return teacher.transform(square(pairs.picture(row), teacher.image_size, seed, crops.smallest))

    def batch(here: slice) -> Tensor:
        if crops:
            return torch.stack(list(pool().map(read, rows[here], seeds[here])))
        if pairs.files is not None:
            return torch.stack(list(pool().map(lambda row: teacher.transform(pairs.picture(row)), rows[here])))
        return teacher.prepare(torch.from_numpy(np.array(pairs.images[rows[here]])))

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
        """As :meth:`~mclip.batches.Targets.of`."""
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
) -> Targets | OnlineTargets:
    """What ``teachers`` say of ``pairs``: from the cache, where it is computed if need be, or batch by batch."""
    if online:
        return OnlineTargets(teachers, pairs, crops)
    remedy = "cached targets are of a number of crops; give one, for example 4, or online_teacher=True"
    require(crops is None or crops.views > 0, "views", 0, remedy)
    return join_targets([teacher_targets(teacher, pairs, progress, crops, report) for teacher in teachers])
