"""Measurements of the models that ship: rows of the table of experiments that need no training.

Each function takes the row and its settings, and returns the records.
"""

import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from mclip.config import PRESETS, TrainConfig, get_profile
from mclip.evaluate import ZeroShotSet, embed_images, embed_texts, evaluate_zero_shot, input_of
from mclip.metrics import bootstrap_interval
from mclip.pairs import BatchSource, normalise
from mclip.recipes import evaluate_all, load_data, load_model, student_prepare, train_student
from mclip.results import describe_model, make_result
from mclip.scenes.test_sets import Cases, cases, scene_sets
from mclip.scenes.world import SceneConfig
from mclip.show.grounding import baselines, map_layers, overlap, phrase_maps, scores
from mclip.sources.loading import load_pairs
from mclip.study.defects import PATCHES, Patch, left_and_right_swapped, switched_on
from mclip.text_encoder import Tokenizer

Records = list[dict[str, Any]]
Settings = Mapping[str, Any]
Numbers = dict[str, dict[str, float]]
NO_MODEL = {"parameters": 0, "sha256": "0" * 64}
THRESHOLDS = tuple(round(0.1 * step, 1) for step in range(1, 10))
WORDINGS = ("{}", "a {}", "a picture of a {}", "a photo of a {}", "there is a {}")
WORDINGS += ("I think that this may be a {}, perhaps",)

shipped = cache(load_model)
"""A model that ships, and its tokenizer, loaded once."""


def zero_shot_sets(row: Any, settings: Settings) -> Records:
    """Top-1 of every set of scenes."""
    return evaluate_all({row.name: shipped(row.student)}, profile=settings["profile"])


