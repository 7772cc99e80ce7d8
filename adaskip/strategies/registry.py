"""The strategies by name: those of the library, and those that other packages register.

Another package can add its strategies to the command line and the scripts in `eval/` in three ways:

- an entry point in the group `adaskip.strategies`, whose value is `package.module:Class`;
- the environment variable `ADASKIP_PLUGINS`, a comma-separated list of `package.module` (which calls
  `register_strategy`) or `package.module:Class`;
- `--strategy package.module:Class`, which adds the class to `ADASKIP_PLUGINS`, so that worker processes find it.

Plugins are imported when a strategy is first looked up, not when the library is imported.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from adaskip.core.look import Look
from adaskip.core.strategy import Strategy
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile

FULL, FULL_SHORT_NAME, FULL_LABEL = "full", "FULL", "Full model"
"""Names of the full model, which is not a strategy but can be given wherever a strategy is."""
GROUP = "adaskip.strategies"
"""The entry-point group of plugins."""
PLUGINS = "ADASKIP_PLUGINS"
"""The environment variable that lists plugins."""
PROFILE_TYPES = (ImportanceProfile, SelectionProfile)
NAME, SHORT_NAME = re.compile(r"[a-z][a-z0-9_]*"), re.compile(r"[A-Z][A-Z0-9_]*")

S = TypeVar("S", bound=type[Strategy])
_registered: dict[str, type[Strategy]] = {}
_loaded: set[str] = set()
"""Entry points and values of `ADASKIP_PLUGINS` that have been imported or are being imported."""


def register_strategy(cls: S) -> S:
    """Register a strategy class for the command line, the tables and the plots; can be used as a decorator.

    Put it above `@dataclass(frozen=True, kw_only=True)`. Registering the same class again changes nothing.

    Raises:
        ValueError: the class is not a concrete, frozen dataclass derived from `Strategy`, a declaration is missing or
            invalid, or its name, short name or label is already taken.
    """
    _check_class(cls)
    _check_declared(cls)
    if _registered.get(cls.name) is cls:
        return cls
    _check_free(cls)
    _registered[cls.name] = cls
    return cls


def _check_class(cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise ValueError(f"register_strategy takes a class derived from adaskip.core.strategy.Strategy; got {cls!r}")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise ValueError(f"{cls.__name__} is abstract: define {missing}")
    parameters = cls.__dict__.get("__dataclass_params__")  # of the class itself, not of a base class
    if not is_dataclass(cls) or parameters is None or not parameters.frozen:
        raise ValueError(f"{cls.__name__} must be a frozen dataclass: @dataclass(frozen=True, kw_only=True)")


def _check_declared(cls: type[Strategy]) -> None:
    for attribute, kind in (("name", str), ("short_name", str), ("label", str), ("look", Look)):
        value = getattr(cls, attribute, None)
        if not isinstance(value, kind) or not value:
            raise ValueError(f"{cls.__name__} must declare {attribute}, a {kind.__name__}; got {value!r}")
    for attribute, pattern in (("name", NAME), ("short_name", SHORT_NAME)):
        if not pattern.fullmatch(value := getattr(cls, attribute)):
            raise ValueError(f"{cls.__name__} declares {attribute} {value!r}; allowed: {pattern.pattern}")
    for attribute in ("whole_layers", "in_paper", "in_grid"):
        if not isinstance(value := getattr(cls, attribute), bool):
            raise ValueError(f"{cls.__name__} must declare {attribute} as True or False; got {value!r}")
    kind, has_field = cls.profile_type, "profile" in {f.name for f in fields(cls)}
    if kind is not None and not (isinstance(kind, type) and issubclass(kind, PROFILE_TYPES)):
        allowed = ", ".join(each.__name__ for each in PROFILE_TYPES)
        raise ValueError(f"{cls.__name__} declares profile_type {kind!r}; allowed: None, {allowed}")
    if has_field != (kind is not None):
        what = "a field profile but no profile_type" if has_field else "a profile_type but no field profile"
        raise ValueError(f"{cls.__name__} has {what}; a strategy that needs a profile has both")


def _check_free(cls: type[Strategy]) -> None:
    full = {"name": FULL, "short_name": FULL_SHORT_NAME, "label": FULL_LABEL}
    for attribute, of_full in full.items():
        taken = {of_full: "the full model"}
        taken |= {getattr(other, attribute): other.__name__ for other in _registered.values()}
        if (value := getattr(cls, attribute)) in taken:
            what = attribute.replace("_", " ")
            raise ValueError(
                f"{cls.__name__} cannot be registered: {what} {value!r} is taken by {taken[value]}; "
                f"taken: {', '.join(taken)}"
            )


def registered() -> dict[str, type[Strategy]]:
    """Every strategy by name, those of the library first; imports plugins that are not imported yet.

    Raises:
        ValueError: a plugin cannot be imported, or its strategy cannot be registered.
    """
    for where, plugin in _plugins():
        if where not in _loaded:
            _loaded.add(where)
            try:
                _import(where, plugin)
            except BaseException:
                _loaded.discard(where)
                raise
    return dict(_registered)


def _plugins() -> Iterator[tuple[str, str]]:
    """Yield (origin, plugin): where the plugin is listed, and `package.module` or `package.module:Class`."""
    yield from _entry_points()
    for plugin in filter(None, (each.strip() for each in os.environ.get(PLUGINS, "").split(","))):
        yield f"{PLUGINS}={plugin}", plugin


@cache
def _entry_points() -> tuple[tuple[str, str], ...]:
    found = sorted((point.name, point.value) for point in entry_points(group=GROUP))
    return tuple((f"entry point {name} = {value} of group {GROUP}", value) for name, value in found)


def _import(where: str, plugin: str) -> type[Strategy] | None:
    """Import a plugin, and register and return the class if it names one."""
    module_name, _, class_name = plugin.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # another package's own code
        raise ValueError(f"{where}: importing {module_name} raised {type(error).__name__}: {error}") from error
    if not class_name:
        return None
    if not hasattr(module, class_name):
        raise ValueError(f"{where}: module {module_name} has no class {class_name}")
    return register_strategy(getattr(module, class_name))


def strategy_name(given: str) -> str:
    """The name of a strategy that is given as a name or as `package.module:Class`.

    A class is imported and registered. A name is returned unchanged and not checked.
    """
    if ":" not in given:
        return given
    cls = _import(f"strategy {given}", given)
    if cls is None:
        raise ValueError(f"strategy {given!r} names no class; expected package.module:Class")
    known = [each.strip() for each in os.environ.get(PLUGINS, "").split(",") if each.strip()]
    if given not in known:
        os.environ[PLUGINS] = ",".join([*known, given])  # for child processes
    return cls.name


def strategy_class(name: str) -> type[Strategy]:
    """The class of that name; a ValueError suggests the nearest name and lists all if there is none."""
    known = registered()
    if name in known:
        return known[name]
    names = (FULL, *known)
    near = get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown strategy {name!r}.{hint} Available: {', '.join(names)}")


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
