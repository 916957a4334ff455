"""What each part of the recipe is worth: one table of configurations, all trained on equally many samples.

``python -m mclip ablations`` trains them with several seeds, in the manner of :mod:`mclip.jobs`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mclip.config import PRESETS, DistillConfig, TrainConfig, closest, get_profile, require
from mclip.files import DATA, content_key
from mclip.model import MobileCLIP
from mclip.recipes import BASE, evaluate_all, load_data, train_student
from mclip.results import describe_model, make_result
from mclip.steps import TrainError
from mclip.study.jobs import Job, results_folder, work_off

RESULTS = DATA / "results" / "ablations"
EPOCHS, PROFILE = 3, "cpu"
"""Passes and size of the records that ship."""
GROUPS = {
    "terms": "which loss terms",
    "feature": "the form of feature distillation",
    "phases": "when the terms begin",
    "balancing": "how the terms are weighed",
    "temperature": "the temperature of the response term",
    "rate": "the learning rate of either student",
    "crops": "whole pictures or crops",
    "noise": "wrong captions",
    "data": "share of the pictures",
}


@dataclass(frozen=True)
class Ablation:
    """What one configuration changes of the student alone ("base") or of the default recipe ("kd").

    Attributes:
        group: a key of GROUPS.
        title: for tables and figures.
        against: the configuration that it is compared with, seed by seed.
        student: the recipe that is changed.
        distill, train: changed settings of DistillConfig and TrainConfig.
        noise: share of wrong captions.
        data_size: share of the pictures, each then shown more often.
    """

    group: str
    title: str
    against: str
    student: Literal["base", "kd"] = "kd"
    distill: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    noise: float = 0.0
    data_size: float = 1.0


DEFAULT = DistillConfig()
TERMS = ("feature", "response", "similarity", "icl")
PRIORS = {name: getattr(DEFAULT, f"{name}_weight") or 1.0 for name in TERMS}
AT_ONCE = (0.0, 0.0, DEFAULT.phases[2])
WHOLE = {"crop_scale": 1.0, "views": 0}


def _terms(*names: str, at_once: bool = True, **changes: Any) -> dict[str, Any]:
    """Settings with exactly the terms ``names`` beside the student's own, from the first step on or in phases."""
    weights = {f"{name}_weight": PRIORS[name] if name in names else 0.0 for name in TERMS}
    return weights | ({"phases": AT_ONCE} if at_once else {}) | changes


def _feature(title: str, **changes: Any) -> Ablation:
    return Ablation("feature", title, "feature", distill=_terms("feature", **changes))


def _phases(feature: float, response: float) -> Ablation:
    bounds = (feature, response, max(response, DEFAULT.phases[2]))
    title = f"feature from {feature:.0%}, response from {response:.0%}"
    return Ablation("phases", title, "kd", distill={"phases": bounds})


def _balanced(title: str, *strategies: str, **changes: Any) -> Ablation:
    return Ablation("balancing", title, "kd", distill={"balancers": strategies, **changes})


def _temperature(title: str, first: float, last: float) -> Ablation:
    return Ablation("temperature", title, "kd", distill={"max_temperature": first, "min_temperature": last})


def _rate(title: str, student: Literal["base", "kd"], rate: float) -> Ablation:
    return Ablation("rate", f"{title}, peak rate {rate:g}", student, student, train={"learning_rate": rate})


ABLATIONS = {
    "base": Ablation("terms", "student alone", "base", "base"),
    "base-jsd": Ablation("terms", "student alone, JSD loss", "base", "base", distill={"task": "jsd"}),
    "kd": Ablation("terms", "the default: three phases", "base"),
    "feature": Ablation("terms", "+ feature", "base", distill=_terms("feature")),
    "response": Ablation("terms", "+ response", "base", distill=_terms("response")),
    "similarity": Ablation("terms", "+ similarity", "base", distill=_terms("similarity")),
    "icl": Ablation("terms", "+ icl", "base", distill=_terms("icl")),
    "at-once": Ablation("terms", "+ feature and response at once", "base", distill=_terms("feature", "response")),
    "all-at-once": Ablation("terms", "+ all four at once", "base", distill=_terms(*TERMS)),
    "all-in-phases": Ablation("terms", "+ all four in three phases", "base", distill=_terms(*TERMS, at_once=False)),
    "feature-mlp": _feature("embedding, cosine, aligner", aligner="mlp"),
    "feature-mse": _feature("embedding, summed MSE, identity", feature_form="mse"),
    "penultimate": _feature("penultimate, cosine, aligner", feature_source="penultimate", aligner="mlp"),
    "phases-10-50": _phases(0.1, 0.5),
    "phases-30-60": _phases(0.3, 0.6),
    "fixed": _balanced("fixed, the default's priors", "fixed"),
    "fixed-alone": Ablation(
        "balancing", "fixed, without response", "fixed", distill={"balancers": ("fixed",), "response_weight": 0.0}
    ),
    "fixed-equal": _balanced("fixed, all weights equal", "fixed", feature_weight=1.0),
    "magnitude": _balanced("magnitude", "magnitude"),
    "gradient-norm": _balanced("gradient norm", "gradient_norm"),
    "uncertainty": _balanced("uncertainty", "uncertainty"),
    "temperature-1": _temperature("T = 1", 1.0, 1.0),
    "temperature-4": _temperature("T = 4", 4.0, 4.0),
    "base-rate-3e-4": _rate("student alone", "base", 3e-4),
    "base-rate-1e-3": _rate("student alone", "base", 1e-3),
    "kd-rate-1e-3": _rate("default", "kd", 1e-3),
    "base-whole": Ablation("crops", "student alone, whole pictures", "base", "base", train=WHOLE),
    "kd-whole": Ablation("crops", "default, whole pictures", "kd", train=WHOLE),
    "base-noise-10": Ablation("noise", "student alone, 10 % wrong", "base", "base", noise=0.1),
    "kd-noise-10": Ablation("noise", "default, 10 % wrong", "kd", noise=0.1),
    "base-noise-30": Ablation("noise", "student alone, 30 % wrong", "base", "base", noise=0.3),
    "kd-noise-30": Ablation("noise", "default, 30 % wrong", "kd", noise=0.3),
    "base-data-30": Ablation("data", "student alone, 30 % of the data", "base", "base", data_size=0.3),
    "kd-data-30": Ablation("data", "default, 30 % of the data", "kd", data_size=0.3),
    "base-data-10": Ablation("data", "student alone, 10 % of the data", "base", "base", data_size=0.1),
    "kd-data-10": Ablation("data", "default, 10 % of the data", "kd", data_size=0.1),
}
"""Name: configuration. One that agrees with an earlier one in all settings is not run again: :func:`distinct`."""


