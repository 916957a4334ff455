"""The command ``grounding``: the shipped models' maps scored on scenes of two objects, beside two baselines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from mclip.config import require
from mclip.evaluate import input_of
from mclip.files import DATA
from mclip.metrics import bootstrap_interval
from mclip.pairs import normalise
from mclip.recipes import load_model, model_name
from mclip.results import describe_model, make_result, save_result
from mclip.scenes.test_sets import Cases, cases
from mclip.show.grounding import BASELINES, baselines, map_layers, overlap, phrase_maps, scores

RESULTS = DATA / "results" / "grounding"
THRESHOLDS = tuple(round(0.1 * step, 1) for step in range(1, 10))
MODELS = ("base", "kd", "teacher")


def _best_threshold(maps: Tensor, masks: Tensor) -> float:
    return max(THRESHOLDS, key=lambda threshold: overlap(maps, masks, threshold).mean().item())


def _record(
    name: str, found: dict[str, np.ndarray], model: dict[str, Any], seed: int, seconds: float, **details: Any
) -> dict[str, Any]:
    metrics = {
        key: dict(zip(("value", "low", "high"), map(float, bootstrap_interval(values, seed)), strict=True))
        for key, values in found.items()
    }
    return make_result(
        "grounding",
        "scenes of two objects",
        "test",
        len(found["iou"]),
        {**model, "name": name},
        metrics,
        seed=seed,
        seconds=seconds,
        details=details,
    )


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
