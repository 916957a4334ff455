"""Zero-shot test sets drawn from the embedded world, and the two-way test of spatial relations."""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mclip.evaluate import ZeroShotSet, device_of, embed_images, embed_texts
from mclip.metrics import answers, bootstrap_interval, percent
from mclip.results import describe_model, make_result
from mclip.scenes.captions import BACKGROUND_PHRASES, COLOUR_NAMES, RELATIONS, SHAPE_NAMES, Table
from mclip.scenes.drawing import BACKGROUNDS, SHAPES, TEXTURES, WORDS, object_distance
from mclip.scenes.world import HELD_OUT, SceneConfig, Scenes, make_scenes

SETS = ("shape", "colour", "texture", "background", "colour-shape", "held-out")
RELATION = "relation"
PAIRS = [(shape, colour) for shape in range(len(SHAPES)) for colour in range(len(COLOUR_NAMES))]
Cases = tuple[Tensor, list[str], Tensor]
"""Pictures, a phrase for each, and the pixels that it speaks of."""


def _pair_name(shape: int, colour: int) -> str:
    return f"{COLOUR_NAMES[colour]} {SHAPE_NAMES[shape]}"


def _object_names(table: Table, row: int) -> list[str]:
    """What the two objects of a picture are called: "a red star", "a blue circle"."""
    return [f"a {_pair_name(table['shape'][row, slot], table['colour'][row, slot])}" for slot in (0, 1)]


def _test_scenes(image_size: int, count: int, seed: int, **settings: Any) -> Scenes:
    config = SceneConfig(count, image_size, "test", seed, captions="clean", **settings)
    return make_scenes(config, progress=False)


def scene_sets(image_size: int = 64, count: int = 2000, seed: int = 0) -> dict[str, ZeroShotSet]:
    """The zero-shot sets of single objects, ``count`` pictures each.

    "colour-shape" has the 108 pairs that training may hold; "held-out" has pictures of the 12 pairs that it may
    not, to be told from all 120.
    """
    seen = _test_scenes(image_size, count, seed, two_objects=0.0)
    unseen = _test_scenes(image_size, count, seed, two_objects=0.0, pairs="held-out")
    # Sets of the same pictures share one tensor, so that an evaluation of all sets can embed it once.
    pictures, unseen_pictures = (torch.from_numpy(scenes.images.copy()) for scenes in (seen, unseen))
    phrases = [BACKGROUND_PHRASES[name][0] for name in BACKGROUNDS]
    names = {"shape": SHAPE_NAMES, "colour": COLOUR_NAMES, "texture": TEXTURES, "background": phrases}
    sets = {}
    for key, own in names.items():
        column = seen.table[key] if key == "background" else seen.table[key][:, 0]
        labels = torch.from_numpy(column).long()
        sets[key] = ZeroShotSet(key, pictures, labels, list(own), WORDS["prompts"][key])
    allowed = [pair for pair in PAIRS if pair not in HELD_OUT]
    of_pairs = {"colour-shape": (pictures, seen.table, allowed), "held-out": (unseen_pictures, unseen.table, PAIRS)}
    for key, (images, table, pairs) in of_pairs.items():
        drawn = zip(table["shape"][:, 0], table["colour"][:, 0], strict=True)
        labels = torch.tensor([pairs.index(pair) for pair in drawn])
        sets[key] = ZeroShotSet(key, images, labels, [_pair_name(*pair) for pair in pairs], WORDS["prompts"]["shape"])
    return sets


def relation_captions(scenes: Scenes) -> tuple[list[str], list[str]]:
    """For each picture of two objects the true caption, and the same caption with the opposite relation."""
    true, false = [], []
    for row, relation in enumerate(scenes.table["relation"]):
        first, second = _object_names(scenes.table, row)
        true.append(f"{first} {RELATIONS[relation]} {second}")
        false.append(f"{first} {RELATIONS[relation ^ 1]} {second}")  # opposites stand side by side
    return true, false


def evaluate_relation(
    model: nn.Module, tokenizer: Any, name: str, *, count: int, image_size: int = 64, drawn: int = 0, seed: int = 0
) -> dict[str, Any]:
    """The results record of a choice between two captions that differ in the relation alone; chance is 50 %.

    A CLIP that pools a picture into one vector is known to do little better (Yuksekgonul et al. 2023). ``drawn`` is the
    seed of the scenes, and ``seed`` that of the bootstrap.
    """
    start = time.perf_counter()
    scenes = _test_scenes(image_size, count, drawn, two_objects=1.0)
    images, _ = embed_images(model, torch.from_numpy(scenes.images.copy()))
    captions = relation_captions(scenes)
    true, false = (embed_texts(model, tokenizer, texts) for texts in captions)
    hits = ((images * true).sum(1) > (images * false).sum(1)).numpy()
    metrics = {"top1": percent(bootstrap_interval(hits, seed)), "chance": 50.0, "n": count}
    run = {"seed": seed, "seconds": time.perf_counter() - start, "device": device_of(model)}
    details = {"metric": "top1", **answers(hits, captions[0])}
    model_facts = describe_model(name, model)
    return make_result("zero_shot", RELATION, "test", count, model_facts, metrics, **run, details=details)


def object_masks(scenes: Scenes) -> np.ndarray:
    """The pixels (N, 2, S, S) of each picture's objects; the second is in front of the first, and may be missing."""
    size, table = scenes.config.image_size, scenes.table
    masks = np.zeros((len(scenes), 2, size, size), dtype=bool)
    for slot, shape in np.ndindex(2, len(SHAPES)):
        rows = np.flatnonzero(table["shape"][:, slot] == shape)
        geometry = (table[key][rows, slot] for key in ("cx", "cy", "radius", "angle"))
        masks[rows, slot] = object_distance(shape, *geometry, size)[0] < 0
    masks[:, 0] &= ~masks[:, 1]
    return masks


def cases(split: str, count: int, size: int = 64, seed: int = 0) -> Cases:
    """Pictures (2N, 3, S, S) uint8, phrases and masks (2N, S, S): each of ``count`` pictures with both of its objects.

    The two objects differ in colour and in shape, and at least 30 pixels of each can be seen.
    """
    drawn = make_scenes(SceneConfig(2 * count, size, split, seed, two_objects=1.0, captions="clean"), progress=False)
    masks, table = object_masks(drawn), drawn.table
    differ = (table["shape"][:, 0] != table["shape"][:, 1]) & (table["colour"][:, 0] != table["colour"][:, 1])
    rows = np.flatnonzero(differ & (masks.sum((2, 3)).min(1) >= 30))[:count]
    images = torch.from_numpy(np.repeat(drawn.images[rows], 2, axis=0))
    phrases = [phrase for row in rows for phrase in _object_names(table, row)]
    return images, phrases, torch.from_numpy(masks[rows]).flatten(0, 1)
