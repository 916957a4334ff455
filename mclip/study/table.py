"""The experiments behind ``data/results``: one table of what is trained or measured, and what each row changes.

A new question is a new row: name the recipe that it starts from, the settings that it changes, and the row that it is
compared with. ``python -m mclip study`` does the work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal

from mclip.config import DistillConfig, closest, get_profile, require
from mclip.recipes import BASE
from mclip.results import weights_sha256
from mclip.study.defects import DEFECTS
from mclip.study.measures import (
    baseline_maps,
    grad_cam_maps,
    measure_defect,
    pairs_and_prompts,
    shipped,
    zero_shot_sets,
)

Settings = dict[str, Any]
TRAINED_HERE = "trained here"
"""As a teacher: the row "teacher" of the same study."""


@dataclass(frozen=True)
class Study:
    """What the rows of one results file have in common.

    Attributes:
        question: one line that says what is asked.
        seeds: number of seeds of the records that ship.
        epochs: passes of the records that ship over all pictures; None: as many as the profile says.
        summed_up: one record for each training, with the mean over all sets; else one for each set.
        keeps_models: the trained models stay in ``out_dir``.
    """

    question: str
    seeds: int = 3
    epochs: int | None = None
    summed_up: bool = False
    keeps_models: bool = False


STUDIES = {
    "scenes": Study(
        "how good are the student alone, a plain CLIP, the distilled student and the teacher?", keeps_models=True
    ),
    "ablations": Study("what is each part of the recipe worth?", epochs=3, summed_up=True),
    "defects": Study("what does each known defect cost?", epochs=3, summed_up=True),
    "views": Study("whole pictures, cached crops, or an online teacher?", seeds=1),
    "photographs": Study("what does distillation gain on captions of photographs?", epochs=40, keeps_models=True),
    "grounding": Study("where do the models that ship look?", seeds=1),
    "examples": Study("what do they make of twelve pairs, and of a prompt's wording?", seeds=1),
}
"""Name of the file in ``data/results``: what it asks."""


@dataclass(frozen=True)
class Experiment:
    """One row of the table.

    Attributes:
        study: a key of STUDIES.
        name: what records call the model; the same in all seeds.
        title: for tables and figures.
        against: the row that it is compared with, seed by seed; of a defect, the ablation without it.
        group: the part of the study's question that it belongs to.
        student: the recipe that is changed, or the model that ships and is measured.
        changes: settings of TrainConfig and DistillConfig, and ``noise`` (share of wrong captions), ``data_size``
            (share of the pictures), ``teacher_model``, ``teacher_pretrained`` and ``preset``.
        seeds: at most so many.
        defect: number of the defect that is switched on.
        measure: makes the records of the row without training.
    """

    study: str
    name: str
    title: str
    against: str = ""
    group: str = ""
    student: Literal["base", "kd", "clip", "teacher", ""] = "kd"
    changes: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 100
    defect: int = 0
    measure: Callable[[Experiment, Settings], list[dict[str, Any]]] | None = None

    @property
    def full_name(self) -> str:
        """How commands call the row: ``study/name``."""
        return f"{self.study}/{self.name}"

    def described(self) -> dict[str, Any]:
        """What a record keeps of the row, so that whoever reads it needs no table."""
        keys = ("name", "title", "against", "group", "student")
        found = {key: getattr(self, key) for key in keys} | {"question": GROUPS.get(self.group, "")}
        return found | ({"checks": DEFECTS[self.defect].checks} if self.defect else {})


DEFAULT = DistillConfig()
TERMS = ("feature", "response", "similarity", "icl")
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


def _terms(*names: str, at_once: bool = True, **changes: Any) -> dict[str, Any]:
    """Settings with exactly the terms ``names`` beside the student's own, from the first step on or in phases."""
    weights = {
        f"{name}_weight": (getattr(DEFAULT, f"{name}_weight") or 1.0) if name in names else 0.0 for name in TERMS
    }
    return weights | ({"phases": (0.0, 0.0, DEFAULT.phases[2])} if at_once else {}) | changes


