"""The base class of strategies that skip a set of a selection profile, chosen in advance by a method."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from adaskip.core.plan import EMPTY_PLAN, SkipPlan
from adaskip.core.strategy import Strategy
from adaskip.profiles.selection import METHODS, SEARCH, SelectionProfile


@dataclass(frozen=True, kw_only=True)
class SelectedSets(Strategy):
    """Skip the set of the budget in a selection profile.

    method: the method that must have made the profile. profile: what `adaskip.select` made with that method.
    """

    profile_type = SelectionProfile
    method: ClassVar[str] = SEARCH

    profile: SelectionProfile

    @cached_property
    def skipped(self) -> SkipPlan:
        selection, count = self.profile, self.budget.num_sublayers(self.num_layers)
        self._check_profile()
        if count > selection.largest:
            raise ValueError(
                f"the selection has sets of up to {selection.largest} sublayers, budget {self.budget} needs {count}; "
                f"adaskip calibrate --select PHASE {self._option} makes larger sets"
            )
        if count and count not in selection.selected:
            raise ValueError(
                f"the selection has no set for budget {self.budget}, of {count} sublayers; it has sets of: "
                f"{', '.join(map(str, selection.selected))}"
            )
        return selection.selected[count].plan if count else EMPTY_PLAN

    def _check_profile(self) -> None:
        """Raise ValueError unless the profile was made by the method, for this depth and phase."""
        selection = self.profile
        if selection.method != self.method:
            raise ValueError(
                f"{self.name} needs a selection made with method {self.method}, this one was made with "
                f"{selection.method}; adaskip calibrate --select PHASE --method {self.method} makes one"
            )
        if selection.num_layers != self.num_layers:
            raise ValueError(
                f"selection for {selection.model} has {selection.num_layers} layers, but the model has "
                f"{self.num_layers}"
            )
        if METHODS[self.method].by_phase and selection.phase != self.phase:
            raise ValueError(
                f"selection was made for phase {selection.phase}, not for {self.phase}; run select for that phase"
            )
        if selection.keep_kv and not self.keep_kv:
            raise ValueError(
                "the selection was searched for sets that are skipped only while the prompt is read; use it with "
                "keep_kv=True (--keep-kv)"
            )

    @property
    def _option(self) -> str:
        method = "" if self.method == SEARCH else f"--method {self.method} "
        return f"{method}{'--budgets' if METHODS[self.method].one_by_one else '--up-to'} N"
