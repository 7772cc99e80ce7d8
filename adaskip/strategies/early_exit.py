"""Early Exit: skips the last n layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from adaskip.core.look import ORANGE, Look
from adaskip.core.plan import SkipPlan
from adaskip.core.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class EarlyExit(Strategy):
    """Skip the last n layers, so that the model's output is taken n layers before its end."""

    name = "early_exit"
    short_name = "EE"
    label = "Early Exit"
    look = Look(ORANGE, "s", (4, 1.5))
    whole_layers = True
    in_paper = True
    in_grid = True

    @cached_property
    def skipped(self) -> SkipPlan:
        n = self.budget.num_whole_layers(self.num_layers, most=self.num_layers - 1)
        return SkipPlan.of_layers(range(self.num_layers - n, self.num_layers))
