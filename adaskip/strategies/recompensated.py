"""The sets of any strategy with another compensation of the skipped sublayers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from adaskip.core.plan import SkipPlan
from adaskip.core.strategy import FFNSimilarity, Strategy


@dataclass(frozen=True, kw_only=True)
class Recompensated(Strategy):
    """Skip what `inner` skips when it skips it, compensated as `compensate` says.

    compensate: returns a plan of the same sublayers with other scales, e.g. a `FittedCompensation`. FFNs that `inner`
    adds after a learning window keep the scales measured in it.
    """

    inner: Strategy
    compensate: Callable[[SkipPlan], SkipPlan]
    _made: dict[SkipPlan, SkipPlan] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, inner: Strategy, compensate: Callable[[SkipPlan], SkipPlan]) -> Recompensated:
        fields = {name: getattr(inner, name) for name in ("num_layers", "budget", "phase", "keep_kv")}
        return cls(inner=inner, compensate=compensate, **fields)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.inner.name)
        super().__post_init__()

    @cached_property
    def skipped(self) -> SkipPlan:
        return self._compensated(self.inner.skipped)

    @cached_property
    def prefill_plan(self) -> SkipPlan:
        return self._compensated(self.inner.prefill_plan)

    def decode_plan(self, step: int) -> SkipPlan:
        return self._compensated(self.inner.decode_plan(step))

    @property
    def is_steady(self) -> bool:
        return self.inner.is_steady

    @property
    def window_tokens(self) -> int:
        return self.inner.window_tokens

    def learn(self, window: Mapping[int, FFNSimilarity]) -> SkipPlan:
        return self.inner.learn(window)

    def _compensated(self, plan: SkipPlan) -> SkipPlan:
        """The same object for equal plans, since requests compare plans by identity."""
        if plan not in self._made:
            self._made[plan] = self.compensate(plan)
        return self._made[plan]
