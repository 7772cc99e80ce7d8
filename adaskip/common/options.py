"""Turns a frozen dataclass into a command line, its help text and a YAML configuration.

A field made by `option` carries its help text. Precedence: dataclass default < YAML file < command-line flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from adaskip.common.choices import check_choice

Config = TypeVar("Config")


def option(
    help: str | Callable[[], str],
    default: Any = None,
    *,
    required: bool = False,
    aliases: Sequence[str] = (),
    positional: bool = False,
    least: float | None = None,
    choices: Sequence[str] | Callable[[], Sequence[str]] | None = None,
    distinct: bool = False,
) -> Any:
    """A dataclass field that is also a command-line option.

    Args:
        help, default: a value, or a function that is called when the help text or the default is needed.
        required: `resolve` refuses a configuration without it.
        aliases: other spellings of the flag, e.g. those of the paper's artifact.
        positional: on the command line it is given without a flag.
        least, choices, distinct: what `check_options` asks of the value, or of each of many: to be at least that, one
            of these, and not to be given twice.
    """
    metadata = {"help": help, "required": required, "aliases": tuple(aliases), "positional": positional}
    metadata |= {"least": least, "choices": choices, "distinct": distinct}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError with one line instead of printing the usage text and exiting."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def add_options(parser: argparse.ArgumentParser, config: type, *, leave_out: Sequence[str] = ()) -> None:
    """Add one option per field of the dataclass `config`, and `--config FILE` for a YAML file of the same fields."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options; command-line flags override it")
    for field in _fields(config):
        if field.name in leave_out:
            continue
        kind, many = field_type(config, field.name)
        arguments: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field)}
        if field.metadata["positional"]:
            parser.add_argument(field.name, type=kind, nargs="?", metavar=field.name.upper(), **arguments)
            continue
        arguments["dest"] = field.name
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments |= {"type": kind, "nargs": "+" if many else None, "metavar": kind.__name__.upper()}
        parser.add_argument(f"--{field.name.replace('_', '-')}", *field.metadata["aliases"], **arguments)


def resolve(
    config: type[Config],
    given: Mapping[str, Any],
    yaml_file: str | None = None,
    preset: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda values: {},
    fixed: Collection[str] = (),
) -> Config:
    """Build `config` from its defaults, then `preset` of the values given, then `yaml_file`, then `given`.

    fixed: fields that the caller decides and a file may not name.

    Raises:
        ValueError: an unknown or fixed name in the file, a value of the wrong type, or a missing required field.
    """
    told = _read_yaml(config, yaml_file) if yaml_file else {}
    if fixed_here := [name for name in told if name in fixed]:
        raise ValueError(f"{yaml_file} names {fixed_here[0]}, which is decided here: leave it out")
    values = {**told, **given}
    values = {**preset(values), **values}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    missing = [field for field in _fields(config) if field.metadata["required"] and values.get(field.name) is None]
    if missing:
        raise ValueError("missing " + ", ".join(map(_spelled, missing)))
    return config(**values)


def check_options(config: Any) -> None:
    """ValueError if a value of a configuration is not what its option allows; None, where nothing is given, is."""
    for field in _fields(type(config)):
        value, asked, name = getattr(config, field.name), field.metadata, f"--{field.name.replace('_', '-')}"
        if value is None:
            continue
        values = value if isinstance(value, tuple) else (value,)
        if asked["choices"] is not None:
            choices: Any = asked["choices"]() if callable(asked["choices"]) else asked["choices"]
            for each in values:
                check_choice(name, each, choices)
        if asked["least"] is not None and values and min(values) < asked["least"]:
            raise ValueError(f"{name} must be at least {asked['least']}, not {min(values)}")
        if asked["distinct"] and len(set(values)) < len(values):
            raise ValueError(f"{name} names something twice: {' '.join(map(str, values))}")


def field_type(config: type, name: str) -> tuple[type, bool]:
    """(element type, whether it is a tuple) of a field: (int, False) for `int | None`, (str, True) for
    `tuple[str, ...]`."""
    hint = _type_hints(config)[name]
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


@cache
def _type_hints(config: type) -> dict[str, Any]:
    return typing.get_type_hints(config)


def _read_yaml(config: type, path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} must hold a mapping of options, not {type(content).__name__}")
    return {str(name): _checked(config, path, str(name), value) for name, value in content.items()}


def _checked(config: type, path: str, name: str, value: Any) -> Any:
    """Return `value` as the field's type, or raise ValueError; strings are not parsed into numbers."""
    names = [field.name for field in _fields(config)]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"--config {path}: unknown option {name!r}.{hint} Allowed: {', '.join(names)}")
    kind, many = field_type(config, name)
    if value is None:
        return None
    if many and isinstance(value, list) and all(_is(kind, element) for element in value):
        return tuple(value)
    if not many and _is(kind, value):
        return kind(value)
    expected = f"a list of {kind.__name__}" if many else kind.__name__
    raise ValueError(f"--config {path}: {name} must be {expected}, not {value!r}")


def _is(kind: type, value: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _spelled(field: dataclasses.Field) -> str:
    return field.name.upper() if field.metadata["positional"] else f"--{field.name.replace('_', '-')}"


def _fields(config: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(config) if "help" in field.metadata]


def _help(field: dataclasses.Field) -> str:
    given = field.metadata["help"]
    text = str(given() if callable(given) else given)
    factory = field.default_factory
    default = factory() if callable(factory) else field.default
    if default is None or default is False or default == ():
        return text
    return f"{text} (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
