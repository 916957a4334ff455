"""Zero-shot test sets drawn from the embedded world, and the two-way test of spatial relations."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from mclip.evaluate import ZeroShotSet, device_of, embed_images, embed_texts
from mclip.metrics import answers, bootstrap_interval
from mclip.results import describe_model, make_result
from mclip.scenes.captions import BACKGROUND_PHRASES, RELATIONS
from mclip.scenes.drawing import BACKGROUNDS, COLOURS, SHAPES, TEXTURES
from mclip.scenes.world import HELD_OUT, SceneConfig, Scenes, make_scenes

SETS = ("shape", "colour", "texture", "background", "colour-shape", "held-out")
RELATION = "relation"
NAMES = {"colour": list(COLOURS), "shape": list(SHAPES), "texture": list(TEXTURES)}
PAIRS = [(shape, colour) for shape in range(len(SHAPES)) for colour in range(len(COLOURS))]


def _pair_names(pairs: list[tuple[int, int]]) -> list[str]:
    return [f"{NAMES['colour'][colour]} {NAMES['shape'][shape]}" for shape, colour in pairs]


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
    allowed = [pair for pair in PAIRS if pair not in HELD_OUT]

    def labels(scenes: Scenes, key: str) -> Tensor:
        column = scenes.table[key]
        return torch.from_numpy(column[:, 0] if column.ndim == 2 else column).long()

    def pair_labels(scenes: Scenes, pairs: list[tuple[int, int]]) -> Tensor:
        place = {pair: number for number, pair in enumerate(pairs)}
        shown = zip(labels(scenes, "shape").tolist(), labels(scenes, "colour").tolist(), strict=True)
        return torch.tensor([place[pair] for pair in shown])

    # Sets of the same pictures share one tensor, so that whoever evaluates them all can embed it once.
    pictures = {id(scenes): torch.from_numpy(scenes.images.copy()) for scenes in (seen, unseen)}

    def make(name: str, scenes: Scenes, truth: Tensor, names: list[str], templates: list[str]) -> ZeroShotSet:
        return ZeroShotSet(name, pictures[id(scenes)], truth, names, templates)

    phrases = [BACKGROUND_PHRASES[name][0] for name in BACKGROUNDS]
    noun, adjective = ["a {}", "a picture of a {}"], ["a {} shape", "a picture of a {} thing"]
    return {
        "shape": make("shape", seen, labels(seen, "shape"), NAMES["shape"], noun),
        "colour": make("colour", seen, labels(seen, "colour"), NAMES["colour"], adjective),
        "texture": make("texture", seen, labels(seen, "texture"), NAMES["texture"], adjective),
        "background": make(
            "background", seen, labels(seen, "background"), phrases, ["a shape {}", "a picture of a thing {}"]
        ),
        "colour-shape": make("colour-shape", seen, pair_labels(seen, allowed), _pair_names(allowed), noun),
        "held-out": make("held-out", unseen, pair_labels(unseen, PAIRS), _pair_names(PAIRS), noun),
    }


def relation_captions(scenes: Scenes) -> tuple[list[str], list[str]]:
    """For each picture of two objects the true caption, and the same with the relation turned round."""
    opposite = {0: 1, 1: 0, 2: 3, 3: 2}
    true, false = [], []
    for row in range(len(scenes)):
        first, second = _pair_names(
            [(int(scenes.table["shape"][row, slot]), int(scenes.table["colour"][row, slot])) for slot in (0, 1)]
        )
        relation = int(scenes.table["relation"][row])
        true.append(f"a {first} {RELATIONS[relation]} a {second}")
        false.append(f"a {first} {RELATIONS[opposite[relation]]} a {second}")
    return true, false


def evaluate_relation(
    model: nn.Module, tokenizer: Any, name: str, *, image_size: int = 64, count: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The results record of a choice between two captions that differ in the relation alone; chance is 50 %.

    A CLIP that pools a picture into one vector is known to do little better (Yuksekgonul et al. 2023).
    """
    start = time.perf_counter()
    scenes = _test_scenes(image_size, count, seed, two_objects=1.0)
    images, _ = embed_images(model, torch.from_numpy(scenes.images.copy()))
    captions = relation_captions(scenes)
    true, false = (embed_texts(model, tokenizer, texts) for texts in captions)
    hits = ((images * true).sum(1) > (images * false).sum(1)).numpy()
    value, low, high = (100 * v for v in bootstrap_interval(hits, seed))
    metrics = {"top1": {"value": value, "low": low, "high": high}, "chance": 50.0, "n": count}
    return make_result(
        "zero_shot",
        RELATION,
        "test",
        count,
        describe_model(name, model),
        metrics,
        seed=seed,
        seconds=time.perf_counter() - start,
        device=device_of(model),
        details={"metric": "top1", **answers(hits, captions[0])},
    )