WHOLE = {"crop_scale": 1.0, "views": 0}
ABLATIONS = {
    "terms": [
        ("base", "student alone", "base", {}),
        ("base-jsd", "student alone, JSD loss", "base", {"task": "jsd"}),
        ("kd", "the default: three phases", "base", {}),
        ("feature", "+ feature", "base", _terms("feature")),
        ("response", "+ response", "base", _terms("response")),
        ("similarity", "+ similarity", "base", _terms("similarity")),
        ("icl", "+ icl", "base", _terms("icl")),
        ("at-once", "+ feature and response at once", "base", _terms("feature", "response")),
        ("all-at-once", "+ all four at once", "base", _terms(*TERMS)),
        ("all-in-phases", "+ all four in three phases", "base", _terms(*TERMS, at_once=False)),
    ],
    "feature": [
        ("feature-mlp", "embedding, cosine, aligner", "feature", _terms("feature", aligner="mlp")),
        ("feature-mse", "embedding, summed MSE, identity", "feature", _terms("feature", feature_form="mse")),
        (
            "penultimate",
            "penultimate, cosine, aligner",
            "feature",
            _terms("feature", feature_source="penultimate", aligner="mlp"),
        ),
    ],
    "phases": [
        ("phases-10-50", "feature from 10%, response from 50%", "kd", {"phases": (0.1, 0.5, 0.9)}),
        ("phases-30-60", "feature from 30%, response from 60%", "kd", {"phases": (0.3, 0.6, 0.9)}),
    ],
    "balancing": [
        ("fixed", "fixed, the default's priors", "kd", {"balancers": ("fixed",)}),
        ("fixed-alone", "fixed, without response", "fixed", {"balancers": ("fixed",), "response_weight": 0.0}),
        ("fixed-equal", "fixed, all weights equal", "kd", {"balancers": ("fixed",), "feature_weight": 1.0}),
        ("magnitude", "magnitude", "kd", {"balancers": ("magnitude",)}),
        ("gradient-norm", "gradient norm", "kd", {"balancers": ("gradient_norm",)}),
        ("uncertainty", "uncertainty", "kd", {"balancers": ("uncertainty",)}),
    ],
    "temperature": [
        ("temperature-1", "T = 1", "kd", {"max_temperature": 1.0, "min_temperature": 1.0}),
        ("temperature-4", "T = 4", "kd", {"max_temperature": 4.0, "min_temperature": 4.0}),
    ],
    "rate": [
        ("base-rate-3e-4", "student alone, peak rate 0.0003", "base", {"learning_rate": 3e-4}),
        ("base-rate-1e-3", "student alone, peak rate 0.001", "base", {"learning_rate": 1e-3}),
        ("kd-rate-1e-3", "default, peak rate 0.001", "kd", {"learning_rate": 1e-3}),
    ],
    "crops": [
        ("base-whole", "student alone, whole pictures", "base", WHOLE),
        ("kd-whole", "default, whole pictures", "kd", WHOLE),
    ],
    "noise": [
        ("base-noise-10", "student alone, 10 % wrong", "base", {"noise": 0.1}),
        ("kd-noise-10", "default, 10 % wrong", "kd", {"noise": 0.1}),
        ("base-noise-30", "student alone, 30 % wrong", "base", {"noise": 0.3}),
        ("kd-noise-30", "default, 30 % wrong", "kd", {"noise": 0.3}),
    ],
    "data": [
        ("base-data-30", "student alone, 30 % of the data", "base", {"data_size": 0.3}),
        ("kd-data-30", "default, 30 % of the data", "kd", {"data_size": 0.3}),
        ("base-data-10", "student alone, 10 % of the data", "base", {"data_size": 0.1}),
        ("kd-data-10", "default, 10 % of the data", "kd", {"data_size": 0.1}),
    ],
}
"""Group: rows of name, title, what it is compared with, and what it changes; "base" changes the student alone."""


def _defect(number: int) -> Experiment:
    """The training that a defect spoils, or the measurement that shows it without training."""
    defect, name = DEFECTS[number], f"defect-{number:02}"
    if not defect.recipe:
        return Experiment("defects", name, defect.title, seeds=1, defect=number, measure=measure_defect)
    healthy = BY_NAME[f"ablations/{defect.recipe}"]
    return Experiment("defects", name, defect.title, defect.recipe, "", healthy.student, healthy.changes, defect=number)


