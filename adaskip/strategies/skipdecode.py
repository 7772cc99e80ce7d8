"""SkipDecode: skips layers from the second one on, more of them as the answer gets longer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from adaskip.core.look import PURPLE, Look
from adaskip.core.plan import SkipPlan
from adaskip.core.strategy import Strategy, strategy_option

MAX_DECODE_STEPS = 512  # the paper's output cap


@dataclass(frozen=True, kw_only=True)
class SkipDecode(Strategy):
    """Skip layers 1..n in the prompt; while decoding, skip two at the first step (one if n = 1), all n at the last.

    max_decode_steps: T_max, the step from which on all n layers are skipped.

    In phase e2e the prompt leaves no K/V in layers 1..n, and an attention without K/V cannot run again. So there the
    schedule changes only the FFNs, and the attentions of layers 1..n stay skipped as long as the cache exists.
    """

    name = "skipdecode"
    short_name = "SD"
    label = "SkipDecode"
    look = Look(PURPLE, "^", (1, 1))
    whole_layers = True
    in_paper = True
    in_grid = True

    max_decode_steps: int = strategy_option(
        "step from which on all layers of the budget are skipped; default: the task's maximum number of tokens",
        MAX_DECODE_STEPS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_decode_steps < 1:
            raise ValueError(f"max_decode_steps must be at least 1; got {self.max_decode_steps}")

    @cached_property
    def skipped(self) -> SkipPlan:
        return self._first(self._num_whole_layers)

    @cached_property
    def _num_whole_layers(self) -> int:
        return self.budget.num_whole_layers(self.num_layers, most=self.num_layers - 1)

    @cached_property
    def _schedule(self) -> tuple[SkipPlan, ...]:
        """The plan for each number of skipped layers, 0..n."""
        return tuple(self._first(n) for n in range(self._num_whole_layers + 1))

    @staticmethod
    def _first(n: int) -> SkipPlan:
        return SkipPlan.of_layers(range(1, n + 1))

    def decode_plan(self, step: int) -> SkipPlan:
        """ceil(t / T_max * (n - 1)) + 1 layers at step t; in the prefill phase always n layers, as in the prompt."""
        n = self._num_whole_layers
        if self.phase == "prefill" or n == 0:
            return super().decode_plan(step)
        return self._schedule[min(n, -(-step * (n - 1) // self.max_decode_steps) + 1)]

    @property
    def is_steady(self) -> bool:
        """True in the prefill phase, and if the schedule has a single entry."""
        return (self.phase == "prefill" or self._num_whole_layers <= 1) and not self.is_prompt_only
