"""Checks that keep impossible values out: one error, one form, from Python, YAML files and the command line."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A setting that cannot work; the message names the key, the value and what would be right."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise :class:`ConfigError` naming ``key``, ``value`` and ``remedy`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{key}={value!r} cannot work: {remedy}{'' if remedy.endswith('?') else '.'}")


def closest(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the names nearest to ``name``, for error messages."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known names: {', '.join(known)}"


def _check_type(value: Any, expected: Any, key: str) -> Any:
    """``value`` as ``expected`` (int is a float, a list is a tuple, a mapping is a dataclass), or ConfigError."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        require(isinstance(value, Mapping), key, value, "give a mapping of settings")
        return from_mapping(typing.cast(type, expected), value, key + ".")
    if origin is Literal:
        require(value in arguments, key, value, closest(value, map(str, arguments)))
        return value
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        return _check_type(value, next(a for a in arguments if a is not type(None)), key)
    if origin is tuple:
        require(isinstance(value, list | tuple), key, value, "give a list")
        inner = arguments if arguments[-1] is not Ellipsis else (arguments[0],) * len(value)
        require(len(inner) == len(value), key, value, f"give exactly {len(inner)} values")
        return tuple(_check_type(v, t, key) for v, t in zip(value, inner, strict=True))
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    remedy = f"expected {expected.__name__}, got {type(value).__name__}"
    if expected is float and isinstance(value, str):
        remedy += " (YAML reads 1e-3 as text: write 1.0e-3)"
    require(isinstance(value, expected) and (expected is bool or not isinstance(value, bool)), key, value, remedy)
    return value


def from_mapping(kind: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Build the dataclass ``kind`` from ``values``; unknown keys and wrong types raise :class:`ConfigError`."""
    hints = typing.get_type_hints(kind)
    for key in values:
        require(
            key in hints, prefix + str(key), values[key], f"no such setting of {kind.__name__}; {closest(key, hints)}"
        )
    return kind(**{key: _check_type(value, hints[key], prefix + key) for key, value in values.items()})


def from_yaml(kind: type[Config], path: str | Path) -> Config:
    """Read ``kind`` from a YAML file; the error for a file that is not a YAML mapping names the file."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a YAML file of settings.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    require(isinstance(values, dict), str(path), values, "the file must hold a mapping, one 'key: value' a line")
    return from_mapping(kind, values)
