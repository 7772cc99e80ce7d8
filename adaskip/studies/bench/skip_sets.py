"""Which sublayers are skipped in each decode step, and in which share of the steps each one is."""

from __future__ import annotations

from collections.abc import Collection

from adaskip.core.plan import SkipPlan, Sublayer
from adaskip.profiles.assumed import KINDS
from adaskip.strategies import Strategy


def decode_plans(strategy: Strategy, steps: int, online_ffns: Collection[int]) -> list[SkipPlan]:
    """What is skipped in each decode step of one request, given the FFNs that joined after its learning window.

    An attention the prompt skipped has no K/V and stays skipped.
    """
    floor = strategy.prefill_plan.attention_only()
    joined = SkipPlan(ffn=frozenset(online_ffns))
    plans = []
    for step in range(1, steps + 1):
        plan = strategy.decode_plan(step).union(floor)
        floor = plan.attention_only()
        plans.append(plan.union(joined) if step > strategy.window_tokens else plan)
    return plans


def shares(plans: Collection[SkipPlan], num_layers: int) -> dict[str, list[float]]:
    """In which share of the plans each sublayer is skipped: kind -> [M]."""
    return {
        kind: [sum(Sublayer(kind, layer) in plan for plan in plans) / max(len(plans), 1) for layer in range(num_layers)]
        for kind in KINDS
    }
