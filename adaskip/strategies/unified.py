"""Unified Skipping: skips n evenly spaced layers, never the first or the last."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from adaskip.core.look import GREEN, Look
from adaskip.core.plan import SkipPlan
from adaskip.core.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class UnifiedSkipping(Strategy):
    """Skip layers 1 + floor(i * M / n), i = 0..n-1.

    For n >= M / 2 that formula would reach the last layer, so the n layers are then spread in the same way over the
    M - 2 inner ones. Exactly n layers are skipped for every allowed n.
    """

    name = "unified"
    short_name = "US"
    label = "Unified Skipping"
    look = Look(GREEN, "D", (4, 1.5, 1, 1.5))
    whole_layers = True
    in_paper = True
    in_grid = True

    @cached_property
    def skipped(self) -> SkipPlan:
        total = self.num_layers
        n = self.budget.num_whole_layers(total, most=max(total - 2, 0))
        spread = total if 2 * n < total else total - 2
        return SkipPlan.of_layers(1 + i * spread // n for i in range(n))
