"""The table of experiments, ``experiments.yaml``: what is trained or measured, and all that decides how it ends."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import yaml

from mclip.config import DistillConfig, closest, from_mapping, get_profile, require
from mclip.recipes import BASE, load_model
from mclip.results import weights_sha256
from mclip.study.defects import DEFECTS

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
        groups: parts of the question, which rows name.
        rows: by name, the fields of :class:`Experiment`.
    """

    question: str
    seeds: int = 3
    epochs: int | None = None
    summed_up: bool = False
    keeps_models: bool = False
    groups: dict = field(default_factory=dict)
    rows: dict = field(default_factory=dict)


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
        changes: settings of TrainConfig and DistillConfig, and others of :func:`plan`.
        seeds: at most so many.
        defect: number of the defect that is switched on.
        measure: the function of :mod:`mclip.study.measures` that makes the records without training.
    """

    study: str
    name: str
    title: str
    against: str = ""
    group: str = ""
    student: Literal["base", "kd", "clip", "teacher", ""] = "kd"
    changes: dict = field(default_factory=dict)
    seeds: int = 100
    defect: int = 0
    measure: str = ""

    @property
    def full_name(self) -> str:
        """How commands call the row: ``study/name``."""
        return f"{self.study}/{self.name}"

    def described(self) -> dict[str, Any]:
        """What a record keeps of the row, so that whoever reads it needs no table."""
        about = {key: getattr(self, key) for key in ("name", "title", "against", "group", "student")}
        about["question"] = STUDIES[self.study].groups.get(self.group, "")
        return about | ({"checks": DEFECTS[self.defect].checks} if self.defect else {})


def _defect(number: int) -> Experiment:
    """The training that a defect spoils, or the measurement that shows it without training."""
    defect, name = DEFECTS[number], f"defect-{number:02}"
    if not defect.recipe:
        return Experiment("defects", name, defect.title, seeds=1, defect=number, measure="measure_defect")
    healthy = BY_NAME[f"ablations/{defect.recipe}"]
    return Experiment("defects", name, defect.title, defect.recipe, "", healthy.student, healthy.changes, defect=number)


_table = yaml.safe_load(Path(__file__).with_name("experiments.yaml").read_text(encoding="utf-8"))
STUDIES = {name: from_mapping(Study, study, f"{name}.") for name, study in _table.items()}
"""Name of the file in ``data/results``: what it asks."""
_rows = [
    from_mapping(Experiment, {"study": study, "name": name, **row}, f"{study}.{name}.")
    for study, each in STUDIES.items()
    for name, row in each.rows.items()
]
BY_NAME = {row.full_name: row for row in _rows}
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

    ``epochs`` are passes over all pictures of the profile, or of ``data``; a share of the profile's scenes is shown
    more often, so that all rows see equally many samples.
    """
    if row.measure:
        weights = weights_sha256(load_model(row.student)[0]) if row.student else ""
        return {"profile": profile, "model": weights} | ({"defect": row.defect} if row.defect else {})
    size, study = get_profile(profile), STUDIES[row.study]
    training = size.training(progress=False, seed=seed, max_epochs=epochs or study.epochs or size.max_epochs)
    settings = asdict(training) | asdict(BASE if row.student == "base" else DistillConfig())
    settings |= {"student": row.student, "profile": profile, "preset": "course", "noise": 0.0, "data_size": 1.0}
    settings |= {"teacher_model": size.teacher, "teacher_pretrained": size.teacher_pretrained, "defect": row.defect}
    settings |= {"train_data_path": "", "val_data_path": "", **data}
    for key in row.changes:
        require(key in settings, f"{row.full_name}.{key}", row.changes[key], closest(key, settings))
    settings |= row.changes
    if settings["data_size"] < 1 and not settings["train_data_path"]:
        pictures, batch = round(settings["data_size"] * size.pictures), settings["batch_size"]
        settings["batch_size"] = min(batch, pictures)
        in_share = pictures // settings["batch_size"] * settings["batch_size"]
        times = size.pictures // batch * batch / in_share
        settings |= {"max_epochs": round(settings["max_epochs"] * times), "validate_every": round(times)}
    return json.loads(json.dumps(settings))