@dataclass(frozen=True)
class Run:
    """All that decides how one training ends: a record is finished work only for a run that agrees in all of it."""

    train: TrainConfig
    distill: DistillConfig
    noise: float
    data_size: float
    profile: str

    def as_json(self) -> dict[str, Any]:
        """The plain data that a record keeps."""
        return json.loads(json.dumps(asdict(self)))


def plan(name: str, seed: int = 0, epochs: int = EPOCHS, profile: str = PROFILE) -> Run:
    """The run called ``name``: the profile's settings with the configuration's changes, at equal samples seen.

    ``epochs`` are passes over all pictures of the profile; a share of them is shown more often. ConfigError
    for an unknown name.
    """
    require(name in ABLATIONS, "ablation", name, closest(name, ABLATIONS))
    chosen, defaults = ABLATIONS[name], get_profile(profile)
    settings = defaults.training(progress=False)
    pictures = round(chosen.data_size * defaults.pictures)
    batch_size = min(settings.batch_size, pictures)
    times = (defaults.pictures // settings.batch_size * settings.batch_size) / (pictures // batch_size * batch_size)
    settings = replace(
        settings,
        max_epochs=round(epochs * times),
        validate_every=round(times),
        batch_size=batch_size,
        seed=seed,
        **chosen.train,
    )
    terms = replace(BASE if chosen.student == "base" else DEFAULT, **chosen.distill)
    return Run(settings, terms, chosen.noise, chosen.data_size, profile)


def distinct() -> list[str]:
    """The names of ABLATIONS without those that have the settings of an earlier one."""
    first: dict[str, str] = {}
    for name in ABLATIONS:
        first.setdefault(content_key(plan(name).as_json()), name)
    return list(first.values())


def run_ablation(name: str, run: Run, folder: Path) -> dict[str, Any]:
    """Train and evaluate ``run``, and return its record: top-1 of each zero-shot set of scenes, and their mean.

    A training that diverges gives the record of a failure. ``folder`` holds checkpoints and log.
    """
    config, seed = PRESETS["course"], run.train.seed
    training, validation = load_data(
        run.profile, config.image.image_size, data_size=run.data_size, noise=run.noise, seed=seed, progress=False
    )
    details: dict[str, Any] = {"configuration": run.as_json()}
    try:
        result = train_student(config, training, validation, run.train, folder, distill=run.distill)
    except TrainError as error:
        model = describe_model(name, MobileCLIP(config))
        return make_result("ablation", "scenes", "test", None, model, error=str(error), seed=seed, details=details)
    model = result.model
    records = evaluate_all({name: (model, model.tokenizer)}, profile=run.profile, seed=seed)
    sets = {record["dataset"]: record["metrics"]["top1"] for record in records}
    metrics = {"mean": sum(top1["value"] for top1 in sets.values()) / len(sets), "sets": sets}
    curve = [[r["step"], round(r["loss"], 4)] for r in result.log if "loss" in r]
    details |= {
        "samples_seen": result.steps * run.train.batch_size,
        "validation": [[record["step"], record["validation"]["r1"]] for record in result.validations()],
        "loss": curve[:: max(1, len(curve) // 100)],
    }
    n = sum(record["n"] for record in records)
    return make_result(
        "ablation",
        "scenes",
        "test",
        n,
        records[0]["model"],
        metrics,
        seed=seed,
        seconds=result.seconds,
        details=details,
    )


def ablations(seeds: int = 3, out_dir: str = "runs/ablations", epochs: int = EPOCHS, profile: str = PROFILE) -> None:
    """Train every configuration with several seeds; one record of each in data/results/ablations.

    With other epochs or another profile the records go to ``out_dir/results``. Seed 0 of all comes first. Start it
    twice to use two processors, each with OMP_NUM_THREADS=1.

    Args:
        seeds: number of seeds.
        out_dir: where runs keep their checkpoints until they are done.
        epochs: passes over all pictures of the profile; a share of them is shown as often in all.
        profile: smoke, cpu or gpu: how many scenes.
    """
    require(seeds >= 1, "seeds", seeds, "use 1 or more")
    require(epochs >= 1, "epochs", epochs, "use 1 or more")
    folder = results_folder(RESULTS, out_dir, (epochs, profile) == (EPOCHS, PROFILE))
    runs = [(name, seed, plan(name, seed, epochs, profile)) for seed in range(seeds) for name in distinct()]
    jobs = [
        Job(folder / f"{name}-{seed}.json", run.as_json(), partial(run_ablation, name, run)) for name, seed, run in runs
    ]
    work_off(jobs, out_dir, "ablations")
