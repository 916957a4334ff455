"""Stand-ins of the size of real data, for measurements of speed and memory: nothing can be learnt from them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from mclip.pairs import Pairs, Targets
from mclip.teacher import Teacher, load_teacher

SENTENCE = "a small red dog runs along the beach beside two men who throw a ball"


class Noise:
    """Pictures (N, 3, side, side) uint8 that are drawn when they are read, and take no memory before."""

    dtype = np.dtype(np.uint8)

    def __init__(self, count: int, side: int) -> None:
        self.shape = (count, 3, side, side)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | int) -> np.ndarray:
        several = np.atleast_1d(rows)
        found = np.random.default_rng(several.tolist()).integers(0, 256, (len(several), *self.shape[1:]), np.uint8)
        return found if np.ndim(rows) else found[0]


def random_pairs(count: int, side: int) -> Pairs:
    """Noise with captions of eleven words."""
    rng = np.random.default_rng(0)
    return Pairs(
        Noise(count, side), [[" ".join(rng.choice(SENTENCE.split(), 11))] for _ in range(count)], "noise", "noise"
    )


def random_targets(count: int, width: int = 512) -> Targets:
    """Unit vectors in place of a teacher's embeddings, which cost the same to read."""
    rng = np.random.default_rng(1)
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.standard_normal((2, count, width)))
    return Targets(images.astype(np.float16), texts.astype(np.float16), 100.0, "noise")


@contextmanager
def photographs(count: int = 256) -> Iterator[Path]:
    """A folder of JPEGs of 500 x 375 pixels, as smooth as photographs, and its CSV."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        lines = ["file_name,caption"]
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (19, 25, 3), dtype=np.uint8)).resize((500, 375))
            noise = rng.integers(-12, 13, (375, 500, 3))
            picture = np.clip(np.asarray(coarse, np.int16) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(Path(name, f"{number}.jpg"), quality=85)
            lines.append(f"{number}.jpg,picture {number}")
        Path(name, "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield Path(name)


def random_teacher(folder: Path) -> Teacher:
    """The architecture of OpenAI's ViT-B/32 with random weights, loaded by path as the real ones are."""
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32").state_dict(), folder / "random.pt")
    return load_teacher("ViT-B-32", str(folder / "random.pt"))
