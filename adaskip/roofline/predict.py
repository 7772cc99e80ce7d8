"""Minimum times of a request under skip plans: TTFT and TPOT at the device's ceilings, and bytes of K/V."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adaskip.core.plan import SkipPlan
from adaskip.roofline.ceilings import Ceilings
from adaskip.roofline.shape import ModelShape
from adaskip.roofline.work import AttentionImplementation, head_work, sublayer_seconds

DecodePlan = SkipPlan | Callable[[int], SkipPlan]
"""One plan for every decode step, or a function of the step (from 1), such as a strategy's `decode_plan`."""


@dataclass(frozen=True)
class Times:
    """Time to the first token, and mean time of each later token (None if there is none)."""

    ttft_s: float
    tpot_s: float | None


def predict(
    shape: ModelShape,
    *,
    prefill_plan: SkipPlan,
    decode_plan: DecodePlan,
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int = 1,
    ceilings: Ceilings,
    bytes_per_value: int = 2,
    attention: AttentionImplementation = "fused",
) -> Times:
    """TTFT and TPOT if every live sublayer runs at the ceilings and nothing else takes time.

    The first of `new_tokens` comes from the forward over the prompt, which computes the logits of the last position
    only; the others come from decode steps over a growing context. An attention skipped in the prompt stays skipped.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1; got {new_tokens}")

    def seconds(plan: SkipPlan, tokens: int, context: int) -> float:
        return forward_seconds(
            shape,
            plan,
            tokens=tokens,
            context=context,
            batch_size=batch_size,
            ceilings=ceilings,
            bytes_per_value=bytes_per_value,
            attention=attention,
        )

    gone = prefill_plan.attention_only()
    steps = range(1, new_tokens)
    plans = (decode_plan(step) if callable(decode_plan) else decode_plan for step in steps)
    decode_s = sum(seconds(plan.union(gone), 1, prompt_tokens + step) for step, plan in zip(steps, plans, strict=True))
    return Times(seconds(prefill_plan, prompt_tokens, prompt_tokens), decode_s / len(steps) if steps else None)


def forward_seconds(
    shape: ModelShape,
    plan: SkipPlan,
    *,
    tokens: int,
    context: int,
    batch_size: int = 1,
    ceilings: Ceilings,
    bytes_per_value: int = 2,
    attention: AttentionImplementation = "fused",
) -> float:
    """The minimum time of one forward of the model without the sublayers of `plan`, which run one after the other."""
    plan.check_fits(shape.num_layers)
    head = head_work(shape, tokens=tokens, batch_size=batch_size, bytes_per_value=bytes_per_value)
    total = head.seconds(ceilings)
    for kind, groups in shape.alike.items():
        skipped = plan.attention if kind == "attention" else plan.ffn
        for layers in groups:
            if live := len(layers - skipped):
                total += live * sublayer_seconds(
                    shape,
                    kind,
                    tokens=tokens,
                    context=context,
                    batch_size=batch_size,
                    ceilings=ceilings,
                    bytes_per_value=bytes_per_value,
                    layer=min(layers),
                    attention=attention,
                )
    return total


def kv_bytes_per_token(shape: ModelShape, plan: SkipPlan, bytes_per_value: int = 2) -> int:
    """Bytes of K/V that a token adds to the cache; skipped attentions add none.

    Layers with a sliding window add K/V only until the window is full.
    """
    live = (attention for layer, attention in enumerate(shape.attention) if layer not in plan.attention)
    return 2 * sum(attention.num_kv_heads * attention.head_dim for attention in live) * bytes_per_value
