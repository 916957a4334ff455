"""The table of experiments, ``experiments.yaml``: what is trained or measured, and all that decides how it ends."""

import json
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import yaml

from mclip.config import PRESETS, DistillConfig, ModelConfig, closest, from_mapping, get_profile, require
from mclip.recipes import BASE, load_model, open_clip_config
from mclip.results import weights_sha256
from mclip.study.photographs import OPENAI, PRESET, TeacherName, recipe

Settings = dict[str, Any]


def widened(factor: float) -> ModelConfig:
    """The preset "course" with this many times the widths of both encoders."""
    course = PRESETS["course"]
    text = {key: round(factor * getattr(course.text, key)) for key in ("width", "feed_forward")}
    image = replace(course.image, width=factor * course.image.width)
    return replace(course, name="custom", image=image, text=replace(course.text, **text))


STUDENTS = PRESETS | {"course-half": widened(0.5), "course-double": widened(2.0)}
"""What the setting "preset" of a row may name: the presets, and students for the question of what size is worth."""


@dataclass(frozen=True)
class Study:
    """What the rows of one results file have in common.

    ``seeds`` and ``epochs`` are those of the records that ship; ``epochs`` None is as many as the profile says.
    ``summed_up`` keeps one record of each training, with the mean over all sets, in place of one for each set.
    ``chooses`` judges by other scenes than the test sets', and by retrieval among the validation pairs.
    ``keeps_models`` leaves the trained models in ``out_dir``, but for those of rows with a group, which only serve to
    choose settings. ``groups`` are parts of the question, which rows name. ``world`` is what is trained on and judged.
    ``recipe`` are the settings that the rows change, where those are not the defaults.
    """

    question: str
    seeds: int = 3
    epochs: int | None = None
    summed_up: bool = False
    chooses: bool = False
    keeps_models: bool = False
    world: Literal["scenes", "photographs"] = "scenes"
    groups: dict = field(default_factory=dict)
    recipe: dict = field(default_factory=dict)
    rows: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """One row of the table; ``name`` is what its records call the model.

    ``student`` is the recipe that ``changes`` change, or the model that ships and is measured. ``against`` is the row
    that it is compared with, seed by seed, and ``seeds`` how many it has, where not as many as the study. ``defect`` is
    the number of the defect that is switched on, and ``checks`` are the tests that then fail. ``trial`` is the name of
    one of :data:`mclip.study.trials.TRIALS`. ``measure`` is a function of :mod:`mclip.study.measures` that makes the
    records without training.
    """

    study: str
    name: str
    title: str
    against: str = ""
    group: str = ""
    student: Literal["base", "kd", "clip", "teacher", ""] = "kd"
    changes: dict = field(default_factory=dict)
    seeds: int = 0
    defect: int = 0
    checks: list = field(default_factory=list)
    trial: str = ""
    measure: str = ""

    @property
    def full_name(self) -> str:
        """How commands call the row: ``study/name``."""
        return f"{self.study}/{self.name}"

    @property
    def comes_trained(self) -> bool:
        """Whether it is the teacher that ships, and not one that is trained to choose settings."""
        return self.student == "teacher" and not self.group

    def described(self) -> dict[str, Any]:
        """What a record keeps of the row, so that whoever reads it needs no table."""
        about = {key: getattr(self, key) for key in ("name", "title", "against", "group", "student")}
        about["question"] = STUDIES[self.study].groups.get(self.group, "")
        return about | ({"checks": self.checks} if self.defect else {})


_table = yaml.safe_load(Path(__file__).with_name("experiments.yaml").read_text(encoding="utf-8"))
STUDIES = {name: from_mapping(Study, study, f"{name}.") for name, study in _table.items()}
"""Name of the file in ``data/results``: what it asks."""
BY_NAME = {
    f"{study}/{name}": from_mapping(Experiment, {"study": study, "name": name, **row}, f"{study}.{name}.")
    for study, each in STUDIES.items()
    for name, row in each.rows.items()
}
"""All experiments by their full name."""


def choose(names: list[str]) -> list[Experiment]:
    """The rows called ``study``, ``study/name`` or by a pattern such as ``ablations/base-*``; ConfigError for none."""
    for name in names:
        matching = name in STUDIES or any(fnmatch(known, name) for known in BY_NAME)
        require(matching, "names", name, closest(name, [*STUDIES, *BY_NAME]))
    return [row for row in BY_NAME.values() if any(row.study == name or fnmatch(row.full_name, name) for name in names)]


def plan(
    row: Experiment, seed: int = 0, epochs: int | None = None, profile: str = "cpu", teacher: TeacherName = "lite2"
) -> Settings:
    """All that decides what a row's records say, as plain data: a record is finished work only if it agrees in it.

    ``epochs`` are passes over all pictures of the profile, or all photographs; where a row has a share of them, they
    are shown more often, so that all rows see equally many samples. ``teacher`` is the one of photographs.
    """
    if row.measure:
        weights = weights_sha256(load_model(row.student)[0]) if row.student else ""
        return {"profile": profile, "model": weights} | ({"defect": row.defect} if row.defect else {})
    size, study = get_profile(profile), STUDIES[row.study]
    if study.world == "photographs" and row.comes_trained:
        return {"profile": profile, **teacher_of(row, teacher)}
    settings = {"student": row.student, "profile": profile, "preset": "course", "noise": 0.0, "data_size": 1.0}
    settings |= {"teacher_model": size.teacher, "teacher_pretrained": size.teacher_pretrained, "defect": row.defect}
    alone = row.student != "kd"  # of the terms, they read no more than which loss is their own
    if study.world == "photographs":
        training, terms = recipe(row.student, epochs)
        training = replace(training, progress=False, seed=seed)
        settings |= {"preset": PRESET, "unlabelled": row.student in ("kd", "teacher")} | teacher_of(row, teacher)
    else:
        passes = {"max_epochs": epochs or study.epochs or size.max_epochs}
        training, terms = size.training(not alone, progress=False, seed=seed, **passes), DistillConfig()
    settings |= asdict(training) | ({"task": BASE.task} if alone else asdict(terms))
    settings |= {key: value for key, value in study.recipe.items() if key in settings}
    for key in row.changes:
        require(key in settings or key == "scenes", f"{row.full_name}.{key}", row.changes[key], closest(key, settings))
    if "teacher_model" in row.changes:
        settings["teacher_pretrained"] = None  # of the profile's teacher
    settings |= row.changes | ({"trial": row.trial} if row.trial else {})
    if settings["data_size"] < 1:
        pictures, batch = round(settings["data_size"] * size.pictures), settings["batch_size"]
        settings["batch_size"] = min(batch, pictures)
        in_share = pictures // settings["batch_size"] * settings["batch_size"]
        times = size.pictures // batch * batch / in_share
        settings |= {"max_epochs": round(settings["max_epochs"] * times), "validate_every": round(times)}
    return json.loads(json.dumps(settings))


def teacher_of(row: Experiment, teacher: TeacherName) -> Settings:
    """The teacher of a row of photographs: OpenAI's, the one that ships, or none."""
    if row.student != "kd" and not row.comes_trained:
        return {"teacher_model": "", "teacher_pretrained": None}
    if teacher == "openai":
        return dict(OPENAI)
    weights = open_clip_config("photo-teacher")["sha256"]
    return {"teacher_model": "photographs", "teacher_pretrained": None, "teacher_weights": weights}
