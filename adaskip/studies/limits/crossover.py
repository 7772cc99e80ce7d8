"""When attention skipping wins and when FFN skipping does: what each kind of sublayer takes, by context length."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal, get_args

from adaskip.core.plan import SkipPlan, SublayerKind
from adaskip.roofline.ceilings import Ceilings
from adaskip.roofline.predict import forward_seconds
from adaskip.roofline.shape import ModelShape
from adaskip.roofline.work import IMPLEMENTATIONS, AttentionImplementation, sublayer_seconds

Step = Literal["prefill", "decode"]
STEPS: tuple[Step, ...] = get_args(Step)
LONGEST = 2**22
"""Positions beyond which nobody looks."""


@dataclass(frozen=True)
class Crossover:
    """The least context at which an attention takes as long as an FFN on a device; None beyond `LONGEST`."""

    model: str
    device: str
    step: Step
    attention: AttentionImplementation
    context: int | None


def seconds(
    shape: ModelShape,
    kind: SublayerKind,
    step: Step,
    context: int,
    ceilings: Ceilings,
    attention: AttentionImplementation = "fused",
) -> float:
    """One sublayer of the first layer at batch 1: over a prompt of `context` tokens, or for the last of them alone."""
    tokens = _tokens(step, context)
    return sublayer_seconds(shape, kind, tokens=tokens, context=context, ceilings=ceilings, attention=attention)


def find_crossover(
    shape: ModelShape, step: Step, ceilings: Ceilings, attention: AttentionImplementation = "fused"
) -> int | None:
    """The least context at which attention takes as long as the FFN; None if that is beyond `LONGEST`."""

    def overtaken(context: int) -> bool:
        one, other = (seconds(shape, kind, step, context, ceilings, attention) for kind in ("attention", "ffn"))
        return one >= other

    context = 1 + bisect_left(range(1, LONGEST), True, key=overtaken)
    return context if context < LONGEST else None


def crossovers(model: str, shape: ModelShape, ceilings: Ceilings) -> list[Crossover]:
    """Of both phases and both ways to compute attention."""
    return [
        Crossover(model, ceilings.name, step, attention, find_crossover(shape, step, ceilings, attention))
        for attention in IMPLEMENTATIONS
        for step in STEPS
    ]


def speedup_of_kind(
    shape: ModelShape, kind: SublayerKind, step: Step, context: int, ceilings: Ceilings, count: int
) -> float:
    """Speedup of one forward at batch 1 if the last `count` sublayers of one kind are skipped and none of the other."""
    last = frozenset(range(shape.num_layers - count, shape.num_layers))
    plans = SkipPlan(), SkipPlan(attention=last) if kind == "attention" else SkipPlan(ffn=last)
    tokens = _tokens(step, context)
    full, skipped = (forward_seconds(shape, plan, tokens=tokens, context=context, ceilings=ceilings) for plan in plans)
    return full / skipped


def _tokens(step: Step, context: int) -> int:
    return context if step == "prefill" else 1
