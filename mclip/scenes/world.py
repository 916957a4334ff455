"""The drawn world: pictures of shapes, with captions as people write them.

Everything follows from :class:`SceneConfig`. The same settings give the same table and captions everywhere, and the
same pixels on one machine. On another, rounding in ``sin`` and ``cos`` may change a pixel by one level of 255.
"""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from mclip.config import Settings
from mclip.files import atomic_folder, cache_dir, content_key, missing_folder, write_json
from mclip.pairs import Pairs
from mclip.scenes.captions import RELATIONS, Table, write_captions
from mclip.scenes.drawing import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, draw_backgrounds, draw_clutter, draw_objects

DRAWING_VERSION = 4
Split = Literal["train", "val", "test", "teacher"]
SPLITS = get_args(Split)
HELD_OUT = frozenset((shape, (3 * shape + 1) % len(COLOURS)) for shape in range(len(SHAPES)))
"""(shape, colour) pairs that no training picture or caption holds: one colour of each shape."""


@dataclass(frozen=True)
class SceneConfig(Settings):
    """All that decides a set of scenes. No two splits share a picture, and another seed gives other pictures."""

    size: int = 10_000  # number of pictures
    image_size: int = 64  # side in pixels
    split: Split = "train"
    seed: int = 0
    two_objects: float = 0.3  # share of pictures with two objects and a spatial relation
    noise: float = 0.0  # share of captions that belong to another picture
    captions: Literal["human", "clean"] = "human"  # human ones often leave the shape out, clean ones always name it
    pairs: Literal["seen", "held-out"] = "seen"  # of colour and shape: without those held out, or nothing else

    def __post_init__(self) -> None:
        self.choices()
        self.at_least(1, "size")
        self.at_least(0, "seed")
        self.check("image_size", 16 <= self.image_size <= 1024, "choose 16 to 1024 pixels")
        for key in ("two_objects", "noise"):
            self.check(key, 0 <= getattr(self, key) <= 1, "choose a share in [0, 1]")
        held_out_training = self.pairs == "held-out" and self.split != "test"
        self.check("pairs", not held_out_training, "held-out pairs are drawn in the test split alone")


@dataclass(frozen=True)
class Scenes:
    """Pictures ``images`` (N, 3, S, S) uint8, five ``captions`` each, and the ``table`` of what was drawn."""

    config: SceneConfig
    images: np.ndarray
    captions: list[list[str]]
    table: Table

    def __len__(self) -> int:
        return len(self.images)


def _generator(config: SceneConfig, purpose: int, part: int = 0) -> np.random.Generator:
    held_out = int(config.pairs == "held-out")
    return np.random.default_rng([config.seed, SPLITS.index(config.split), held_out, purpose, part])


def sample_table(config: SceneConfig) -> Table:
    """What each picture holds, as arrays of length N; those of objects are (N, 2), with shape -1 for no second one."""
    rng, count = _generator(config, 0), config.size
    held_out = config.pairs == "held-out"
    pairs = [pair for pair in np.ndindex(len(SHAPES), len(COLOURS)) if (pair in HELD_OUT) == held_out]
    chosen = np.array(pairs)[rng.integers(len(pairs), size=(count, 2))]
    two = rng.uniform(size=count) < config.two_objects
    relation = rng.integers(len(RELATIONS), size=count)
    large = rng.uniform(size=(count, 2)) < 0.5
    radius = np.where(large, rng.uniform(0.32, 0.4, (count, 2)), rng.uniform(0.22, 0.27, (count, 2)))
    radius = np.where(two[:, None], 0.18 + 0.25 * (radius - 0.22), radius)
    centre = rng.uniform(0, 1, (count, 2, 2)) * (1 - 2.2 * radius[..., None]) + 1.1 * radius[..., None]
    # Two objects stand on opposite sides along the relation's axis, with a little play along the other.
    along = np.stack([rng.uniform(0.24, 0.3, count), rng.uniform(0.7, 0.76, count)], 1)
    along = np.where(np.isin(relation, (0, 2))[:, None], along, along[:, ::-1])
    across = rng.uniform(0.3, 0.7, (count, 2))
    horizontal = (relation < 2)[:, None]
    apart = np.stack([np.where(horizontal, along, across), np.where(horizontal, across, along)], -1)
    centre = np.where(two[:, None, None], apart, centre)
    shape = np.where(np.stack([np.ones(count, bool), two], 1), chosen[..., 0], -1)
    return {
        "background": rng.integers(len(BACKGROUNDS), size=count),
        "relation": np.where(two, relation, -1),
        "shape": shape,
        "colour": chosen[..., 1],
        "texture": rng.integers(len(TEXTURES), size=(count, 2)),
        "large": large,
        "cx": centre[..., 0],
        "cy": centre[..., 1],
        "radius": radius,
        "angle": rng.uniform(-0.3, 0.3, (count, 2)),
        "light": rng.uniform(0.82, 1.08, count),
    }


