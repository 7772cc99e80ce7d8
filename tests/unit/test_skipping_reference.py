"""Skipped models against a decoder that truly lacks the sublayers: families x plans x cache modes."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import StaticCache

from adaskip.core.context import skipping
from adaskip.core.plan import Affine, Budget, Phase, SkipPlan, Sublayer
from adaskip.core.token_ids import left_padded
from adaskip.strategies import FixedPlan, SkipDecode
from tests.families import FAMILIES, VOCAB, WIDTH, random_model, random_prompts
from tests.reference import ReferenceDecoder

TOLERANCE = 1e-5
NEW_TOKENS = 6


AFFINE = Affine(scale=[1.0 + 0.02 * i for i in range(WIDTH)], shift=[0.1 - 0.01 * i for i in range(WIDTH)])
PLANS = {
    "empty": SkipPlan(),
    "first attention": SkipPlan.of_sublayers({Sublayer("attention", 0): 1.3}),
    "both of layer 1": SkipPlan.of_layers([1]),
    "scaled mix": SkipPlan.of_sublayers(
        {Sublayer("attention", 0): 1.1, Sublayer("ffn", 1): 0.8, Sublayer("attention", 3): 1.2}
    ),
    "affine": SkipPlan.of_sublayers(
        {Sublayer("ffn", 1): AFFINE, Sublayer("attention", 2): AFFINE, Sublayer("ffn", 3): 0.9}
    ),
    "one attention left": SkipPlan(attention={0, 1, 3}, ffn={0}),
    "one kind of attention": SkipPlan(attention={0, 2}, ffn={3}),
}


PROMPTS = random_prompts([9, 3, 6])
CONTINUATIONS = torch.stack(random_prompts([NEW_TOKENS] * 3, seed=7))
model_of = functools.cache(random_model)


@functools.cache
def reference_run(family: str, plan: str, phase: Phase):
    """Logits [B, NEW_TOKENS, V] of `PROMPTS`: after the prompt, and after each forced continuation token."""
    rows = []
    for prompt, forced in zip(PROMPTS, CONTINUATIONS, strict=True):
        decoder = ReferenceDecoder(model_of(family))
        prompt_plan = SkipPlan() if phase == "decode" else PLANS[plan]
        logits = [decoder.run(prompt.tolist(), prompt_plan)[-1]]
        logits += [decoder.step(token, PLANS[plan]) for token in forced[:-1].tolist()]
        rows.append(torch.stack(logits))
    return torch.stack(rows)


@functools.cache
def growing_reference_run(family: str, strategy: SkipDecode):
    """The same under a plan that changes from token to token."""
    rows = []
    for prompt, forced in zip(PROMPTS, CONTINUATIONS, strict=True):
        decoder = ReferenceDecoder(model_of(family))
        logits = [decoder.run(prompt.tolist(), strategy.prefill_plan)[-1]]
        floor = strategy.prefill_plan.attention_only()  # attention without the prompt's K/V does not come back
        for step, token in enumerate(forced[:-1].tolist(), 1):
            logits.append(decoder.step(token, strategy.decode_plan(step).union(floor)))
        rows.append(torch.stack(logits))
    return torch.stack(rows)


def skipped_run(model, prompts, strategy, continuations, *, cache_mode: str):
    """The same through direct calls on the stock model inside `skipping`."""
    ids, mask = left_padded(prompts, 0, torch.device("cpu"))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = StaticCache(config=model.config, max_cache_len=40) if cache_mode == "static" else None
    chunks = [(0, 4), (4, ids.shape[1])] if cache_mode == "chunked" else [(0, ids.shape[1])]
    collected = []
    with skipping(model, strategy), torch.no_grad():
        for start, end in chunks:
            out = model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
        collected.append(out.logits[:, -1])
        for step in range(NEW_TOKENS - 1):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = positions[:, -1:] + 1
            token = continuations[:, step : step + 1]
            out = model(
                input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            collected.append(out.logits[:, -1])
    return torch.stack(collected, dim=1)


# A family of each kind of cache stands for the others, whose caches have the same classes of layers; what is special to
# the layers of these is seen in the larger plans. The cache modes follow each other, so that they share a reference in
# each process.
CACHES = ("llama", "mistral", "gemma3")
LARGER = ("scaled mix", "affine", "one attention left")
CASES = [
    pytest.param(family, plan, mode, marks=[] if quick else [pytest.mark.slow])
    for family in FAMILIES
    for plan in PLANS
    for mode in ("dynamic", "chunked", "static")
    for quick in [family in CACHES or (mode == "dynamic" and plan in LARGER)]
]


@pytest.mark.parametrize(("family", "plan", "cache_mode"), CASES)
def test_logits_match_a_model_that_lacks_the_sublayers(family, plan, cache_mode):
    model = model_of(family)
    for phase in ("e2e", "decode"):
        strategy = FixedPlan(num_layers=4, phase=phase, plan=PLANS[plan])
        for count in (1, 3):
            expected = reference_run(family, plan, phase)[:count]
            got = skipped_run(model, PROMPTS[:count], strategy, CONTINUATIONS[:count], cache_mode=cache_mode)
            assert got.shape == (count, NEW_TOKENS, VOCAB)
            error = (got - expected).abs().max().item()
            assert error < TOLERANCE, f"{phase}, {count} prompts: logit error {error:.2e}"


@pytest.mark.parametrize("cache_mode", ["dynamic", "chunked", "static"])
@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
@pytest.mark.parametrize("family", CACHES)
def test_a_plan_that_grows_while_decoding_matches_too(family, phase, cache_mode):
    strategy = SkipDecode(num_layers=4, budget=Budget(layers=3), phase=phase, max_decode_steps=4)
    assert phase == "prefill" or len({len(strategy.decode_plan(t)) for t in range(1, NEW_TOKENS)}) > 1
    got = skipped_run(model_of(family), PROMPTS, strategy, CONTINUATIONS, cache_mode=cache_mode)
    assert (got - growing_reference_run(family, strategy)).abs().max() < TOLERANCE
