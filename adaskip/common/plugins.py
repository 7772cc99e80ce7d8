"""Registries of classes by name (strategies, benchmarks): those of the library, and those of other packages.

Another package can add a class to the command line and the scripts in `eval/` in three ways:

- an entry point in the registry's group (`adaskip.strategies`, `adaskip.benchmarks`) with the value
  `package.module:Class`;
- the environment variable `ADASKIP_PLUGINS`, a comma-separated list of `package.module` (which registers its classes
  itself) or `package.module:Class`;
- `--strategy package.module:Class` or `--benchmark package.module:Class`, which adds the class to `ADASKIP_PLUGINS`, so
  that worker processes find it.

Plugins are imported when a class is first looked up, not when the library is imported.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

PLUGINS = "ADASKIP_PLUGINS"
"""The environment variable that lists plugins."""
NAME = re.compile(r"[a-z][a-z0-9_]*")

T = TypeVar("T")
C = TypeVar("C", bound=type)
_registries: list[Registry] = []
"""All registries, so that the class of a plugin is added to the right one."""


class Registry(Generic[T]):
    """Concrete, frozen dataclasses derived from `base`, by the `name` that each declares.

    Args:
        what: name of such a class in errors, e.g. "strategy". group: entry-point group of plugins.
        check: raises ValueError for a class with an invalid declaration.
        unique: string attributes whose values must differ between classes.
        reserved: for such an attribute, values that no class may declare, with their owner.
        own: modules of the library that register classes, imported at the first look-up.
    """

    def __init__(
        self,
        what: str,
        group: str,
        base: type[T],
        check: Callable[[Any], None],
        unique: Sequence[str],
        reserved: Mapping[str, Mapping[str, str]] | None = None,
        own: Sequence[str] = (),
    ):
        self.what, self.group, self.base, self.check = what, group, base, check
        self.unique, self.reserved, self.own = unique, reserved or {}, own
        self.classes: dict[str, type[T]] = {}
        self.loaded: set[str] = set()
        """Entry points and values of `ADASKIP_PLUGINS` that have been imported or are being imported."""
        _registries.append(self)

    def register(self, cls: C) -> C:
        """Register a class; can be used as a decorator above `@dataclass(frozen=True, kw_only=True)`.

        Registering the same class again changes nothing.

        Raises:
            ValueError: the class is not a concrete, frozen dataclass derived from the base, a declaration is missing or
                invalid, or another class has the same one.
        """
        known: Any = cls
        self._check_class(known)
        self.check(known)
        if self.classes.get(known.name) is not known:
            self._check_free(known)
            self.classes[known.name] = known
        return cls

    def _check_class(self, cls: Any) -> None:
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            base = f"{self.base.__module__}.{self.base.__qualname__}"
            raise ValueError(f"register_{self.what} takes a class derived from {base}; got {cls!r}")
        if inspect.isabstract(cls):
            raise ValueError(
                f"{cls.__name__} is abstract: define {', '.join(sorted(vars(cls)['__abstractmethods__']))}"
            )
        parameters = vars(cls).get("__dataclass_params__")  # of the class itself, not of a base class
        if not is_dataclass(cls) or parameters is None or not parameters.frozen:
            raise ValueError(f"{cls.__name__} must be a frozen dataclass: @dataclass(frozen=True, kw_only=True)")
        for attribute in self.unique:
            check_declared(cls, attribute, str)
        check_pattern(cls, "name", NAME)

    def _check_free(self, cls: Any) -> None:
        for attribute in self.unique:
            taken = {**self.reserved.get(attribute, {})}
            taken |= {getattr(other, attribute): other.__name__ for other in self.classes.values()}
            if (value := getattr(cls, attribute)) in taken:
                what = attribute.replace("_", " ")
                raise ValueError(
                    f"{cls.__name__} cannot be registered: {what} {value!r} is taken by {taken[value]}; "
                    f"taken: {', '.join(taken)}"
                )

    def all(self) -> dict[str, type[T]]:
        """Every class by name, those of the library first; imports plugins that are not imported yet.

        Raises:
            ValueError: a plugin cannot be imported, or its class cannot be registered.
        """
        own = ((f"the library's {name}", name) for name in self.own)
        for where, plugin in (*own, *_entry_points(self.group), *_from_environment()):
            if where not in self.loaded:
                self.loaded.add(where)
                try:
                    self._take(where, _import(where, plugin))
                except BaseException:
                    self.loaded.discard(where)
                    raise
        return dict(self.classes)

    def _take(self, where: str, cls: Any) -> None:
        """Register the class of a plugin, unless it belongs to another registry."""
        others = tuple(each.base for each in _registries if each is not self)
        if cls is None or (isinstance(cls, type) and issubclass(cls, others) and where.startswith(PLUGINS)):
            return
        self.register(cls)

    def name_of(self, given: str) -> str:
        """The name of a class that is given as a name or as `package.module:Class`.

        A class is imported and registered. A name is returned unchanged and not checked.
        """
        if ":" not in given:
            return given
        cls: Any = _import(f"{self.what} {given}", given)
        if cls is None:
            raise ValueError(f"{self.what} {given!r} names no class; expected package.module:Class")
        self.register(cls)
        known = [plugin for _, plugin in _from_environment()]
        if given not in known:
            os.environ[PLUGINS] = ",".join([*known, given])  # for child processes
        return cls.name

    def find(self, name: str, also: Sequence[str] = ()) -> type[T]:
        """The class of that name; if there is none, a ValueError suggests the nearest and lists all, `also` first."""
        known = self.all()
        if name in known:
            return known[name]
        names = (*also, *known)
        near = get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {self.what} {name!r}.{hint} Available: {', '.join(names)}")


def check_declared(cls: Any, attribute: str, kind: type) -> None:
    """Raise ValueError unless a class declares a value of that type; a string must not be empty."""
    value = getattr(cls, attribute, None)
    if not isinstance(value, kind) or value == "":
        raise ValueError(f"{cls.__name__} must declare {attribute}, a {kind.__name__}; got {value!r}")


def check_pattern(cls: Any, attribute: str, pattern: re.Pattern[str]) -> None:
    """Raise ValueError unless a string that a class declares matches the pattern completely."""
    if not pattern.fullmatch(value := getattr(cls, attribute)):
        raise ValueError(f"{cls.__name__} declares {attribute} {value!r}; allowed: {pattern.pattern}")


@cache
def _entry_points(group: str) -> tuple[tuple[str, str], ...]:
    """(origin, plugin) of each entry point: where it is listed, and `package.module` or `package.module:Class`."""
    found = sorted((point.name, point.value) for point in entry_points(group=group))
    return tuple((f"entry point {name} = {value} of group {group}", value) for name, value in found)


def _from_environment() -> Iterator[tuple[str, str]]:
    for plugin in filter(None, (each.strip() for each in os.environ.get(PLUGINS, "").split(","))):
        yield f"{PLUGINS}={plugin}", plugin


def _import(where: str, plugin: str) -> Any:
    """Import a plugin; returns the class that it names, or None if it names none."""
    module_name, _, class_name = plugin.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # another package's own code
        raise ValueError(f"{where}: importing {module_name} raised {type(error).__name__}: {error}") from error
    if not class_name:
        return None
    if not hasattr(module, class_name):
        raise ValueError(f"{where}: module {module_name} has no class {class_name}")
    return getattr(module, class_name)
