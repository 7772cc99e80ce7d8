"""The options that a strategy declares with `strategy_option`, set by `--strategy-option NAME=VALUE`."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any

from adaskip.core.strategy import Strategy
from adaskip.strategies.names import STRATEGIES
from adaskip.strategies.registry import FULL, strategy_class

SPELLED = {"true": True, "false": False}


def declared_options(cls: type[Strategy]) -> dict[str, Field[Any]]:
    """The fields of a strategy that were made with `strategy_option`, by name."""
    return {field.name: field for field in fields(cls) if "help" in field.metadata}


def options_help() -> str:
    """One line with the options of every registered strategy."""
    lines = [
        f"{name}: {option} ({field.metadata['help']})"
        for name, cls in STRATEGIES.items()
        for option, field in declared_options(cls).items()
    ]
    return "; ".join(lines)


def parse_options(name: str, given: Sequence[str]) -> dict[str, Any]:
    """Parse `NAME=VALUE` strings into fields of the strategy called `name`, with their declared types.

    Raises:
        ValueError: wrong form, an option given twice, an unknown option, or a value of the wrong type.
    """
    cls = None if name == FULL else strategy_class(name)
    declared = {} if cls is None else declared_options(cls)
    values: dict[str, Any] = {}
    for text in given:
        option, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--strategy-option takes NAME=VALUE; got {text!r}")
        if option not in declared:
            raise ValueError(f"{name} has no option {option}; allowed: {', '.join(declared) or 'none'}")
        if option in values:
            raise ValueError(f"--strategy-option gives {option} more than once: {' '.join(given)}")
        assert cls is not None
        values[option] = _parsed(option, value, typing.get_type_hints(cls)[option])
    return values


def _parsed(option: str, value: str, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in kinds and value.lower() == "none":
        return None
    (kind,) = (each for each in kinds if each is not types.NoneType)
    try:
        return SPELLED[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise ValueError(f"--strategy-option {option} must be {kind.__name__}, not {value!r}") from None
