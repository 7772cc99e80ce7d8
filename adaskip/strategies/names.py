"""Names, labels and looks of the registered strategies, and the lists of strategies for tables and grids.

Each is a live view, which also contains strategies that are registered later. The full model comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

from adaskip.core.look import Look
from adaskip.core.strategy import Strategy
from adaskip.strategies.registry import FULL, FULL_LABEL, FULL_SHORT_NAME, registry

V = TypeVar("V")


class Declared(Mapping[str, V]):
    """Maps each strategy name to one of its declarations. full: the entries of the full model."""

    def __init__(self, of: Callable[[type[Strategy]], V], full: Mapping[str, V]):
        self._of, self._full = of, full

    def _entries(self) -> dict[str, V]:
        return {**self._full, **{name: self._of(cls) for name, cls in registry.all().items()}}

    def __getitem__(self, name: str) -> V:
        return self._entries()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self._entries())

    def __repr__(self) -> str:
        return repr(self._entries())


class Names(Sequence[str]):
    """The full model and the names of all strategies for which `which` is true."""

    def __init__(self, which: Callable[[type[Strategy]], bool]):
        self._which = which

    def _names(self) -> tuple[str, ...]:
        return (FULL, *(name for name, cls in registry.all().items() if self._which(cls)))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._names()[index]

    def __len__(self) -> int:
        return len(self._names())

    def __repr__(self) -> str:
        return repr(self._names())


STRATEGIES: Mapping[str, type[Strategy]] = Declared(lambda cls: cls, full={})
"""The strategy classes; the full model has none."""
NAMES: Sequence[str] = Names(lambda cls: True)
"""Every name that `--strategy` accepts."""
SHORT_NAMES: Mapping[str, str] = Declared(lambda cls: cls.short_name, full={FULL: FULL_SHORT_NAME})
"""Names in the names of runs."""
LABELS: Mapping[str, str] = Declared(lambda cls: cls.label, full={FULL: FULL_LABEL})
"""Names in tables and legends."""
LOOKS: Mapping[str, Look] = Declared(lambda cls: cls.look, full={})
"""Styles in plots; the full model has none, plots draw it as a reference line."""
PAPER_STRATEGIES: Sequence[str] = Names(lambda cls: cls.in_paper)
"""The strategies of the paper's Tables 3 and 4."""
GRID_STRATEGIES: Sequence[str] = Names(lambda cls: cls.in_grid)
"""The strategies that `adaskip grid` runs by default."""
