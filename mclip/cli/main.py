"""The command line, ``python -m mclip COMMAND``; every command is a plain function with typed parameters."""

import dataclasses
import errno
import importlib
import inspect
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from inspect import Parameter
from pathlib import Path
from typing import Any, get_args

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentError, ArgumentParser

from mclip import __version__
from mclip.config import ConfigError, TrainConfig, closest, get_profile

COMMANDS: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("commands.yaml").read_text(encoding="utf-8"))
"""Name: module:function, and one line for the help. A module is imported only when its command is called."""
POSITIONAL = {"download": "name", "study": "names"}
"""The argument of a command that is given without its name."""
SEVERAL: dict[Any, dict[str, Any]] = {
    list[str]: {"nargs": "+"},
    list[tuple[str, str]]: {"nargs": 2, "action": "append", "metavar": ("NAME", "VALUE")},
}
"""Types of options that take several words, as in ``--only 04 08`` and ``--parameters NAME VALUE``."""
FILES = ("--config", "--auto_kd_config")
SWITCH = {"0": "false", "1": "true", "false": "false", "true": "true"}
HELP = """usage: python -m mclip COMMAND ...   or: --help, --version

{commands}

python -m mclip COMMAND --help lists the options of a command.
The variable MCLIP_CACHE names the folder for downloads, drawn scenes and what the teacher says of pictures."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit status: 0, 2 for wrong usage, 1 for a failed notebook, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP.format(commands="\n".join(f"  {name:12}{summary}" for name, (_, summary) in COMMANDS.items())))
        return 0 if arguments else 2
    command, *rest = arguments
    if command == "--version":
        print(f"mclip {__version__}")
        return 0
    try:
        function, settings = parse(command, rest)
        function(**settings)
    except KeyboardInterrupt:
        return _report("interrupted", 130)
    except ArgumentError as error:
        return _report(f"{error} (python -m mclip {command} --help lists the options)", 2)
    except (OSError, ValueError, RuntimeError) as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("mclip."):
            raise  # a defect of the program: its traceback is what helps
        read_only = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        hint = f" (an option of {command} names another folder, see --help)" if read_only else ""
        return _report(f"{error}{hint}", getattr(error, "exit_status", 2))
    return 0


def parse(command: str, arguments: list[str]) -> tuple[Callable[..., None], dict[str, Any]]:
    """The function of ``command`` and its keyword arguments; ConfigError or ArgumentError if one is wrong.

    Each field of a dataclass among the function's parameters is an option of its own. What is written on the command
    line or in a file wins over the profile, which wins over the defaults.
    """
    if command not in COMMANDS:
        raise ConfigError(f"no command {command!r}; {closest(command, COMMANDS)}")
    module, name = COMMANDS[command][0].split(":")
    function = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(function, eval_str=True).parameters
    groups = {key: p for key, p in parameters.items() if dataclasses.is_dataclass(p.annotation)}
    parser = _options(command, function, parameters)
    defaults = vars(parser.get_defaults())
    words = _with_values(arguments, {f"--{key}" for key, value in defaults.items() if isinstance(value, bool)})
    try:
        # Without the defaults, what remains is what was written.
        written = parser.parse_args([word for word in words if not word.startswith("--print_config")], defaults=False)
        for group in groups.values():
            parser.set_defaults(vars(_defaults(command, group, written.get("profile", "cpu"))))
        values = parser.parse_args(words).as_dict()
    except ArgumentError as error:
        raise _in_plain_words(command, defaults, *_located(error, parser, words)) from None
    paths = {key: value for key, value in values.items() if isinstance(value, str) and value.startswith("~/")}
    values |= {key: os.path.expanduser(path) for key, path in paths.items()}
    settings = {key: value for key, value in values.items() if key in parameters}
    for key, group in groups.items():
        fields = dataclasses.fields(group.annotation)
        settings[key] = group.annotation(**{field.name: values[field.name] for field in fields})
    return function, settings


def _options(command: str, function: Callable[..., None], parameters: Mapping[str, Parameter]) -> ArgumentParser:
    about = {"prog": f"python -m mclip {command}", "description": COMMANDS[command][1]}
    options = ArgumentParser(**about, exit_on_error=False, allow_abbrev=False)
    helps = "YAML file of options; those written after it win"
    options.add_argument(*FILES, action="config", help=helps)
    described = {each.arg_name: each.description for each in parse_docstring(function.__doc__ or "").params}
    groups = {key: p for key, p in parameters.items() if dataclasses.is_dataclass(p.annotation)}

    def add(some: Iterable[Parameter]) -> None:
        for group in some:
            options.add_class_arguments(documented(group.annotation))
            options.set_defaults(vars(_defaults(command, group, "cpu")))

    add(group for group in groups.values() if group.default is group.empty)
    skip = set(groups)
    for key, parameter in parameters.items():
        if kinds := SEVERAL.keys() & {parameter.annotation, *get_args(parameter.annotation)}:
            form, names = SEVERAL[kinds.pop()], ["-p", f"--{key}"] if key == "parameters" else [f"--{key}"]
            if key == POSITIONAL.get(command):
                form, names = {"nargs": "*"}, [key]
            options.add_argument(*names, type=str, default=parameter.default, help=described[key], **form)
            skip.add(key)
    options.add_function_arguments(function, as_positional=command in POSITIONAL, skip=skip, fail_untyped=True)
    add(group for group in groups.values() if group.default is not group.empty)  # what few need comes last in the help
    return options


@cache
def documented(kind: type) -> type:
    """Add the comments behind the fields of a dataclass to its docstring, where the parser finds its help."""
    comments = re.findall(r"^    (\w+): .*  # (.+)$", inspect.getsource(kind), re.MULTILINE)
    attributes = [f"    {name}: {comment}" for name, comment in comments]
    kind.__doc__ = "\n".join([inspect.cleandoc(kind.__doc__ or ""), "", "Attributes:", *attributes])
    return kind


def _defaults(command: str, group: Parameter, profile: str) -> Any:
    """The settings of one dataclass before any option changes them: the command's own, or those of the profile."""
    if group.default is not group.empty:
        return group.default
    if group.annotation is TrainConfig:
        return get_profile(profile).training(teacher=command == "distill")
    return group.annotation()


