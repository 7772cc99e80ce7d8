"""POP: leaves the last n layers out while a prompt is read, but writes their K/V; the answer is the full model's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from adaskip.core.look import Look
from adaskip.core.plan import SkipPlan
from adaskip.core.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class POP(Strategy):
    """Skip the last n layers for all tokens of a prompt but the last, keeping their K/V.

    Each skipped layer writes the K/V of the hidden states that reached it. The last token of the prompt and the answer
    run through the full model. Source: POP, arXiv 2602.03295.
    """

    name = "pop"
    short_name = "POP"
    label = "POP"
    look = Look("#117733", "d", (3, 1, 1, 1, 1, 1))
    phases = ("prefill",)
    whole_layers = True

    @cached_property
    def skipped(self) -> SkipPlan:
        n = self.budget.num_whole_layers(self.num_layers, most=self.num_layers - 1)
        return SkipPlan.of_layers(range(self.num_layers - n, self.num_layers), keeps_kv=True)
