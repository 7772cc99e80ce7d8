"""The choice of a set by a speedup: the least divergent that reaches it, by times added up by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from adaskip.core.plan import EMPTY_PLAN, SkipPlan
from adaskip.roofline import Ceilings, ModelShape, forward_seconds
from adaskip.runs.choose_by_speedup import Predictor, Request, UnreachableSpeedupError, choose
from tests.profiles import selection_of

DEVICE = Ceilings("unit", matmul_flops=1e12, bandwidth=1e11)
LAYERS = 4
SHAPE = ModelShape.of(
    AutoConfig.for_model(
        "llama",
        vocab_size=11,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
)
REQUESTS = (Request(50, 5, count=3), Request(20, 8))
PLAN = SkipPlan(attention=frozenset({1}), ffn=frozenset({0, 2}))


def forward(plan: SkipPlan, tokens: int, context: int) -> float:
    return forward_seconds(SHAPE, plan, tokens=tokens, context=context, ceilings=DEVICE)


def seconds(plan: SkipPlan, phase: str) -> float:
    """The time of all requests, forward by forward."""
    total = 0.0
    for request in REQUESTS:
        for _ in range(request.count):
            if phase != "decode":
                total += forward(plan, request.prompt_tokens, request.prompt_tokens)
            if phase != "prefill":
                for step in range(1, request.new_tokens):
                    total += forward(plan, 1, request.prompt_tokens + step)
    return total


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_the_predicted_speedup_is_that_of_the_forwards_the_phase_is_about(phase):
    predictor = Predictor(SHAPE, phase, REQUESTS, DEVICE)
    assert predictor.speedup(EMPTY_PLAN) == 1
    assert predictor.speedup(PLAN) == pytest.approx(seconds(EMPTY_PLAN, phase) / seconds(PLAN, phase))
    assert predictor.speedup(PLAN) > 1.1


def test_the_batch_and_the_dtype_count():
    predictor = Predictor(SHAPE, "decode", REQUESTS, DEVICE)
    assert replace(predictor, batch_size=8).speedup(PLAN) != predictor.speedup(PLAN)
    assert replace(predictor, ceilings=replace(DEVICE, matmul_flops=1e9), bytes_per_value=4).speedup(
        PLAN
    ) != predictor.speedup(PLAN)


def test_answers_of_one_token_have_no_decode_to_speed_up():
    with pytest.raises(ValueError, match="all have 1"):
        Predictor(SHAPE, "decode", (Request(50, 1),), DEVICE)


some = st.floats(0, 3, allow_nan=False)


@given(
    target=st.floats(1.001, 3),
    sets=st.lists(st.tuples(some, some), min_size=2 * LAYERS - 1, max_size=2 * LAYERS - 1),
)
def test_the_chosen_set_diverges_least_of_those_that_reach_the_speedup(target, sets):
    """Divergence need not grow with the count, nor the speedup: an FFN may take longer than an attention."""
    profile = selection_of(LAYERS, "e2e")
    selected = {
        count: replace(profile.selected[count], divergence=divergence)
        for count, (divergence, _) in enumerate(sets, start=1)
    }
    profile = replace(profile, selected=selected)
    speedups = {count: speedup for count, (_, speedup) in enumerate(sets, start=1)}
    reaching = {count for count in speedups if speedups[count] >= target}
    if not reaching:
        with pytest.raises(UnreachableSpeedupError, match=f"1 to {2 * LAYERS - 1} sublayers.* on unit; .*--up-to"):
            choose(profile, target, speedups, "on unit")
        return
    chosen = choose(profile, target, speedups, "on unit")
    assert chosen in reaching
    least = min(selected[count].divergence for count in reaching)
    assert selected[chosen].divergence == least
    assert not any(count < chosen for count in reaching if selected[count].divergence == least)


def test_what_cannot_be_reached_is_told_with_the_range_that_can():
    profile = selection_of(LAYERS, "prefill")
    with pytest.raises(
        UnreachableSpeedupError, match=r"--target-speedup 2 .* reach 1\.020 to 1\.500 on unit"
    ) as caught:
        choose(profile, 2.0, {1: 1.02, 2: 1.5, 3: 1.4}, "on unit")
    assert "--select prefill --up-to" in str(caught.value)
