"""What each defect costs: trainings with it, and measurements of those that show without training.

``python -m mclip defects`` writes data/results/defects in the manner of :mod:`mclip.jobs`. The same trainings without
defects are ablations: :mod:`mclip.ablations`.
"""

from __future__ import annotations

import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer

from mclip.config import PRESETS, TrainConfig, get_profile, require
from mclip.evaluate import evaluate_zero_shot
from mclip.files import DATA
from mclip.pairs import BatchSource
from mclip.recipes import evaluate_all, load_data, load_model, student_prepare, train_student
from mclip.results import describe_model, make_result
from mclip.scenes.test_sets import scene_sets
from mclip.study.ablations import EPOCHS, PROFILE, Run, plan, run_ablation
from mclip.study.defects import DEFECTS, Defect, left_and_right_swapped
from mclip.study.jobs import Job, results_folder, work_off
from mclip.text_encoder import Tokenizer

RESULTS = DATA / "results" / "defects"
Numbers = dict[str, dict[str, float]]


def both(defect: Defect, measure: Callable[[], float]) -> dict[str, float]:
    """What ``measure`` says without the defect and with it."""
    healthy = measure()
    with defect.switched_on():
        return {"healthy": healthy, "defective": measure()}


def measure_preparation(defect: Defect, profile: str) -> Numbers:
    """Defect 9, its two halves apart: top-1 (%) of the student that ships, and of pictures twice as wide as high."""
    (model, tokenizer), sets = load_model("kd"), scene_sets(64, get_profile(profile).test_pictures)
    edge = sets["shape"].images[..., :1].expand(-1, -1, -1, 32)
    wide = replace(sets["shape"], images=torch.cat([edge, sets["shape"].images, edge], dim=-1))

    def top1(chosen: list) -> float:
        records = [evaluate_zero_shot(model, tokenizer, each, "kd") for each in chosen]
        return statistics.fmean(record["metrics"]["top1"]["value"] for record in records)

    prompts, pictures = (replace(defect, patches=(patch,)) for patch in defect.patches)
    return {
        "prompts with a period: mean top-1 of six sets, %": both(prompts, lambda: top1(list(sets.values()))),
        "wide pictures squashed: top-1 of shape, %": both(pictures, lambda: top1([wide])),
    }


def measure_ranks(defect: Defect, profile: str) -> Numbers:
    """Defect 10: top-5 (%) of the student that ships, and the mean of the sets where one of them has failed."""

    def measured(key: str) -> dict[str, float]:
        records = evaluate_all({"kd": load_model("kd")}, profile=profile, relation=False)
        return {r["dataset"]: r["metrics"][key]["value"] for r in records if key in r["metrics"]}

    with defect.switched_on():
        defective = measured("top5")
    numbers = {
        f"top-5 of {name}, %": {"healthy": value, "defective": defective[name]}
        for name, value in measured("top5").items()
    }
    measured_sets = list(measured("top1").values())[1:]  # the first one timed out
    means = statistics.fmean(measured_sets), statistics.fmean([0.0, *measured_sets])
    return numbers | {"mean top-1 where one of six sets failed, %": {"healthy": means[0], "defective": means[1]}}


def measure_checkpoints(defect: Defect, profile: str) -> Numbers:
    """Defect 12: the size of a checkpoint, where a killed run goes on, and whether a file can run code of its own."""
    training, validation = load_data("smoke", 64, progress=False)
    settings = TrainConfig(max_epochs=2, batch_size=64, progress=False)

    def measure(kind: str) -> float:
        with tempfile.TemporaryDirectory() as name:
            folder, steps = Path(name), []
            if kind == "code":
                return float(_code_runs(folder))

            def killed_at_the_sixth(record: dict[str, Any]) -> None:
                if record["step"] == 5:
                    raise KeyboardInterrupt

            run = partial(train_student, PRESETS["course"], training, validation, settings, folder)
            with suppress(KeyboardInterrupt):
                run(on_record=killed_at_the_sixth)
            if kind == "size":
                return next(folder.glob("checkpoint-*.pt")).stat().st_size / 1e6
            run(on_record=steps.append)
            return float(steps[0]["step"])

    labels = {
        "size": "checkpoint, MB",
        "resume": "killed in step 5, the run goes on with step",
        "code": "programs that a planted file could start",
    }
    return {label: both(defect, partial(measure, kind)) for kind, label in labels.items()}


