"""What a plan leaves of a model, and how the live sublayers take up the scales of the skipped ones.

A norm does not see a positive factor of the residual stream. So `h <- s * h` may be left out if every later live
sublayer adds 1/S of its output, S being the product of the scales skipped before it; the final norm removes the factor
that is left. The norms' epsilon does see it, which changes results by about 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from adaskip.core.plan import Affine, SkipPlan, Sublayer, every_sublayer
from adaskip.core.strategy import Strategy
from adaskip.engines.errors import ExportError


@dataclass(frozen=True)
class Folded:
    """The smaller model that a plan stands for.

    num_layers: layers of the whole model. divisors: every live sublayer in the order of computation, and what its
    output is divided by; 1.0 as long as no scale was skipped.
    """

    num_layers: int
    divisors: Mapping[Sublayer, float]

    @property
    def live(self) -> tuple[Sublayer, ...]:
        """The sublayers that run, in the order of computation."""
        return tuple(self.divisors)

    @property
    def live_layers(self) -> tuple[int, ...]:
        """The layers that have a live sublayer."""
        return tuple(dict.fromkeys(sublayer.layer for sublayer in self.divisors))

    @property
    def is_whole_layers(self) -> bool:
        """Whether each layer is skipped as a whole or not at all."""
        return len(self.divisors) == 2 * len(self.live_layers)

    @property
    def is_scaled(self) -> bool:
        """Whether any weight changes."""
        return any(divisor != 1.0 for divisor in self.divisors.values())


def fold(strategy: Strategy) -> Folded:
    """The model that prompt and answer run through under `strategy`.

    Raises:
        ExportError: prompt and answer run under different plans, or a scale cannot be folded: it is not above 0, or an
            affine compensation that is more than one factor.
    """
    if not strategy.one_plan:
        raise ExportError(
            f"strategy {strategy.name} in phase {strategy.phase!r} changes its plan between prompt and answer or in "
            "the answer, which no exported model can do; allowed: phase prefill, or phase e2e with a fixed set "
            "(adaskip: learning_window=0)"
        )
    return fold_plan(strategy.skipped, strategy.num_layers)


def fold_plan(plan: SkipPlan, num_layers: int) -> Folded:
    """`fold` of a plan that holds for prompt and answer."""
    plan.check_fits(num_layers)
    divisors: dict[Sublayer, float] = {}
    product = 1.0
    for sublayer in every_sublayer(num_layers):
        if sublayer in plan:
            product *= _factor(plan, sublayer)
        else:
            divisors[sublayer] = product
    if not all(math.isfinite(1 / divisor) for divisor in divisors.values()):
        raise ExportError(f"the scales of the plan multiply to {product:g}, by which no weight can be divided")
    return Folded(num_layers, divisors)


def _factor(plan: SkipPlan, sublayer: Sublayer) -> float:
    scale = plan.scale(*sublayer)
    where = f"{sublayer.kind} {sublayer.layer}"
    if isinstance(scale, Affine):
        if len(set(scale.scale)) != 1 or any(scale.shift):
            raise ExportError(
                f"the affine compensation of {where} cannot be folded into weights: a norm sees a factor or shift of "
                "single channels; allowed: one scale for all channels"
            )
        scale = scale.scale[0]
    if not scale > 0:
        raise ExportError(f"the scale {scale:g} of {where} cannot be folded into weights; allowed: above 0")
    return scale
