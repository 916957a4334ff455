"""The command ``grounding``: the shipped models' maps scored on scenes of two objects, beside two baselines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .config import require
from .data import normalise
from .embed import input_of
from .files import DATA
from .grounding import map_layers, object_masks, object_phrases, overlap, phrase_maps, pointing
from .metrics import bootstrap_interval
from .results import describe_model, make_result, save_result
from .runs import load_model, model_name
from .scenes import SceneConfig, make_scenes

RESULTS = DATA / "results" / "grounding"
THRESHOLDS = tuple(round(0.1 * step, 1) for step in range(1, 10))
MODELS = ("base", "kd", "teacher")
BASELINES = ("random", "centre")
Cases = tuple[Tensor, list[str], Tensor]


def cases(split: str, count: int, size: int = 64, seed: int = 0) -> Cases:
    """Pictures (2N, 3, S, S) uint8, phrases and masks (2N, S, S): each of ``count`` pictures with both of its objects.

    The two objects differ in colour and in shape, and at least 30 pixels of each can be seen.
    """
    drawn = make_scenes(SceneConfig(2 * count, size, split, seed, two_objects=1.0, captions="clean"), progress=False)
    masks, table = object_masks(drawn), drawn.table
    differ = (table["shape"][:, 0] != table["shape"][:, 1]) & (table["colour"][:, 0] != table["colour"][:, 1])
    rows = np.flatnonzero(differ & (masks.sum((2, 3)).min(1) >= 30))[:count]
    phrases = object_phrases(drawn)
    images = torch.from_numpy(np.repeat(drawn.images[rows], 2, axis=0))
    return images, [phrase for row in rows for phrase in phrases[row]], torch.from_numpy(masks[rows]).flatten(0, 1)


def scores(maps: Tensor, masks: Tensor, threshold: float) -> dict[str, np.ndarray]:
    """Pointing and overlap of each picture (N,), the mean of its two objects, in percent."""
    found = {"pointing": pointing(maps, masks).float(), "iou": overlap(maps, masks, threshold)}
    return {name: 100 * each.view(-1, 2).mean(1).numpy() for name, each in found.items()}


def baselines(masks: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Maps (N, S, S) that know nothing of picture and phrase: noise, and a hill in the centre.

    Noise points at a place by chance, so it hits as often as the objects' mean share of the area says.
    """
    size, generator = masks.shape[-1], torch.Generator().manual_seed(seed)
    at = (torch.arange(size) + 0.5) / size - 0.5
    hill = torch.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * 0.15**2))
    maps = torch.rand(masks.shape, generator=generator), hill.expand(len(masks), -1, -1)
    return dict(zip(BASELINES, maps, strict=True))


def _best_threshold(maps: Tensor, masks: Tensor) -> float:
    return max(THRESHOLDS, key=lambda threshold: overlap(maps, masks, threshold).mean().item())


def _record(
    name: str, found: dict[str, np.ndarray], model: dict[str, Any], seed: int, seconds: float, **details: Any
) -> dict[str, Any]:
    metrics = {key: dict(zip(("value", "low", "high"), map(float, bootstrap_interval(values, seed)), strict=True))
               for key, values in found.items()}  # fmt: skip
    return make_result(
        "grounding", "scenes of two objects", "test", len(found["iou"]), {**model, "name": name}, metrics, seed=seed,
        seconds=seconds, details=details,
    )  # fmt: skip


def score_model(name: str, tuning: Cases, test: Cases, seed: int = 0, bar: Any = None) -> dict[str, Any]:
    """The record of one model; its layer (by pointing) and threshold (by overlap) are chosen on ``tuning`` alone."""
    (model, tokenizer), start = load_model(name), time.perf_counter()
    size, mean, std, _ = input_of(model)

    def maps(given: Cases, layer: str) -> Tensor:
        return phrase_maps(model, tokenizer, normalise(given[0], size, mean, std), given[1], layer, given[2].shape[-1])

    layers: dict[str, dict[str, float]] = {}
    for layer in map_layers(model):
        found = maps(tuning, layer)
        threshold = _best_threshold(found, tuning[2])
        means = {key: float(values.mean()) for key, values in scores(found, tuning[2], threshold).items()}
        layers[layer] = {**means, "threshold": threshold}
        if bar is not None:
            bar.update()
    best = max(layers, key=lambda layer: layers[layer]["pointing"])
    found = scores(maps(test, best), test[2], layers[best]["threshold"])
    described = describe_model(model_name(name), model)
    return _record(described["name"], found, described, seed, time.perf_counter() - start, layer=best, layers=layers)


def grounding(pictures: int = 500, seed: int = 0, models: Sequence[str] = MODELS) -> None:
    """Score base, kd and teacher, a random and a central map; one record each in data/results/grounding.

    Args:
        pictures: number of test pictures; half as many of the validation split choose layer and threshold.
        seed: of the pictures and of the bootstrap.
        models: base, kd, clip, teacher, or model folders.
    """
    require(seed >= 0, "seed", seed, "give a whole number from 0")
    names = [model_name(name) for name in models]
    remedy = f"give models of different names, and none called {' or '.join(BASELINES)}"
    require(len({*names, *BASELINES}) == len(names) + len(BASELINES), "models", names, remedy)
    tuning, test = cases("val", max(2, pictures // 2), seed=seed), cases("test", pictures, seed=seed)
    area = 100 * test[2].float().mean().item()
    with tqdm(desc="grounding", unit="layer") as bar:
        for name in models:
            record = score_model(name, tuning, test, seed, bar)
            save_result(RESULTS / f"grounding_{record['model']['name']}.json", record)
    nothing = {"parameters": 0, "sha256": "0" * 64}
    for name, maps in baselines(test[2], seed=seed).items():
        threshold = _best_threshold(baselines(tuning[2], seed=seed + 1)[name], tuning[2])
        record = _record(
            name, scores(maps, test[2], threshold), nothing, seed, 0.0, mean_area=area, threshold=threshold
        )
        save_result(RESULTS / f"grounding_{name}.json", record)
