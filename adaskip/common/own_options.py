"""Options that a strategy or benchmark declares: dataclass fields that `NAME=VALUE` on the command line sets."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import Field, field, fields
from typing import Any

SPELLED = {"true": True, "false": False}


def own_option(help: str, default: Any) -> Any:
    """A dataclass field that is an option. Its type is bool, int, float or str, or the union of one with None."""
    return field(default=default, metadata={"help": help})


def declared_options(cls: type | None) -> dict[str, Field[Any]]:
    """The fields of a class that were made with `own_option`, by name; empty for None."""
    return {} if cls is None else {each.name: each for each in fields(cls) if "help" in each.metadata}


def check_own_options(name: str, instance: Any) -> None:
    """Raise ValueError for an option whose value is not of its declared type. name: of the class, for errors.

    A whole number is also a float; True and False are no numbers.
    """
    hints = typing.get_type_hints(type(instance))
    for option in declared_options(type(instance)):
        value, kinds = getattr(instance, option), _kinds(hints[option])
        if not any(_is_of(kind, value) for kind in kinds):
            allowed = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"{option} of {name} must be {allowed}; got {value!r}")


def _kinds(hint: Any) -> tuple[type, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _is_of(kind: type, value: Any) -> bool:
    if kind in (int, float):
        return hasattr(value, "__index__" if kind is int else "__float__") and not isinstance(value, bool)
    return isinstance(value, kind)


def options_help(classes: Mapping[str, type]) -> str:
    """One line with the options of all classes. classes: by name."""
    lines = [
        f"{name}: {option} ({field.metadata['help']})"
        for name, cls in classes.items()
        for option, field in declared_options(cls).items()
    ]
    return "; ".join(lines)


def parse_options(name: str, cls: type | None, given: Sequence[str], flag: str) -> dict[str, Any]:
    """Parse `NAME=VALUE` strings into fields of a class, with their declared types.

    name, flag: of the class and of the command-line flag, for errors.

    Raises:
        ValueError: wrong form, an option given twice, an unknown option, or a value of the wrong type.
    """
    declared = declared_options(cls)
    values: dict[str, Any] = {}
    for text in given:
        option, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{flag} takes NAME=VALUE; got {text!r}")
        if option not in declared:
            raise ValueError(f"{name} has no option {option}; allowed: {', '.join(declared) or 'none'}")
        if option in values:
            raise ValueError(f"{flag} gives {option} more than once: {' '.join(given)}")
        assert cls is not None
        values[option] = _parsed(f"{flag} {option}", value, typing.get_type_hints(cls)[option])
    return values


def _parsed(what: str, value: str, hint: Any) -> Any:
    kinds = _kinds(hint)
    if types.NoneType in kinds and value.lower() == "none":
        return None
    (kind,) = (each for each in kinds if each is not types.NoneType)
    try:
        return SPELLED[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise ValueError(f"{what} must be {kind.__name__}, not {value!r}") from None
