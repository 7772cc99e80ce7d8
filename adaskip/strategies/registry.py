"""The strategies by name: the library's own, and those that other packages register (see `common.plugins`)."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TypeVar

from adaskip.common.plugins import Registry, check_declared, check_pattern
from adaskip.core.look import Look
from adaskip.core.plan import PHASES, Phase
from adaskip.core.strategy import Strategy
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import METHODS, SEARCH, SelectionProfile

FULL, FULL_SHORT_NAME, FULL_LABEL = "full", "FULL", "Full model"
"""The unskipped model wherever a strategy is named: it is none, but has names like one."""
PROFILE_TYPES = (ImportanceProfile, SelectionProfile)
SHORT_NAME = re.compile(r"[A-Z][A-Z0-9_]*")


def _check(cls: type[Strategy]) -> None:
    check_declared(cls, "look", Look)
    check_pattern(cls, "short_name", SHORT_NAME)
    for attribute in ("whole_layers", "in_paper", "in_grid"):
        if not isinstance(value := getattr(cls, attribute), bool):
            raise ValueError(f"{cls.__name__} must declare {attribute} as True or False; got {value!r}")
    if not isinstance(cls.phases, tuple) or not cls.phases or set(cls.phases) - set(PHASES):
        raise ValueError(f"{cls.__name__} must declare phases as a tuple of {', '.join(PHASES)}; got {cls.phases!r}")
    kind, has_field = cls.profile_type, "profile" in {f.name for f in fields(cls)}
    if kind is not None and not (isinstance(kind, type) and issubclass(kind, PROFILE_TYPES)):
        allowed = ", ".join(each.__name__ for each in PROFILE_TYPES)
        raise ValueError(f"{cls.__name__} declares profile_type {kind!r}; allowed: None, {allowed}")
    if kind is SelectionProfile and (method := getattr(cls, "method", SEARCH)) not in METHODS:
        raise ValueError(f"{cls.__name__} declares method {method!r}; allowed: {', '.join(METHODS)}")
    if has_field != (kind is not None):
        what = "a field profile but no profile_type" if has_field else "a profile_type but no field profile"
        raise ValueError(f"{cls.__name__} has {what}; a strategy that needs a profile has both")


_full = {"name": FULL, "short_name": FULL_SHORT_NAME, "label": FULL_LABEL}
registry = Registry(
    "strategy",
    "adaskip.strategies",
    Strategy,
    _check,
    unique=tuple(_full),
    reserved={attribute: {value: "the full model"} for attribute, value in _full.items()},
)
strategy_name = registry.name_of

S = TypeVar("S", bound=type[Strategy])


def register_strategy(cls: S) -> S:
    """Register a strategy class for the command line, the tables and the plots; can be used as a decorator.

    Put it above `@dataclass(frozen=True, kw_only=True)`. Registering the same class again changes nothing.

    Raises:
        ValueError: the class is not a concrete, frozen dataclass derived from `Strategy`, a declaration is missing or
            invalid, or its name, short name or label is already taken.
    """
    return registry.register(cls)


def strategy_class(name: str) -> type[Strategy]:
    """The class of that name; a ValueError suggests the nearest name and lists all if there is none."""
    return registry.find(name, also=(FULL,))


def phases_of(name: str) -> tuple[Phase, ...]:
    """The phases that the strategy is defined for; all for the full model."""
    return PHASES if name == FULL else strategy_class(name).phases


def profile_type(name: str) -> type[ImportanceProfile] | type[SelectionProfile] | None:
    """The class of the profile that a strategy needs; None for a strategy without a profile and for the full model."""
    return None if name == FULL else strategy_class(name).profile_type


def needs_profile(name: str) -> bool:
    """Whether the strategy needs a profile (importance or selection)."""
    return profile_type(name) is not None


def needs_selection(name: str) -> bool:
    """Whether the strategy needs a selection profile."""
    kind = profile_type(name)
    return kind is not None and issubclass(kind, SelectionProfile)


def selection_method(name: str) -> str | None:
    """The method of the selection profile that the strategy needs; None if it needs no selection."""
    return getattr(strategy_class(name), "method", SEARCH) if needs_selection(name) else None