SCRATCH = {"max_epochs": 12, "batch_size": 128, "learning_rate": 1.5e-3, "weight_decay": 0.1, **WHOLE}
OWN_TEACHER = {"teacher_model": TRAINED_HERE}
TABLE = [
    Experiment("scenes", "teacher", "teacher", student="teacher", measure=zero_shot_sets, seeds=1),
    Experiment("scenes", "base", "student alone", student="base"),
    Experiment("scenes", "clip", "plain CLIP", student="clip"),
    Experiment("scenes", "kd", "distilled student", "base"),
    *(
        Experiment("ablations", name, title, against, group, "base" if name.startswith("base") else "kd", changes)
        for group, rows in ABLATIONS.items()
        for name, title, against, changes in rows
    ),
    Experiment("views", "whole", "whole pictures", changes=WHOLE),
    Experiment("views", "cached-views", "four cached crops", "whole", changes={"crop_scale": 0.6, "views": 4}),
    Experiment(
        "views",
        "online",
        "a teacher in the loop",
        "whole",
        changes={"crop_scale": 0.6, "views": 0, "online_teacher": True},
    ),
    Experiment("photographs", "teacher", "teacher", student="teacher", changes=SCRATCH, seeds=1),
    Experiment("photographs", "base", "student alone", student="base", changes={"learning_rate": 1e-3}),
    Experiment("photographs", "kd", "distilled student", "base", changes=OWN_TEACHER),
    *(Experiment("grounding", name, name, student=name, measure=grad_cam_maps) for name in ("base", "kd", "teacher")),
    Experiment("grounding", "baselines", "random and central maps", student="", measure=baseline_maps),
    *(
        Experiment("examples", name, name, student=name, measure=pairs_and_prompts)
        for name in ("base", "kd", "teacher")
    ),
]
BY_NAME = {row.full_name: row for row in TABLE}
BY_NAME |= {row.full_name: row for row in map(_defect, DEFECTS)}
"""All experiments by their full name."""


def choose(names: list[str]) -> list[Experiment]:
    """The rows called ``study``, ``study/name`` or by a pattern such as ``ablations/base-*``; ConfigError for none."""
    for name in names:
        matching = name in STUDIES or any(fnmatch(known, name) for known in BY_NAME)
        require(matching, "names", name, closest(name, [*STUDIES, *BY_NAME]))
    return [row for row in BY_NAME.values() if any(row.study == name or fnmatch(row.full_name, name) for name in names)]


def plan(row: Experiment, seed: int = 0, epochs: int | None = None, profile: str = "cpu", **data: Any) -> Settings:
    """All that decides what a row's records say, as plain data: a record is finished work only if it agrees in it.

    ``epochs`` are passes over all pictures of the profile, or of ``data``; a share of them is shown more often, so
    that all rows see equally many samples.
    """
    if row.measure:
        weights = weights_sha256(shipped(row.student)[0]) if row.student else ""
        return {"profile": profile, "model": weights} | ({"defect": row.defect} if row.defect else {})
    size = get_profile(profile)
    training = size.training(
        progress=False, seed=seed, max_epochs=epochs or STUDIES[row.study].epochs or size.max_epochs
    )
    settings = asdict(training) | asdict(BASE if row.student == "base" else DEFAULT)
    settings |= {"student": row.student, "profile": profile, "preset": "course", "noise": 0.0, "data_size": 1.0}
    settings |= {"teacher_model": size.teacher, "teacher_pretrained": size.teacher_pretrained, "defect": row.defect}
    settings |= {"train_data_path": "", "val_data_path": "", **data}
    unknown = [key for key in row.changes if key not in settings]
    require(not unknown, f"{row.full_name}.changes", unknown, f"no such settings; {closest(str(unknown), settings)}")
    settings |= row.changes
    if settings["data_size"] < 1 and not settings["train_data_path"]:
        pictures = round(settings["data_size"] * size.pictures)
        batch = min(settings["batch_size"], pictures)
        times = size.pictures // settings["batch_size"] * settings["batch_size"] / (pictures // batch * batch)
        settings |= {
            "max_epochs": round(settings["max_epochs"] * times),
            "validate_every": round(times),
            "batch_size": batch,
        }
    return json.loads(json.dumps(settings))
