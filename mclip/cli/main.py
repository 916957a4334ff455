"""The command line, ``python -m mclip COMMAND``; every command is a plain function with typed parameters."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from mclip import __version__
from mclip.config import ConfigError, DistillConfig, closest, from_yaml

COMMANDS = {
    "train": ("mclip.cli.commands:train", "train a student on pairs alone"),
    "distill": ("mclip.cli.commands:distill", "distil a student from a teacher in three phases"),
    "teacher": ("mclip.cli.commands:teacher", "train a small teacher from scratch"),
    "cache": ("mclip.cli.commands:cache", "compute and keep what the teacher says of all pictures and captions"),
    "evaluate": ("mclip.cli.evaluate:evaluate", "classify pictures zero-shot"),
    "export": ("mclip.cli.commands:export_student", "write a student into a folder that an app can carry"),
    "download": ("mclip.sources.caption_sets:download", "fetch captions or a test set; resumes"),
    "reproduce": ("mclip.study.reproduce:reproduce", "the long run: several seeds, and the results that are committed"),
    "photographs": ("mclip.study.reproduce:photographs", "base against kd on captions of real photographs"),
    "views": ("mclip.study.reproduce:views", "whole pictures, cached crops and an online teacher side by side"),
    "ablations": ("mclip.study.ablations:ablations", "what each part of the recipe is worth, over several seeds"),
    "defects": ("mclip.study.defect_runs:defects", "what known defects cost, each switched on in turn"),
    "examples": ("mclip.study.examples:examples", "similarity matrices and prompts of the shipped models"),
    "grounding": ("mclip.study.grounding:grounding", "where the shipped models look, scored on drawn scenes"),
    "efficiency": ("mclip.study.efficiency:efficiency", "what presets and rivals cost, all measured in one run"),
    "bench": ("mclip.study.bench:bench", "measure speed and memory, in ratios of one run"),
    "figures": ("mclip.study.reproduce:figures", "draw the figures from the results files"),
    "app": ("mclip.cli.app:app", "serve the course's explorers as a page without code"),
    "course": ("mclip.cli.course:course", "execute the notebooks in order, and summarise what came out"),
}
"""Name: (module:function, one line for the help). A module is imported only when its command is called."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit status: 0, 2 for wrong usage, 1 for a failed notebook, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"mclip {__version__}")
        return 0
    try:
        function, settings = parse(arguments[0], arguments[1:])
        function(**settings)
    except KeyboardInterrupt:
        return _report("interrupted", 130)
    except ArgumentError as error:
        return _report(f"{_plain(error)} (python -m mclip {arguments[0]} --help lists the options)", 2)
    except (OSError, ValueError, RuntimeError) as error:
        ours = isinstance(error, OSError) or type(error).__module__.startswith("mclip.")
        if not ours:
            raise  # a defect of the program: its traceback is what helps
        return _report(str(error), getattr(error, "exit_status", 2))
    return 0


def overview() -> str:
    """The help of ``python -m mclip``."""
    lines = "\n".join(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items())
    return f"usage: python -m mclip COMMAND [--help] [options]\n\ncommands:\n{lines}"


def parse(command: str, arguments: list[str]) -> tuple[Callable[..., None], dict[str, Any]]:
    """The function of ``command`` and its keyword arguments; ConfigError or ArgumentError if one is wrong.

    Each field of a dataclass among the function's parameters is an option of its own.
    """
    if command not in COMMANDS:
        raise ConfigError(f"no command {command!r}; {closest(command, COMMANDS)}")
    target, summary = COMMANDS[command]
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(function).parameters
    groups = {key: kind for key, kind in get_type_hints(function).items() if dataclasses.is_dataclass(kind)}
    fields = {key: kind for group in groups.values() for key, kind in get_type_hints(group).items()}
    parser = ArgumentParser(prog=f"python -m mclip {command}", description=summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of options; those written after it win")
    own_form = _add_course_options(parser) if command == "course" else set()
    if command in ("bench", "efficiency"):
        parser.add_argument("--only", nargs="+", type=str, metavar="PART", help="parts to measure, as in steps loading")
        own_form = {"only"}
    for kind in groups.values():
        parser.add_class_arguments(kind)
    in_place = command == "download"  # the one command whose argument needs no name
    parser.add_function_arguments(function, as_positional=in_place, skip={*own_form, *groups}, fail_untyped=True)
    if DistillConfig in groups.values():
        helps = "YAML file of phases, weights, temperatures and balancers; single options win over it"
        parser.add_argument("--auto_kd_config", type=str, default="", help=helps)
    for key in groups.keys() & {key for key, p in parameters.items() if p.default is not p.empty}:
        parser.set_defaults(_values(parameters[key].default))
    _require_known(command, arguments, {*fields, *parameters.keys() - groups, "auto_kd_config"})
    arguments = _with_values(arguments, {f"--{key}" for key, kind in fields.items() if kind is bool})
    if "profile" in fields:
        _set_profile(parser, arguments)
    settings = parser.instantiate(parser.parse_args(arguments)).as_dict()
    del settings["config"]
    settings.pop("auto_kd_config", None)
    for key, kind in groups.items():
        settings[key] = kind(**{field.name: settings.pop(field.name) for field in dataclasses.fields(kind)})
    return function, settings


def _require_known(command: str, arguments: list[str], known: set[str]) -> None:
    known |= {"config", "print_config", "help"}
    for word in arguments:
        name = word.removeprefix("--").split("=")[0].split(".")[0]
        if word.startswith("--") and name and name not in known:
            hint = closest(name, known)
            raise ConfigError(f"--{name}: no such option of {command}; {hint}")


def _set_profile(parser: ArgumentParser, arguments: list[str]) -> None:
    """Make the chosen profile's numbers, and those of ``--auto_kd_config``, the defaults that options override."""
    from mclip.config import TRAINING, get_profile

    def use(profile: str) -> None:
        chosen = get_profile(profile)
        parser.set_defaults({key: getattr(chosen, key) for key in TRAINING})

    use("cpu")
    first = parser.parse_args(arguments)
    use(first.profile)
    if first.get("auto_kd_config"):
        parser.set_defaults(_values(from_yaml(DistillConfig, first.auto_kd_config)))


def _with_values(arguments: list[str], switches: set[str]) -> list[str]:
    """A switch such as ``--use_swa`` may stand alone, which means true, or be followed by 0 or 1."""
    words, digits = [], {"0": "false", "1": "true"}
    for word, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        words.append(digits.get(word, word) if words and words[-1] in switches else word)
        if word in switches and following.startswith("-"):
            words.append("true")
    return words


def _values(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _add_course_options(parser: ArgumentParser) -> set[str]:
    """Options of ``course`` that read better than a function's signature would give; returns their names."""
    pair, pair_help = ("NAME", "VALUE"), "a parameter for every notebook that declares NAME; may be repeated"
    parser.add_argument("-p", "--parameters", nargs=2, action="append", metavar=pair, help=pair_help)
    parser.add_argument("--only", nargs="+", type=str, metavar="NN", help="numbers of notebooks, as in 04 08")
    parser.add_argument("--prepare", action="store_true", help="write the copies to be executed, run nothing")
    return {"parameters", "only", "prepare"}


def _plain(error: ArgumentError) -> str:
    """The message in words of the command line: Python's names of types mean nothing there."""
    named = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1", str(error))
    return re.sub(r"a <class '(\w+)'>", r"\1", named)


def _report(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
