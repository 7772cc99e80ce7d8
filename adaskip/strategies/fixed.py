"""FixedPlan: skips exactly the sublayers of a given plan."""

from __future__ import annotations

from dataclasses import dataclass

from adaskip.core.plan import Budget, SkipPlan
from adaskip.core.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class FixedPlan(Strategy):
    """Skip the sublayers of `plan`, which was chosen by hand or by a search, or read from a file."""

    name = "fixed"

    plan: SkipPlan
    budget: Budget = Budget(sublayers=0)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget(sublayers=len(self.plan)))
        super().__post_init__()

    @property
    def skipped(self) -> SkipPlan:
        return self.plan
