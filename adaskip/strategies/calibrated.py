"""Calibrated skipping: skips the set that changes the model's output least, found by a search in advance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from adaskip.core.look import VERMILION, Look
from adaskip.core.plan import EMPTY_PLAN, SkipPlan
from adaskip.core.strategy import Strategy
from adaskip.profiles.selection import SelectionProfile


@dataclass(frozen=True, kw_only=True)
class CalibratedSkip(Strategy):
    """Skip the set that a search on calibration prompts chose for this phase and budget.

    Each sublayer is compensated by its offline scale, as in AdaSkip. There is no online window: its threshold, the
    lowest similarity in the set, is meaningless for a set that was not chosen by similarity. So at the same budget,
    inference costs the same as with AdaSkip without its window.

    profile: the result of the search (`adaskip.calibration.select`).
    """

    name = "calibrated"
    short_name = "CAL"
    label = "Calibrated"
    look = Look(VERMILION, "v", (6, 1, 1, 1, 1, 1), zorder=3)
    profile_type = SelectionProfile
    in_grid = True

    profile: SelectionProfile

    @cached_property
    def skipped(self) -> SkipPlan:
        selection, count = self.profile, self.budget.num_sublayers(self.num_layers)
        if selection.num_layers != self.num_layers:
            raise ValueError(
                f"selection for {selection.model} has {selection.num_layers} layers, but the model has "
                f"{self.num_layers}"
            )
        if selection.phase != self.phase:
            raise ValueError(
                f"selection was made for phase {selection.phase}, not for {self.phase}; run select for that phase"
            )
        if count > selection.largest:
            raise ValueError(
                f"the selection has sets of up to {selection.largest} sublayers, budget {self.budget} needs {count}; "
                "adaskip calibrate --select PHASE --up-to N searches larger sets"
            )
        return selection.selected[count].plan if count else EMPTY_PLAN
