"""The command line, ``python -m mclip COMMAND``; every command is a plain function with typed parameters."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from . import __version__
from .config import ConfigError, closest

COMMANDS = {
    "train": ("mclip.commands:train", "train a student on pairs alone"),
    "distill": ("mclip.commands:distill", "distil a student from a teacher in three phases"),
    "teacher": ("mclip.commands:teacher", "train a small teacher from scratch"),
    "evaluate": ("mclip.evaluate_command:evaluate", "classify pictures zero-shot"),
    "reproduce": ("mclip.reproduce:reproduce", "the long run: several seeds, and the results that are committed"),
    "photographs": ("mclip.reproduce:photographs", "base against kd on captions of real photographs"),
    "figures": ("mclip.reproduce:figures", "draw the figures from the results files"),
    "course": ("mclip.course:course", "execute the notebooks in order, and summarise what came out"),
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
        return _report(f"{error} (python -m mclip {arguments[0]} --help lists the options)", 2)
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
    """The function of ``command`` and its keyword arguments; ConfigError or ArgumentError if one is wrong."""
    if command not in COMMANDS:
        raise ConfigError(f"no command {command!r}; {closest(command, COMMANDS)}")
    target, summary = COMMANDS[command]
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    parser = ArgumentParser(prog=f"python -m mclip {command}", description=summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of options; those written after it win")
    own_form = _add_course_options(parser) if command == "course" else set()
    parser.add_function_arguments(function, skip=own_form, fail_untyped=True)
    settings = parser.instantiate(parser.parse_args(arguments)).as_dict()
    settings.pop("config")
    return function, settings


def _add_course_options(parser: ArgumentParser) -> set[str]:
    """Options of ``course`` that read better than a function's signature would give; returns their names."""
    pair, pair_help = ("NAME", "VALUE"), "a parameter for every notebook that declares NAME; may be repeated"
    parser.add_argument("-p", "--parameters", nargs=2, action="append", metavar=pair, help=pair_help)
    parser.add_argument("--only", nargs="+", type=str, metavar="NN", help="numbers of notebooks, as in 04 08")
    parser.add_argument("--prepare", action="store_true", help="write the copies to be executed, run nothing")
    return {"parameters", "only", "prepare"}


def _report(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
