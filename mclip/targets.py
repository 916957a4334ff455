"""What a student learns from: the teacher's embedding of every picture and caption, computed once and cached.

The cache is a folder of two arrays in fp16, memory-mapped, that are filled shard by shard. A finished shard leaves a
marker, so that a killed run goes on with the next one.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import get_model_preprocess_cfg
from torch import Tensor
from tqdm.auto import tqdm

from mclip.config import require
from mclip.evaluate import embed_texts, evaluating
from mclip.files import atomic_path, cache_dir, content_key, lock, new_array
from mclip.metrics import require_finite
from mclip.pairs import Pairs, Targets
from mclip.pictures import DECODING_VERSION, Crops, pool, split_name
from mclip.results import weights_sha256
from mclip.teacher import Teacher, TeacherError

PICTURES_IN_SHARD, CAPTIONS_IN_SHARD = 512, 4096  # a kill costs one of them
CAPTIONS_AT_ONCE = 256
PIXELS_AT_ONCE = 64 * 64**2  # more leave a processor's cache, and each picture then takes about twice as long
FEWEST_AT_ONCE = 16
Encode = Callable[[Tensor], Tensor]


def teacher_targets(teacher: Teacher, pairs: Pairs, progress: bool = True, crops: Crops | None = None) -> Targets:
    """The teacher's embeddings of every picture and every caption of ``pairs``, from the cache where they are.

    Their key covers the teacher's layers, weights, tokens and preparation of pictures, and the data. With ``crops``,
    each picture has K views (dataset reinforcement, Faghri et al. 2023). TeacherError as in :func:`check_targets`.
    """
    remedy = "cached targets are of a number of crops; give one, for example 4, or online_teacher=True"
    require(crops is None or crops.views > 0, "views", 0, remedy)
    view = (teacher.mean, teacher.std, get_model_preprocess_cfg(teacher.model), crops)
    # Layers without weights (activations) and the tokenizer's merges show in neither the weights nor the data.
    sample = teacher.tokenize([pairs.captions[i][0] for i in range(min(256, len(pairs)))]).tolist()
    identity = (str(teacher.model), sample, weights_sha256(teacher.model))
    folder = cache_dir() / "targets" / content_key("targets", identity, pairs.key, view)
    each = (crops.views, teacher.embed_dim) if crops else (teacher.embed_dim,)
    views = range(crops.views if crops else 1)

    def pictures(rows: range) -> np.ndarray:
        return embed_pictures(teacher, pairs, np.repeat(rows, len(views)), crops, np.tile(views, len(rows)))

    if teacher.trunk and pairs.files is not None:  # of pictures in memory no file says whether they have changed
        pictures = partial(embed_features, teacher, trunk_features(teacher, pairs, progress, crops))
    shape, captions = (int(pairs.first_caption[-1]), teacher.embed_dim), partial(embed_captions, teacher, pairs)
    texts = fill(folder / "texts.npy", shape, CAPTIONS_IN_SHARD, captions, progress)
    images = fill(folder / "images.npy", (len(pairs), *each), PICTURES_IN_SHARD, pictures, progress)
    targets = Targets(images, texts, teacher.logit_scale, folder.name, crops)
    check_targets(targets)
    return targets


def trunk_features(
    teacher: Teacher, pairs: Pairs, progress: bool = True, crops: Crops | None = None
) -> list[np.ndarray]:
    """What the frozen trunk of a teacher says of every picture, (N, F) for each view of ``crops``, from the cache.

    They are the same for all teachers on that trunk, for pictures with any captions, and for any number of views.
    """
    stats = ((os.path.abspath(name), os.stat(split_name(name)[0])) for name in map(str, pairs.files))
    pictures = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    prepared = (teacher.mean, teacher.std, get_model_preprocess_cfg(teacher.model), crops and replace(crops, views=0))
    folder = cache_dir() / "features" / content_key(weights_sha256(teacher.trunk), pictures, DECODING_VERSION, prepared)
    shape, features = (len(pairs), teacher.trunk.num_features), []
    for number in range(crops.views if crops else 1):
        compute = partial(embed_pictures, teacher, pairs, crops=crops, view=number, encode=teacher.trunk)
        features.append(fill(folder / f"view-{number}.npy", shape, PICTURES_IN_SHARD, compute, progress))
    return features


def embed_features(teacher: Teacher, features: list[np.ndarray], rows: range) -> np.ndarray:
    """Normalised embeddings (len(rows), K, D) fp16 of some pictures' ``features``, (N, F) for each of K views."""
    some = np.stack([view[rows.start : rows.stop] for view in features], axis=1)
    with evaluating(teacher.model) as device:
        embedding = teacher.model.visual.head(torch.from_numpy(some).float().to(device))
    return F.normalize(embedding, dim=-1).half().cpu().numpy()