@cache
def _cases(profile: str) -> tuple[Cases, Cases]:
    """Scenes of two objects to choose layer and threshold on, and twice as many to test on."""
    count = get_profile(profile).test_pictures // 4
    return cases("val", count // 2), cases("test", count)


def _best_threshold(maps: Tensor, masks: Tensor) -> float:
    return max(THRESHOLDS, key=lambda threshold: overlap(maps, masks, threshold).mean().item())


def _grounding(model: Settings, scored: dict[str, np.ndarray], start: float, **details: Any) -> dict[str, Any]:
    ends = ("value", "low", "high")
    metrics = {key: dict(zip(ends, map(float, bootstrap_interval(own)), strict=True)) for key, own in scored.items()}
    more = {"seconds": time.perf_counter() - start, "details": details}
    return make_result("grounding", "scenes of two objects", "test", len(scored["iou"]), model, metrics, **more)


def grad_cam_maps(row: Any, settings: Settings) -> Records:
    """A model's maps; its layer (by pointing) and threshold (by overlap) are chosen on validation scenes alone."""
    (model, tokenizer), start = shipped(row.student), time.perf_counter()
    size, mean, std, _ = input_of(model)
    tuning, test = _cases(settings["profile"])

    def maps(given: Cases, layer: str) -> Tensor:
        return phrase_maps(model, tokenizer, normalise(given[0], size, mean, std), given[1], layer, given[2].shape[-1])

    layers: dict[str, dict[str, float]] = {}
    for layer in map_layers(model):
        own_maps = maps(tuning, layer)
        threshold = _best_threshold(own_maps, tuning[2])
        means = {key: float(values.mean()) for key, values in scores(own_maps, tuning[2], threshold).items()}
        layers[layer] = {**means, "threshold": threshold}
    best = max(layers, key=lambda layer: layers[layer]["pointing"])
    scored = scores(maps(test, best), test[2], layers[best]["threshold"])
    return [_grounding(describe_model(row.name, model), scored, start, layer=best, layers=layers)]


def baseline_maps(row: Any, settings: Settings) -> Records:
    """Maps that know nothing of picture and phrase."""
    (tuning, test), start = _cases(settings["profile"]), time.perf_counter()
    area, others, records = 100 * test[2].float().mean().item(), baselines(tuning[2], seed=1), []
    for name, maps in baselines(test[2]).items():
        threshold = _best_threshold(others[name], tuning[2])
        scored = scores(maps, test[2], threshold)
        records.append(_grounding({**NO_MODEL, "name": name}, scored, start, mean_area=area, threshold=threshold))
    return records


def pairs_and_prompts(row: Any, settings: Settings) -> Records:
    """Cosines of twelve validation pairs, and top-1 of the set colour-shape by the wording of the prompt."""
    (model, tokenizer), start = shipped(row.student), time.perf_counter()
    validation = load_pairs("scenes", 64, scenes=SceneConfig(500, 64, "val"), progress=False)
    first = {own[0]: number for number, own in reversed(list(enumerate(validation.captions[:60])))}
    rows = sorted(first.values())[:12]
    captions = [validation.captions[number][0] for number in rows]
    images = embed_images(model, np.asarray(validation.images[rows]))[0]
    cosines = (images @ embed_texts(model, tokenizer, captions).T).numpy().astype(float)
    test = scene_sets(64, get_profile(settings["profile"]).test_pictures)["colour-shape"]
    embedded, _ = embed_images(model, test.images)
    records = [evaluate_zero_shot(model, tokenizer, test, row.name, prompt=w, embeddings=embedded) for w in WORDINGS]
    top1 = {wording: record["metrics"]["top1"] for wording, record in zip(WORDINGS, records, strict=True)}
    described, seconds = describe_model(row.name, model), time.perf_counter() - start
    details = {"captions": captions, "cosines": np.round(cosines, 4).tolist()}
    return [make_result("examples", "scenes", "val", 12, described, top1, seconds=seconds, details=details)]


def measure_defect(row: Any, settings: Settings) -> Records:
    """What a defect changes without training: each number healthy and defective."""
    start, profile = time.perf_counter(), settings["profile"]
    numbers = MEASURES[row.defect](PATCHES[row.defect], profile)
    model, n = describe_model(row.name, shipped("kd")[0]), get_profile(profile).test_pictures
    return [make_result("defect", "scenes", "test", n, model, numbers, seconds=time.perf_counter() - start)]


def both(patches: Sequence[Patch], measure: Callable[[], dict[str, float]]) -> Numbers:
    """The numbers of ``measure`` by their labels, without ``patches`` and with them."""
    healthy = measure()
    with switched_on(*patches):
        defective = measure()
    return {label: {"healthy": healthy[label], "defective": defective[label]} for label in healthy}


def measure_preparation(patches: Sequence[Patch], profile: str) -> Numbers:
    """Defect 9, its two halves apart: top-1 (%) of the student, and of pictures twice as wide as high."""
    (model, tokenizer), sets = shipped("kd"), scene_sets(64, get_profile(profile).test_pictures)
    edge = sets["shape"].images[..., :1].expand(-1, -1, -1, 32)
    wide = replace(sets["shape"], images=torch.cat([edge, sets["shape"].images, edge], dim=-1))

    def top1(label: str, *chosen: ZeroShotSet) -> dict[str, float]:
        records = [evaluate_zero_shot(model, tokenizer, each, "kd") for each in chosen]
        return {label: statistics.fmean(record["metrics"]["top1"]["value"] for record in records)}

    mean, squashed = "prompts with a period: mean top-1 of six sets, %", "wide pictures squashed: top-1 of shape, %"
    prompts = both(patches[:1], lambda: top1(mean, *sets.values()))
    return prompts | both(patches[1:], lambda: top1(squashed, wide))


def measure_ranks(patches: Sequence[Patch], profile: str) -> Numbers:
    """Defect 10: top-5 (%) of the student, and the mean of the sets where one of them has failed."""

    def measured(key: str, label: str) -> dict[str, float]:
        records = evaluate_all({"kd": shipped("kd")}, profile=profile, relation=False)
        return {label.format(r["dataset"]): r["metrics"][key]["value"] for r in records if key in r["metrics"]}

    top1 = list(measured("top1", "{}").values())[1:]  # the first set timed out
    means = {"healthy": statistics.fmean(top1), "defective": statistics.fmean([0.0, *top1])}
    top5 = both(patches, lambda: measured("top5", "top-5 of {}, %"))
    return top5 | {"mean top-1 where one of six sets failed, %": means}


class Planted:
    """Unpickling it makes an empty file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def measure_checkpoints(patches: Sequence[Patch], profile: str) -> Numbers:
    """Defect 12: the size of a checkpoint, where a killed run goes on, and whether a file can run code of its own."""
    training, validation = load_data("smoke", 64, progress=False)
    settings = TrainConfig(max_epochs=2, batch_size=64, progress=False)

    def killed_at_the_sixth(record: dict[str, Any]) -> None:
        if record["step"] == 5:
            raise KeyboardInterrupt

    def measured() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as name:
            folder, steps = Path(name), []
            run = partial(train_student, PRESETS["course"], training, validation, settings, folder)
            with suppress(KeyboardInterrupt):
                run(on_record=killed_at_the_sixth)
            megabytes = next(folder.glob("checkpoint-*.pt")).stat().st_size / 1e6
            run(on_record=steps.append)
            torch.save(Planted(folder / "ran"), folder / "planted.pt")
            with suppress(pickle.UnpicklingError):
                torch.load(folder / "planted.pt", weights_only=True)
            planted = float((folder / "ran").exists())
        return {
            "checkpoint, MB": megabytes,
            "killed in step 5, the run goes on with step": float(steps[0]["step"]),
            "programs that a planted file could start": planted,
        }

    return both(patches, measured)


def measure_table(patches: Sequence[Patch], profile: str) -> Numbers:
    """Defect 13: milliseconds to read a batch of 64, the two forms in turns."""
    training, _ = load_data(profile, 64, progress=False)
    batches = BatchSource(training, Tokenizer(32), student_prepare(PRESETS["course"]), 64, 0)
    label = f"a batch from {len(training):,} pictures, ms"

    def milliseconds() -> dict[str, float]:
        start = time.perf_counter()
        batches._batch(np.arange(64), np.zeros(64, int), 0)
        return {label: 1000 * (time.perf_counter() - start)}

    turns = [both(patches, milliseconds)[label] for _ in range(20)]
    return {label: {form: statistics.median(turn[form] for turn in turns) for form in turns[0]}}


def measure_words(patches: Sequence[Patch], profile: str) -> Numbers:
    """Defect 14: how many whole words of CLIP's vocabulary the edit turns into others or into none."""
    known = {piece.removesuffix("</w>") for piece in SimpleTokenizer().encoder if piece.endswith("</w>")}
    damaged = [word for word in known - {"left", "right"} if left_and_right_swapped(word) != word]
    words = {"healthy": "bright", "defective": left_and_right_swapped("bright")}
    length = {key: float(Tokenizer(32)([word]).shape[1] - 2) for key, word in words.items()}
    damage = {"healthy": 0.0, "defective": float(len(damaged))}
    return {"words of the vocabulary that are damaged": damage, "tokens of “bright”": length}


MEASURES = {9: measure_preparation, 10: measure_ranks, 12: measure_checkpoints, 13: measure_table, 14: measure_words}