def _code_runs(folder: Path) -> bool:
    class Planted:
        def __reduce__(self) -> tuple:
            return Path.touch, (folder / "ran",)

    torch.save(Planted(), folder / "planted.pt")
    with suppress(pickle.UnpicklingError):
        torch.load(folder / "planted.pt", weights_only=True)
    return (folder / "ran").exists()


def measure_table(defect: Defect, profile: str) -> Numbers:
    """Defect 13: milliseconds to read a batch of 64, the two forms in turns."""
    training, _ = load_data(profile, 64, progress=False)
    config = PRESETS["course"]
    batches = BatchSource(training, Tokenizer(32), student_prepare(config), 64, 0)
    pictures = np.arange(64)

    def milliseconds() -> float:
        start = time.perf_counter()
        batches._batch(pictures, np.zeros(64, int), 0)
        return 1000 * (time.perf_counter() - start)

    turns = [both(defect, milliseconds) for _ in range(20)]
    return {
        f"a batch from {len(training):,} pictures, ms": {
            key: statistics.median(turn[key] for turn in turns) for key in turns[0]
        }
    }


def measure_words(defect: Defect, profile: str) -> Numbers:
    """Defect 14: how many whole words of CLIP's vocabulary the edit turns into others or into none."""
    known = {piece.removesuffix("</w>") for piece in SimpleTokenizer().encoder if piece.endswith("</w>")}
    words = [word for word in known - {"left", "right"} if left_and_right_swapped(word) != word]
    tokens = Tokenizer(32)
    length = {
        key: float(tokens([text]).shape[1] - 2)
        for key, text in {"healthy": "bright", "defective": left_and_right_swapped("bright")}.items()
    }
    return {
        "words of the vocabulary that are damaged": {"healthy": 0.0, "defective": float(len(words))},
        "tokens of “bright”": length,
    }


MEASURES = {9: measure_preparation, 10: measure_ranks, 12: measure_checkpoints, 13: measure_table, 14: measure_words}


def train_with(defect: Defect, run: Run, folder: Path) -> dict[str, Any]:
    """The record of a training with ``defect`` on from the first step to the last test picture."""
    with defect.switched_on(train_all_the_same=True):
        record = run_ablation(f"defect {defect.number}", run, folder)
    configuration = run.as_json() | {"defect": defect.number}
    return record | {"task": "defect", "details": record["details"] | {"configuration": configuration}}


def measure(defect: Defect, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The record of what ``defect`` changes, without training."""
    start, numbers = time.perf_counter(), MEASURES[defect.number](defect, settings["profile"])
    return make_result(
        "defect",
        "scenes",
        "test",
        get_profile(settings["profile"]).test_pictures,
        describe_model("kd", load_model("kd")[0]),
        numbers,
        seconds=time.perf_counter() - start,
        details={"configuration": settings},
    )


def defects(seeds: int = 3, out_dir: str = "runs/defects", epochs: int = EPOCHS, profile: str = PROFILE) -> None:
    """Measure every defect; one record of each in data/results/defects.

    With other epochs or another profile the records go to ``out_dir/results``.

    Args:
        seeds: number of seeds of the trainings.
        out_dir: where runs keep their checkpoints until they are done.
        epochs: passes over all pictures of the profile.
        profile: smoke, cpu or gpu: how many scenes.
    """
    require(seeds >= 1, "seeds", seeds, "use 1 or more")
    require(epochs >= 1, "epochs", epochs, "use 1 or more")
    results, jobs = results_folder(RESULTS, out_dir, (epochs, profile) == (EPOCHS, PROFILE)), []
    weights = describe_model("kd", load_model("kd")[0])["sha256"]
    for number in MEASURES:
        settings = {"defect": number, "profile": profile, "model": weights}
        work = partial(measure, DEFECTS[number], settings)
        jobs.append(Job(results / f"defect-{number:02}.json", settings, work))
    for seed in range(seeds):
        for defect in DEFECTS.values():
            if defect.recipe:
                run = plan(defect.recipe, seed, epochs, profile)
                path = results / f"defect-{defect.number:02}-{seed}.json"
                jobs.append(Job(path, run.as_json() | {"defect": defect.number}, partial(train_with, defect, run)))
    work_off(jobs, out_dir, "defects")
