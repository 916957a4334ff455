"""The parameters of a notebook: read from its tagged cell, and checked before anything runs.

papermill only logs a parameter that a notebook does not have, and takes any type: one mistyped name, and a
run of many minutes uses the default. So names, types and ranges are checked here first.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

from .config import PRESETS, ConfigError, closest, from_mapping, require

PROFILES = ("smoke", "cpu", "gpu")
TYPES: dict[str, type] = {kind.__name__: kind for kind in (bool, int, float, str)}
INPUTS = ("train_data_path", "val_data_path", "auto_kd_config", "photograph")
"""Paths that must exist, unless they are empty."""
OUTPUTS = ("checkpoint_dir", "root_dir", "out_dir", "save_results")
"""Paths that a notebook may create."""
NAMES_OR_PATHS = ("base_checkpoint", "model_checkpoint", "config_path", "teacher_model")
"""Either a path or the name of something that ships with the course."""
STUDENTS = ("kd", "base")
"""Models of the student's kind that ship; the teacher and the plain CLIP have other parts."""
OPTIONS = {"profile": "--profile", "out_dir": "--out"}
"""Parameters that the command line sets by an option of their own."""

Rule = tuple[Callable[[Any], bool], str]
RANGES: dict[str, Rule] = {
    "data_size": (lambda share: 0 < share <= 1, "choose a share of the data in (0, 1]"),
    "max_epochs": (lambda epochs: epochs >= 0, "use 1 or more, or 0 for the number of the profile"),
    "preset": (lambda name: name in PRESETS, f"choose one of {', '.join(PRESETS)}"),
    "profile": (lambda name: name in PROFILES, f"choose one of {', '.join(PROFILES)}"),
    "rounds": (lambda rounds: rounds >= 0, "use 1 or more, or 0 for the number of the profile"),
    "seed": (lambda seed: seed >= 0, "use 0 or more"),
}
RANGES |= {name: (lambda path: not path or Path(path).exists(), "no such file or folder") for name in INPUTS}
RANGES |= {
    name: (lambda student: student in ("", *STUDENTS) or Path(student).exists(),
           f"give the folder of a student, or one that ships: {' or '.join(STUDENTS)}")
    for name in ("model_checkpoint", "base_checkpoint")
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell, such as ``max_epochs: int = 10  # passes over the pictures``."""

    name: str
    kind: type
    default: Any
    comment: str


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters that ``notebook`` declares, by name; empty where no cell is tagged ``parameters``.

    Raises :class:`ConfigError` for a second tagged cell, and for a line that is not ``name: type = value``.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) > 1:
        raise ConfigError(f"{notebook}: {len(tagged)} cells are tagged 'parameters'; tag one.")
    found = [_read_line(notebook.name, line, source) for source in tagged for line in ast.parse(source).body]
    return {parameter.name: parameter for parameter in found}


def _read_line(notebook: str, line: ast.stmt, source: str) -> Parameter:
    try:
        kind, default = TYPES[line.annotation.id], ast.literal_eval(line.value)
    except (AttributeError, KeyError, ValueError):  # not annotated, another type, or not a plain value
        text, kinds = ast.get_source_segment(source, line), ", ".join(TYPES)
        raise ConfigError(f"{notebook}: the parameters cell holds {text!r}, which is not of the form "
                          f"'name: type = value  # meaning' with a type of {kinds}.") from None  # fmt: skip
    rest = source.splitlines()[line.end_lineno - 1].encode()[line.end_col_offset :].decode()
    return Parameter(line.target.id, kind, default, rest.strip().lstrip("#").strip())


def check_value(parameter: Parameter, value: Any) -> Any:
    """``value`` in the declared type and within the range of its name, or :class:`ConfigError`."""
    shape = dataclasses.make_dataclass("parameters", [(parameter.name, parameter.kind)])
    value = getattr(from_mapping(shape, {parameter.name: value}), parameter.name)
    if parameter.name in RANGES:
        within, remedy = RANGES[parameter.name]
        require(within(value), parameter.name, value, remedy)
    return value


def parse_value(parameter: Parameter, text: str) -> Any:
    """The value written as ``text`` on a command line; a relative path is taken from the caller's folder.

    The path becomes absolute, because a notebook runs in its own folder.
    """
    try:
        value = text if parameter.kind is str else yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    value = check_value(parameter, value)
    if parameter.kind is str and value:
        name, exists = parameter.name, Path(value).exists()
        is_path = name in INPUTS + OUTPUTS or (name in NAMES_OR_PATHS and exists)
        return str(Path(value).resolve()) if is_path else value
    return value


def plan(notebooks: list[Path], given: Mapping[str, str], common: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """What each notebook receives: of ``common`` (values) and ``given`` (texts, which win), what it declares.

    Raises :class:`ConfigError` for a name in ``given`` that no notebook declares, and for a value that does
    not fit.
    """
    declared = {notebook: read_parameters(notebook) for notebook in notebooks}
    known = {name for parameters in declared.values() for name in parameters} - set(OPTIONS)
    for name, value in given.items():
        require(name not in OPTIONS, name, value, f"use the option {OPTIONS.get(name)}")
        require(name in known, name, value, f"no notebook has such a parameter; {closest(name, known)}")
    return {
        notebook: {name: value for name, value in common.items() if name in parameters}
        | {name: parse_value(parameters[name], text) for name, text in given.items() if name in parameters}
        for notebook, parameters in declared.items()
    }
