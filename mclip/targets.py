"""What a student learns from: the teacher's embedding of every picture and caption, computed once and cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .data import Pairs, Targets
from .files import cache_dir, content_key, missing_folder
from .readers import decode_images
from .results import weights_sha256
from .teacher import Teacher, TeacherError


def _embed(
    teacher: Teacher,
    encode: Callable[..., Tensor],
    inputs: Callable[[int, int], Tensor],
    count: int,
    label: str,
    progress: bool,
    size: int = 256,
) -> np.ndarray:
    """``count`` normalised embeddings in fp16; ``inputs(start, stop)`` prepares a batch."""
    device = next(teacher.model.parameters()).device
    teacher.model.eval()
    rows = np.empty((count, teacher.embed_dim), np.float16)
    with torch.inference_mode():
        for start in tqdm(range(0, count, size), f"teacher {label}", disable=not progress, leave=False):
            stop = min(start + size, count)
            rows[start:stop] = encode(inputs(start, stop).to(device), normalize=True).half().cpu().numpy()
    return rows


def teacher_targets(teacher: Teacher, pairs: Pairs, progress: bool = True) -> Targets:
    """The teacher's embeddings of every picture and every caption of ``pairs``, from the cache where they are.

    Kept as fp16, memory-mapped, under a key of the teacher's layers, weights and tokens, the data and the view (the
    teacher's own preparation), so that targets of another teacher or of edited data are never used.

    Raises: TeacherError if all captions look alike to the teacher: distilling such targets teaches nothing.
    """
    view = (teacher.image_size, teacher.mean, teacher.std)
    # Layers without weights (activations) and the tokenizer's merges show in neither the weights nor the data.
    sample = teacher.tokenize([own[0] for own in pairs.captions[:256]]).tolist()
    identity = (str(teacher.model), sample, weights_sha256(teacher.model))
    folder = cache_dir() / "targets" / content_key("targets", identity, pairs.key, view)
    with missing_folder(folder) as temporary:
        if temporary:
            _write_targets(temporary, teacher, pairs, progress)
    images, texts = (np.load(folder / f"{kind}.npy", mmap_mode="r") for kind in ("images", "texts"))
    stored = Targets(images, texts, teacher.logit_scale, folder.name)
    check_targets(stored)
    return stored


def _write_targets(folder: Path, teacher: Teacher, pairs: Pairs, progress: bool) -> None:
    """texts.npy and images.npy: a caption that comes several times is embedded once."""
    images = decode_images(pairs.files, teacher.image_size, progress=progress)[0] if pairs.files else pairs.images
    captions = [caption for own in pairs.captions for caption in own]
    texts = sorted(set(captions))
    place = {text: row for row, text in enumerate(texts)}

    def tokens_of(start: int, stop: int) -> Tensor:
        return teacher.tokenize(texts[start:stop])

    def view_of(start: int, stop: int) -> Tensor:
        return teacher.prepare(torch.from_numpy(np.array(images[start:stop])))

    unique = _embed(teacher, teacher.model.encode_text, tokens_of, len(texts), "captions", progress)
    np.save(folder / "texts.npy", unique[[place[text] for text in captions]])
    pictures = _embed(teacher, teacher.model.encode_image, view_of, len(images), "pictures", progress)
    np.save(folder / "images.npy", pictures)


def check_targets(targets: Targets) -> None:
    """TeacherError unless the text targets differ from caption to caption."""
    sample = torch.from_numpy(targets.texts[:: max(1, len(targets.texts) // 512)].astype(np.float32))
    if len(sample) > 1 and (sample - sample[0]).abs().max() < 1e-3:
        raise TeacherError("the teacher's embeddings of all captions are equal, so they hold nothing to distil: "
                           "it must be given the captions of the data, not one constant text.")  # fmt: skip