def _with_values(arguments: list[str], switches: set[str]) -> list[str]:
    """A switch such as ``--use_swa`` may stand alone, which means true, or be followed by 0, 1, false or true."""
    words = []
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        words.append(SWITCH.get(word, word) if words and words[-1] in switches else word)
        if word in switches and following not in SWITCH:
            words.append("true")
    return words


def _located(error: ArgumentError, parser: ArgumentParser, words: list[str]) -> tuple[ArgumentError, str]:
    """The error of the first file of options that is wrong by itself, and its name; or else ``error`` and nothing."""
    files = [following for word, following in itertools.pairwise(words) if word in FILES]
    files += [word.split("=", 1)[1] for word in words if word.split("=")[0] in FILES and "=" in word]
    for file in filter(os.path.isfile, map(os.path.expanduser, files)):
        try:
            parser.parse_path(file, defaults=False)
        except ArgumentError as its_own:
            return its_own, f"{file}: "
    return error, ""


def _in_plain_words(command: str, known: Iterable[str], error: ArgumentError, file: str) -> Exception:
    """``file`` and the error without Python's names of types; for an option that does not exist the nearest name."""
    message = f"{file}{error}"
    if unknown := re.search(r"unrecognized arguments: --([^\s=]+)|Option '(.+)' is not accepted", message):
        name = unknown[1] or unknown[2]
        return ConfigError(f"{file}--{name}: no such option of {command}; {closest(name, known)}")
    message = re.sub(r"unrecognized arguments: (.*)", r"the name of an option is missing before: \1", message)
    message = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1", message)
    message = re.sub(r'Parser key "(\w+)"', r"--\1", message)
    message = re.sub(r"a <class '(\w+)'>", r"\1", message)
    return ArgumentError(None, re.sub(r"(a )?tuple\b", "a list in brackets, such as '[a,b]'", message))


def _report(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
