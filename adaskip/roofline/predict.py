"""Minimum times of a request under skip plans: TTFT and TPOT at the device's ceilings, and bytes of K/V."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

from adaskip.core.plan import EMPTY_PLAN, SkipPlan
from adaskip.roofline.shape import ModelShape
from adaskip.roofline.work import Running, head_work, kv_work, sublayer_seconds

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
    **running: Unpack[Running],
) -> Times:
    """TTFT and TPOT if every live sublayer runs at the ceilings and nothing else takes time.

    The first of `new_tokens` comes from the forward over the prompt, which computes the logits of the last position
    only; the others come from decode steps over a growing context. An attention skipped in the prompt stays skipped,
    unless the plan keeps its K/V; then the last token of the prompt runs through the full model, by itself.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1; got {new_tokens}")
    gone, decode_s = prefill_plan.attention_only(), 0.0
    for step in range(1, new_tokens):
        plan = (decode_plan(step) if callable(decode_plan) else decode_plan).union(gone)
        decode_s += forward_seconds(shape, plan, tokens=1, context=prompt_tokens + step, **running)
    plan, tokens, prefill_s = prefill_plan, prompt_tokens, 0.0
    if prefill_plan.keeps_kv:
        plan, tokens, read = EMPTY_PLAN, 1, prompt_tokens - 1
        if read:
            prefill_s = forward_seconds(shape, prefill_plan, tokens=read, context=read, logits=False, **running)
    prefill_s += forward_seconds(shape, plan, tokens=tokens, context=prompt_tokens, **running)
    return Times(prefill_s, decode_s / (new_tokens - 1) if new_tokens > 1 else None)


def forward_seconds(
    shape: ModelShape, plan: SkipPlan, *, tokens: int, context: int, logits: bool = True, **running: Unpack[Running]
) -> float:
    """The minimum time of one forward of the model without the sublayers of `plan`, which run one after the other.

    logits: whether it computes those of the last position.
    """
    plan.check_fits(shape.num_layers)
    given: dict[str, Any] = {**running}
    sizes = {name: given[name] for name in ("batch_size", "bytes_per_value") if name in given}
    total = head_work(shape, tokens=tokens, logits=logits, **sizes).seconds(running["ceilings"])
    for kind, groups in shape.alike.items():
        skipped = plan.attention if kind == "attention" else plan.ffn
        for layers in groups:
            if live := len(layers - skipped):
                each = sublayer_seconds(shape, kind, tokens=tokens, context=context, layer=min(layers), **running)
                total += live * each
            if plan.keeps_kv and kind == "attention" and (kept := len(layers & skipped)):
                work = kv_work(shape, tokens=tokens, layer=min(layers), **sizes)
                total += kept * work.seconds(running["ceilings"])
    return total


def kv_bytes_per_token(shape: ModelShape, plan: SkipPlan, bytes_per_value: int = 2) -> int:
    """Bytes of K/V that a token adds to the cache; skipped attentions add none, unless the plan keeps their K/V.

    Layers with a sliding window add K/V only until the window is full.
    """
    skipped = plan.attention_only().attention
    live = (attention for layer, attention in enumerate(shape.attention) if layer not in skipped)
    return 2 * sum(attention.num_kv_heads * attention.head_dim for attention in live) * bytes_per_value
