"""Any plan, family and mode of generation: the tokens of the model whose skipped sublayers add nothing."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from adaskip.core.context import skipping
from adaskip.core.plan import SkipPlan
from adaskip.core.token_ids import left_padded
from adaskip.strategies import FixedPlan
from tests.families import FAMILIES, random_model, random_prompts
from tests.wrappers import WRAPPERS
from tests.zeroed import greedy_reference

NEW_TOKENS = 6
LAYERS = 4


WRAPPED = {"none": lambda model: model, **WRAPPERS}
CACHES = ("dynamic", "given", "chunked", "static", "direct")


@functools.cache
def model_of(family):
    return random_model(family, num_layers=LAYERS)


@st.composite
def plans(draw):
    layers = st.integers(0, LAYERS - 1)
    attention = draw(st.frozensets(layers, max_size=LAYERS - 1))
    return SkipPlan(attention=attention, ffn=draw(st.frozensets(layers)))


def answers(model, ids, mask, cache) -> torch.Tensor:
    """Tokens [B, NEW_TOKENS] by the way of generation that `cache` names."""
    if cache == "direct":
        return directly(model, ids, mask)
    options = {
        "given": {"past_key_values": DynamicCache()},
        "chunked": {"past_key_values": DynamicCache(), "prefill_chunk_size": 3},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }.get(cache, {})
    settings_ = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=mask, **settings_, **options)[:, ids.shape[1] :]


@torch.no_grad()
def directly(model, ids, mask) -> torch.Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    tokens = [output.logits[:, -1].argmax(-1)]
    while len(tokens) < NEW_TOKENS:
        mask, positions = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), positions[:, -1:] + 1
        output = model(input_ids=tokens[-1][:, None], attention_mask=mask, position_ids=positions,
                       past_key_values=output.past_key_values, use_cache=True)  # fmt: skip
        tokens.append(output.logits[:, -1].argmax(-1))
    return torch.stack(tokens, dim=1)


@settings(max_examples=48, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    plan=plans(),
    phase=st.sampled_from(["prefill", "decode", "e2e"]),
    cache=st.sampled_from(CACHES),
    lengths=st.sampled_from([(9,), (7,), (4, 9), (9, 1, 6)]),
    wrapper=st.sampled_from(sorted(WRAPPED)),
)
def test_tokens_equal_those_of_zeroed_sublayers(family, plan, phase, cache, lengths, wrapper):
    model = model_of(family)
    ids, mask = left_padded(random_prompts(list(lengths)), 0, torch.device("cpu"))
    expected = greedy_reference(model, ids, mask, plan, phase, NEW_TOKENS)
    called = WRAPPED[wrapper](model) if cache != "direct" else model
    with skipping(called, FixedPlan(num_layers=LAYERS, plan=plan, phase=phase)):
        assert torch.equal(answers(called, ids, mask, cache), expected)


def test_the_reference_can_tell_plans_apart():
    model, seen = model_of("llama"), set()
    ids, mask = left_padded(random_prompts([9]), 0, torch.device("cpu"))
    for plan in (SkipPlan(), SkipPlan(attention={1}), SkipPlan(ffn={2})):
        for phase in ("decode", "e2e"):
            seen.add(str(greedy_reference(model, ids, mask, plan, phase, NEW_TOKENS).tolist()))
    assert len(seen) == 5, "the empty plan is the same in both phases"


@pytest.fixture(autouse=True)
def no_graphs_left():
    yield
    torch.compiler.reset()
