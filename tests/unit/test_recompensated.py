"""The compensation of any strategy's sets can be replaced: which plan each step of a request gets."""

from __future__ import annotations

import pytest
import torch

from adaskip import Budget, calibrate, skipping
from adaskip.calibration.compensation import AFFINE, COMPENSATIONS, NONE, SCALE, SHIFT, fit_compensation, stream_moments
from adaskip.core.plan import Affine, SkipPlan, Sublayer
from adaskip.strategies import AdaSkip, EarlyExit, FixedPlan, SkipDecode
from adaskip.strategies.recompensated import Recompensated
from tests.families import random_model, random_prompts

ATTENTION, FFN = Sublayer("attention", 1), Sublayer("ffn", 2)
PLAN = SkipPlan.of_sublayers({ATTENTION: 1.25, FFN: 0.5})


@pytest.fixture(scope="module")
def model():
    return random_model("llama")


@pytest.fixture(scope="module")
def prompts():
    return random_prompts([9, 14, 11])


@pytest.mark.parametrize("kind", COMPENSATIONS)
def test_each_skipped_sublayer_gets_what_was_fitted_for_it(model, prompts, kind):
    moments = stream_moments(model, prompts)
    found = fit_compensation(model, kind, prompts)(PLAN)
    expected = {
        "none": {ATTENTION: 1.0, FFN: 1.0},
        "scale": {ATTENTION: 1.25, FFN: 0.5},
        "least_squares": {s: moments[s].least_squares_scale() for s in (ATTENTION, FFN)},
        "affine": {s: moments[s].affine() for s in (ATTENTION, FFN)},
        "shift": {ATTENTION: moments[ATTENTION].shift(1.25), FFN: moments[FFN].shift(0.5)},
    }[kind]
    assert found == SkipPlan.of_sublayers(expected)
    assert found != PLAN or kind == SCALE


def test_an_affine_map_replaces_the_first_layer_with_its_least_squares_fit(model, prompts):
    """The embeddings, which do not depend on the plan, are the input of the first attention."""
    first = Sublayer("attention", 0)
    plan = fit_compensation(model, AFFINE, prompts)(SkipPlan.of_sublayers({first: 1.0}))
    fitted = plan.scales[first]
    assert isinstance(fitted, Affine)
    seen = {}
    hook = model.model.layers[0].post_attention_layernorm.register_forward_pre_hook(
        lambda module, args: seen.update(b=args[0].clone())
    )
    with skipping(model, plan), torch.no_grad():
        model(prompts[0][None])
    hook.remove()
    a = model.model.embed_tokens(prompts[0])
    torch.testing.assert_close(seen["b"][0], a * torch.tensor(fitted.scale) + torch.tensor(fitted.shift))


def test_a_shift_of_a_plan_with_scales_per_channel_is_refused(model, prompts):
    affine = fit_compensation(model, AFFINE, prompts)(PLAN)
    with pytest.raises(ValueError, match="this one has a scale per channel"):
        fit_compensation(model, SHIFT, prompts)(affine)


def test_an_unknown_kind_and_no_prompts_are_refused(model, prompts):
    with pytest.raises(ValueError, match=r"unknown compensation 'afine'\. Did you mean 'affine'\?"):
        fit_compensation(model, "afine", prompts)
    with pytest.raises(ValueError, match="at least one prompt; there are none"):
        fit_compensation(model, AFFINE, [])


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_a_request_skips_what_the_strategy_skips_and_learns_what_it_learns(model, prompts, phase):
    profile = calibrate(model, prompts)
    plain = AdaSkip(
        num_layers=4, budget=Budget(sublayers=2), profile=profile, phase=phase, learning_window=2, beta_quantile=0.0
    )
    other = Recompensated.of(plain, fit_compensation(model, NONE, prompts))
    seen = []
    for strategy in (plain, other):
        with skipping(model, strategy) as session:
            model.generate(prompts[0][None], max_new_tokens=6, eos_token_id=None, do_sample=False)
            trace = session.last_request
        seen.append((trace.prefill_plan.to_dict(), trace.decode_plan.to_dict(), trace.online_ffns))
        window = trace.decode_plan
    assert seen[0] == seen[1]
    joined = [Sublayer("ffn", layer) for layer in trace.online_ffns]
    assert joined or phase != "decode"
    assert {s: window.scales[s] for s in plain.skipped.scales} == dict.fromkeys(plain.skipped.scales, 1.0)
    assert all(window.scales[s] != 1.0 for s in joined)
    assert other.name == "adaskip"
    assert (other.is_steady, other.window_tokens) == (plain.is_steady, plain.window_tokens)


def test_steps_with_the_same_set_share_one_plan(model, prompts):
    inner = SkipDecode(num_layers=4, budget=Budget(sublayers=4), phase="decode", max_decode_steps=8)
    other = Recompensated.of(inner, fit_compensation(model, AFFINE, prompts))
    for step in range(1, 9):
        plan, plain = other.decode_plan(step), inner.decode_plan(step)
        assert (plan.attention, plan.ffn) == (plain.attention, plain.ffn)
        assert plan is other.decode_plan(step)
        assert {type(scale) for scale in plan.scales.values()} <= {Affine}
    assert not other.prefill_plan


def test_prompt_only_sets_stay_prompt_only(model, prompts):
    inner = EarlyExit(num_layers=4, budget=Budget(sublayers=2), phase="prefill", keep_kv=True)
    other = Recompensated.of(inner, fit_compensation(model, AFFINE, prompts))
    assert other.is_prompt_only
    assert not other.decode_plan(1)
    assert len(other.prefill_plan) == 2


def test_a_fixed_plan_keeps_its_origin(model, prompts):
    plan = fit_compensation(model, NONE, prompts)(PLAN)
    fixed = FixedPlan(num_layers=4, plan=PLAN)
    assert Recompensated.of(fixed, fit_compensation(model, NONE, prompts)).skipped == plan
