"""The parameters of a lesson: which values can work, and where their paths begin."""

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mclip.config import PRESETS, PROFILES, ConfigError, closest, from_mapping, require
from mclip.files import CLONE

ROOT = CLONE or Path.cwd()
"""The clone, or without one the working folder. Relative paths in a lesson start here, wherever its kernel started."""
INPUTS = ("train_data_path", "val_data_path", "unlabelled_data_path", "unpaired_texts_path", "auto_kd_config")
INPUTS += ("photograph", "photographs_path")
"""Paths that must exist, unless they are empty."""
OUTPUTS = ("checkpoint_dir", "root_dir", "out_dir", "save_results")
"""Paths that a lesson may create."""
STUDENT_PATHS = ("base_checkpoint", "base_model", "model_checkpoint")
NAMES_OR_PATHS = (*STUDENT_PATHS, "config_path", "teacher_model", "teacher_pretrained")
"""A path, or the name of something that ships or that open_clip knows."""
STUDENTS = ("kd", "base", "photo", "photo-base")
"""Students that ship. The teacher and the plain CLIP have another architecture."""
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "config_path": (
        lambda name: name in ("", *PRESETS) or Path(name).is_file(),
        f"give a YAML file of settings, or one of {', '.join(PRESETS)}",
    ),
    "data_size": (lambda share: 0 < share <= 1, "choose a share of the data in (0, 1]"),
    "max_epochs": (lambda epochs: epochs >= 0, "use 1 or more, or 0 for the number of the profile"),
    "preset": (lambda name: name in PRESETS, f"choose one of {', '.join(PRESETS)}"),
    "profile": (lambda name: name in PROFILES, f"choose one of {', '.join(PROFILES)}"),
    "rounds": (lambda rounds: rounds >= 0, "use 1 or more, or 0 for the number of the profile"),
    "seed": (lambda seed: seed >= 0, "use 0 or more"),
}
RULES |= dict.fromkeys(INPUTS, (lambda path: not path or Path(path).exists(), "no such file or folder"))
remedy = f"give the folder of a student, or one that ships: {' or '.join(STUDENTS)}"
RULES |= dict.fromkeys(STUDENT_PATHS, (lambda name: name in ("", *STUDENTS) or Path(name).is_dir(), remedy))


def check_parameter(name: str, kind: type, value: Any, base: Path = ROOT) -> Any:
    """``value`` as ``kind``, within the rule of its name; a path becomes absolute, from ``base`` if it is relative.

    Raises :class:`~mclip.config.ConfigError`, which names the parameter.
    """
    given = value = getattr(from_mapping(dataclasses.make_dataclass("parameters", [(name, kind)]), {name: value}), name)
    if value and kind is str:
        path = base / Path(value).expanduser()
        known = value in (*STUDENTS, *PRESETS)
        if name in INPUTS + OUTPUTS or (name in NAMES_OR_PATHS and not known and path.exists()):
            value = str(path)
    if name in RULES:
        works, remedy = RULES[name]
        require(works(value), name, given, remedy)
    return value


def check_parameters(notebook: dict[str, Any]) -> None:
    """Check the parameters of a running notebook, called as ``check_parameters(globals())`` below their cell.

    The annotations of that cell declare the names and types. papermill puts the values into a cell of its own, which
    begins with the comment "Parameters"; it warns of an unknown name only in its log, and takes a value of any type.
    Here either is a :class:`~mclip.config.ConfigError`. Paths become absolute, see :func:`check_parameter`.
    """
    if not (declared := notebook.get("__annotations__")):
        raise ConfigError("No parameter is set yet: run the cell of parameters first, or all cells from the top.")
    injected = [source for source in notebook.get("In", ()) if source.startswith("# Parameters\n")]
    for line in ast.parse("\n".join(injected)).body:
        name = line.targets[0].id
        require(name in declared, name, notebook[name], f"no such parameter; {closest(name, declared)}")
    for name, kind in declared.items():
        notebook[name] = check_parameter(name, kind, notebook[name])
