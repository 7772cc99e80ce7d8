"""Calibrated skipping: the sublayers whose absence changes the model's output least, found by a search beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from adaskip.core.look import VERMILION, Look
from adaskip.core.plan import EMPTY_PLAN, SkipPlan
from adaskip.core.strategy import Strategy
from adaskip.profiles.selection import SelectionProfile


@dataclass(frozen=True, kw_only=True)
class CalibratedSkip(Strategy):
    """Skip the set that a search on the calibration prompts chose for this phase and budget, each sublayer
    compensated by its offline scale, as in AdaSkip.

    There is no online window: its threshold is the least similarity in the set, which says nothing here, since the set
    was not chosen by similarity. So at the same budget inference costs what AdaSkip's costs, without its window.

    profile: the profile of the search (`adaskip.calibration.select`).
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
                f"selection of {selection.model} is for {selection.num_layers} layers, the model has {self.num_layers}"
            )
        if selection.phase != self.phase:
            raise ValueError(f"selection was made for phase {selection.phase}, not for {self.phase}; select for it")
        if count > selection.largest:
            raise ValueError(
                f"the selection goes up to {selection.largest} sublayers; budget {self.budget} asks for {count}; "
                "adaskip calibrate --select --up-to searches further"
            )
        return selection.selected[count].plan if count else EMPTY_PLAN
