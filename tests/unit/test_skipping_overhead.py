"""What skipping costs beside what it saves, in Python calls: a count, where times on a shared machine are noise."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch

from adaskip.calibration.measure import calibrate
from adaskip.core.blocks import find_decoder
from adaskip.core.context import skipping
from adaskip.core.generate import generate
from adaskip.core.patching import patches_of
from adaskip.core.plan import EMPTY_PLAN, Budget
from adaskip.strategies import AdaSkip, FixedPlan
from tests.families import random_model, random_prompts
from tests.profiles import profile_of

NUM_LAYERS = 16  # enough for what is done once per step to be small beside what is done per layer


def ada_skip(window: int) -> AdaSkip:
    """Skips the last FFN and has the others measured; none is similar enough to join."""
    profile = profile_of(attention=[-1.0] * NUM_LAYERS, ffn=[-1.0] * (NUM_LAYERS - 1) + [0.9999])
    return AdaSkip(num_layers=NUM_LAYERS, budget=Budget(sublayers=1), profile=profile, learning_window=window)


def calls_per_token(model, strategy) -> float:
    """Functions called, Python's and C's, for one decoded token."""
    with nullcontext() if strategy is None else skipping(model, strategy):
        short, long = (calls_of(model, new_tokens) for new_tokens in (4, 12))
    return (long - short) / 8


def calls_of(model, new_tokens: int) -> int:
    ids, calls = random_prompts([9])[0][None], 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    finally:
        sys.setprofile(None)
    return calls


def test_a_decode_step_makes_hardly_more_calls_than_stock():
    model = random_model("llama", num_layers=NUM_LAYERS)
    calls_of(model, 2)  # the first `generate` of a process does more
    stock = calls_per_token(model, None)
    assert calls_per_token(model, FixedPlan(num_layers=NUM_LAYERS, plan=EMPTY_PLAN)) <= 1.015 * stock
    assert calls_per_token(model, ada_skip(window=0)) <= 1.005 * stock
    measuring = calls_per_token(model, ada_skip(window=100))
    assert stock < measuring <= 1.1 * stock, "20 of 256 tokens may cost 1 % in all"


def test_a_step_that_measures_nothing_does_not_look_for_measurements(monkeypatch):
    model = random_model("llama")
    monkeypatch.setattr(type(patches_of(model)), "take_ffn_io", lambda self: pytest.fail("looked for measurements"))
    with skipping(model, FixedPlan(num_layers=4, plan=EMPTY_PLAN)):
        model.generate(random_prompts([5])[0][None], max_new_tokens=4, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_prompts_get_logits_for_their_last_token_only(cache_implementation):
    model = random_model("llama", num_layers=NUM_LAYERS)
    lengths = []
    model.lm_head.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    prompts = random_prompts([9, 5])
    for strategy in (None, ada_skip(window=4)):
        generate(model, strategy, prompts, max_new_tokens=6, eos_token_ids=[], pad_token_id=0,
                 cache_implementation=cache_implementation)  # fmt: skip
    assert lengths == [1] * 12
    calibrate(model, prompts, phase="decode", max_new_tokens=3, eos_token_ids=[])
    assert lengths == [1] * len(lengths)
    count = len(lengths)
    calibrate(model, prompts)
    assert len(lengths) == count, "a measuring prefill needs no logits at all"


def test_a_kept_plan_is_not_applied_again():
    """The usual decode step leaves patches and cache as they are."""
    model = random_model("llama")
    with skipping(model, FixedPlan(num_layers=4, plan=EMPTY_PLAN)), torch.no_grad():
        decoder, ids = find_decoder(model), random_prompts([5])[0][None]
        cache = decoder(ids, use_cache=True).past_key_values
        decoder(ids[:, :1], past_key_values=cache)
        work = patches_of(model).work
        decoder(ids[:, :1], past_key_values=cache)
        assert patches_of(model).work is work