def draw_table(table: Table, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw every row of ``table``: (N, 3, S, S) uint8."""
    picture = draw_backgrounds(table["background"], rng, image_size)
    draw_clutter(picture, rng)
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    colour = palette[table["colour"]] + rng.uniform(-0.05, 0.05, (*table["colour"].shape, 3)).astype(np.float32)
    for slot, shape in np.ndindex(2, len(SHAPES)):
        rows = np.flatnonzero(table["shape"][:, slot] == shape)
        part = picture[rows]
        geometry = tuple(table[key][rows, slot] for key in ("cx", "cy", "radius", "angle"))
        draw_objects(part, shape, table["texture"][rows, slot], colour[rows, slot], geometry)
        picture[rows] = part
    picture *= table["light"].astype(np.float32)[:, None, None, None]
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 3, 1, 2)


def captions_of(config: SceneConfig, table: Table) -> list[list[str]]:
    """Five captions for each row of ``table``."""
    return write_captions(table, config.captions, config.noise, _generator(config, 1))


def _draw_all(config: SceneConfig, table: Table, progress: bool) -> np.ndarray:
    """All pictures, in chunks with a generator each, so that the number of threads changes nothing."""
    images = np.empty((config.size, 3, config.image_size, config.image_size), np.uint8)
    chunk = max(8, 250 * 64 * 64 // config.image_size**2)
    starts = range(0, config.size, chunk)

    def draw_chunk(start: int) -> None:
        rows = {key: column[start : start + chunk] for key, column in table.items()}
        images[start : start + chunk] = draw_table(rows, config.image_size, _generator(config, 2, start))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        drawn, label = pool.map(draw_chunk, starts), f"drawing {config.split} scenes"
        list(tqdm(drawn, label, len(starts), disable=not progress, leave=False))
    return images


def make_scenes(config: SceneConfig, progress: bool = True) -> Scenes:
    """The scenes of ``config``, drawn once and kept in the cache under a key of all settings."""
    folder = cache_dir() / "scenes" / content_key(DRAWING_VERSION, dataclasses.asdict(config))
    with missing_folder(folder) as temporary:
        if temporary:
            table = sample_table(config)
            np.save(temporary / "images.npy", _draw_all(config, table, progress))
            np.savez(temporary / "table.npz", **table)
            (temporary / "captions.json").write_text(json.dumps(captions_of(config, table)), encoding="utf-8")
    with np.load(folder / "table.npz", allow_pickle=False) as stored:
        table = dict(stored)
    captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    return Scenes(config, np.load(folder / "images.npy", mmap_mode="r"), captions, table)


def export_scenes(scenes: Scenes, folder: str | Path) -> None:
    """Write JPEGs, ``captions.csv`` (file_name,image_path,caption) and ``captions.json`` (COCO Captions)."""
    with atomic_folder(folder) as temporary:
        (temporary / "images").mkdir()
        rows, pictures, annotations = ["file_name,image_path,caption"], [], []
        for index, (image, captions) in enumerate(zip(scenes.images, scenes.captions, strict=True)):
            name = f"{index:06d}.jpg"
            Image.fromarray(image.transpose(1, 2, 0)).save(temporary / "images" / name, quality=95)
            pictures.append({"id": index, "file_name": name, "width": image.shape[2], "height": image.shape[1]})
            for caption in captions:
                rows.append(f'{name},images,"{caption}"')
                annotations.append({"id": len(annotations), "image_id": index, "caption": caption})
        (temporary / "captions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        write_json(temporary / "captions.json", {"images": pictures, "annotations": annotations})


def scene_pairs(config: SceneConfig, progress: bool = True) -> Pairs:
    """The scenes of ``config`` as pairs to train on or to validate with."""
    scenes = make_scenes(config, progress)
    key = content_key("scenes", DRAWING_VERSION, config, config.image_size)
    return Pairs(scenes.images, scenes.captions, key, f"scenes-{config.split}")