def fill(
    file: Path, shape: tuple[int, ...], size: int, compute: Callable[[range], np.ndarray], progress: bool
) -> np.ndarray:
    """The fp16 array of ``shape`` in ``file``, memory-mapped; of its shards of ``size`` rows, the missing are computed.

    One process computes while others wait; if it is killed, the next one takes over. ``progress`` shows a bar, then the
    pace. TeacherError for a file that is damaged or holds something else.
    """
    rows, done, begun = shape[0], 0, time.perf_counter()
    file.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=rows, desc=f"teacher {file.stem}", disable=not progress, leave=False)
    with bar, lock(file):
        if not file.exists():
            for marker in file.parent.glob(f"{file.stem}-*.done"):  # of an array that somebody deleted
                marker.unlink()
            with atomic_path(file) as temporary:
                new_array(temporary, shape, np.float16)
        try:
            array = np.load(file, mmap_mode="r")  # never unpickles; "r+" would lengthen a file that was cut
            if array.shape != shape or array.dtype != np.float16:
                raise ValueError(f"{array.dtype} of shape {array.shape}, not float16 of {shape}")
        except (OSError, ValueError, EOFError, SyntaxError) as error:
            raise TeacherError(f"{file}: damaged ({error}); delete it, and it is computed again.") from error
        writable = np.load(file, mmap_mode="r+")
        for number, start in enumerate(range(0, rows, size)):
            marker, shard = file.with_name(f"{file.stem}-{number:05}.done"), range(rows)[start : start + size]
            if not marker.exists():
                writable[start : shard.stop] = compute(shard).reshape(len(shard), *shape[1:])
                writable.flush()
                marker.touch()
                done += len(shard)
            bar.update(len(shard))
    if progress:
        pace = f", {done / (time.perf_counter() - begun):.0f} a second" if done else ""
        print(f"{file.stem}: {rows - done} were there, {done} computed{pace}; {array[0].nbytes} bytes each")
    return array


def embed_captions(teacher: Teacher, pairs: Pairs, rows: Iterable[int]) -> np.ndarray:
    """(N, D) fp16: the teacher's normalised embeddings of captions by number; equal ones are embedded once."""
    captions = pairs.captions_at(rows)
    texts = sorted(set(captions))
    row_of = {text: row for row, text in enumerate(texts)}
    embeddings = embed_texts(teacher.model, teacher.tokenize, texts, CAPTIONS_AT_ONCE).half().numpy()
    return embeddings[[row_of[text] for text in captions]]


def embed_pictures(
    teacher: Teacher,
    pairs: Pairs,
    rows: np.ndarray | range,
    crops: Crops | None = None,
    view: np.ndarray | int | None = None,
    encode: Encode | None = None,
) -> np.ndarray:
    """(len(rows), D) fp16: the teacher's normalised embeddings of pictures by number, or of a view of each.

    ``encode``, from prepared pictures (B, 3, S, S) to (B, D), replaces the teacher's own.
    """
    encode = encode or partial(teacher.model.encode_image, normalize=True)
    seeds = crops.seeds(rows, view) if crops else [None] * len(rows)

    def read(row: int, seed: int | None) -> Tensor:
        picture = pairs.picture(row)
        return teacher.transform(crops.cut(picture, teacher.image_size, seed) if crops else picture)

    def batch(here: slice) -> Tensor:
        if crops is None and pairs.files is None:  # pictures in memory have one size, and are prepared together
            return teacher.prepare(torch.from_numpy(np.array(pairs.images[rows[here]])))
        return torch.stack(list(pool().map(read, rows[here], seeds[here])))

    embeddings, together = [], max(FEWEST_AT_ONCE, PIXELS_AT_ONCE // teacher.image_size**2)
    with evaluating(teacher.model) as device:
        for start in range(0, len(rows), together):
            images = batch(slice(start, start + together)).to(device)
            embeddings.append(require_finite(encode(images).half().cpu(), "image"))
    return torch.cat(embeddings).numpy()


def check_targets(targets: Targets) -> None:
    """TeacherError unless the text targets differ from caption to caption: equal ones teach nothing."""
    sample = torch.from_numpy(targets.texts[:: max(1, len(targets.texts) // 512)].astype(np.float32))
    if len(sample) > 1 and (sample - sample[0]).abs().max() < 1e-3:
        equal = "the teacher's embeddings of all captions are equal, so they hold nothing to distil"
        raise TeacherError(f"{equal}: it must be given the captions of the data, not one constant text.")
