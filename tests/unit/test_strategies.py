"""What each strategy skips, by phase and budget."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip.core.plan import EMPTY_PLAN, Budget, SkipPlan, Sublayer
from adaskip.strategies import (
    NAMES,
    STRATEGIES,
    AdaSkip,
    FFNSimilarity,
    SkipDecode,
    build,
    needs_profile,
    selection_method,
)
from tests.profiles import profile_of, selection_of

M = 16
RISING = [0.50 + 0.02 * i for i in range(M)]
PROFILE = profile_of(attention=[x + 0.15 for x in RISING], ffn=RISING, layer=RISING)


def make(name, phase=None, budget=None, num_layers=M, **options):
    phase = phase or STRATEGIES[name].phases[-1] if name in STRATEGIES else "e2e"
    if needs_profile(name):
        method = selection_method(name)
        options["profile"] = PROFILE if method is None else selection_of(num_layers, phase, method)
    return build(name, phase=phase, budget=budget or Budget(layers=3), num_layers=num_layers, **options)


@pytest.mark.parametrize(("name", "phase"), [(name, phase) for name in STRATEGIES for phase in STRATEGIES[name].phases])
def test_phase_decides_where_a_strategy_skips(name, phase):
    strategy = make(name, phase)
    assert (strategy.prefill_plan == EMPTY_PLAN) == (phase == "decode")
    assert (strategy.decode_plan(1) == EMPTY_PLAN) == strategy.skipped.keeps_kv == (name == "pop")
    if phase == "prefill" and name != "pop":
        assert strategy.decode_plan(1) is strategy.prefill_plan
    if phase == "prefill":
        assert strategy.window_tokens == 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_budget_is_met_exactly(name):
    for layers in range(M - 1):
        assert len(make(name, budget=Budget(layers=layers)).skipped) == 2 * layers


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_budget_is_an_empty_plan(name):
    strategy = make(name, budget=Budget(sublayers=0))
    assert strategy.skipped == EMPTY_PLAN == strategy.decode_plan(5)
    assert strategy.window_tokens == 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_too_large_a_budget_is_refused_at_construction(name):
    with pytest.raises(ValueError, match="allowed for 16 layers"):
        make(name, budget=Budget(sublayers=2 * M))


@pytest.mark.parametrize("name", STRATEGIES)
def test_plans_are_the_same_objects_from_step_to_step(name):
    strategy = make(name)
    assert strategy.decode_plan(7) is strategy.decode_plan(7)
    assert strategy.prefill_plan is strategy.prefill_plan


def test_early_exit_skips_the_last_layers():
    assert make("early_exit").skipped == SkipPlan.of_layers([13, 14, 15])


def test_skipdecode_skips_the_layers_after_the_first():
    assert make("skipdecode", "prefill").skipped == SkipPlan.of_layers([1, 2, 3])


@given(n=st.integers(1, 20), step=st.integers(1, 600), most=st.integers(1, 512))
def test_skipdecode_follows_its_schedule_and_only_grows(n, step, most):
    strategy = SkipDecode(num_layers=32, budget=Budget(layers=n), phase="decode", max_decode_steps=most)
    layers = min(n, math.ceil(Fraction(step, most) * (n - 1)) + 1)
    assert strategy.decode_plan(step) == SkipPlan.of_layers(range(1, layers + 1))
    assert strategy.decode_plan(step).attention <= strategy.decode_plan(step + 1).attention


def test_skipdecode_reaches_all_layers_at_the_last_step():
    strategy = make("skipdecode", "decode", max_decode_steps=128)
    assert len(strategy.decode_plan(1)) == 4  # ceil makes the first step of n > 1 two layers
    assert strategy.decode_plan(128) == strategy.skipped


@pytest.mark.parametrize(
    ("num_layers", "n", "layers"),
    [(32, 4, [1, 9, 17, 25]), (32, 6, [1, 6, 11, 17, 22, 27]), (32, 8, list(range(1, 30, 4))), (16, 2, [1, 9])],
)
def test_unified_skipping_is_the_papers(num_layers, n, layers):
    assert build("unified", phase="e2e", budget=Budget(layers=n), num_layers=num_layers).skipped.ffn == set(layers)


@given(num_layers=st.integers(3, 80), data=st.data())
def test_unified_skipping_is_exactly_n_inner_layers(num_layers, data):
    n = data.draw(st.integers(0, num_layers - 2))
    skipped = build("unified", phase="e2e", budget=Budget(layers=n), num_layers=num_layers).skipped.attention
    assert len(skipped) == n
    assert not skipped & {0, num_layers - 1}


def test_most_and_least_skip_rank_whole_layers():
    assert make("most_skip").skipped == SkipPlan.of_layers([13, 14, 15])
    assert make("least_skip").skipped == SkipPlan.of_layers([0, 1, 2])


def test_adaskip_takes_the_most_similar_sublayers_with_their_scales():
    strategy = make("adaskip", budget=Budget(sublayers=5))
    order = sorted(
        [(a + 0.15, "attention", i) for i, a in enumerate(RISING)] + [(f, "ffn", i) for i, f in enumerate(RISING)]
    )
    expected = {Sublayer(kind, i) for _, kind, i in order[-5:]}
    assert set(strategy.skipped.scales) == expected
    assert set(strategy.skipped.scales.values()) == {1.1}
    assert strategy.beta == pytest.approx(order[-5][0])


def test_adaskip_may_skip_the_first_attention():
    profile = profile_of(attention=[0.99, 0.5, 0.5], ffn=[0.4, 0.4, 0.4])
    strategy = AdaSkip(num_layers=3, budget=Budget(sublayers=1), profile=profile)
    assert strategy.skipped.attention == {0}


def test_adaskip_leaves_one_attention_live():
    profile = profile_of(attention=[0.9, 0.8, 0.7], ffn=[0.1, 0.2, 0.3])
    strategy = AdaSkip(num_layers=3, budget=Budget(sublayers=4), profile=profile)
    assert strategy.skipped.attention == {0, 1}
    assert strategy.skipped.ffn == {2, 1}


def test_adaskip_learns_ffns_above_beta_with_the_windows_scale():
    strategy = make("adaskip", budget=Budget(sublayers=6))
    beta = strategy.beta
    window = {0: FFNSimilarity(beta + 0.01, 1.3), 1: FFNSimilarity(beta, 1.4), 2: FFNSimilarity(beta - 0.01, 1.5)}
    assert strategy.learn(window) == SkipPlan.of_sublayers({Sublayer("ffn", 0): 1.3})


@pytest.mark.parametrize(("quantile", "beta"), [(0, 0.1), (0.5, 0.3), (1, 0.5)])
def test_beta_may_be_a_quantile_of_the_ffns_offline_similarities(quantile, beta):
    profile = profile_of(attention=[0.9] * 5, ffn=[0.5, 0.1, 0.3, 0.4, 0.2])
    strategy = AdaSkip(num_layers=5, budget=Budget(sublayers=1), profile=profile, beta_quantile=quantile)
    assert strategy.beta == pytest.approx(beta)
    window = {0: FFNSimilarity(beta + 0.01, 1.3), 1: FFNSimilarity(beta - 0.01, 1.4)}
    assert strategy.learn(window) == SkipPlan.of_sublayers({Sublayer("ffn", 0): 1.3})


@pytest.mark.parametrize("quantile", [-0.1, 1.5])
def test_a_quantile_outside_of_0_and_1_is_refused(quantile):
    with pytest.raises(ValueError, match=f"beta_quantile must be between 0 and 1; got {quantile}"):
        make("adaskip", beta_quantile=quantile)


def test_adaskip_never_learns_with_an_empty_set():
    strategy = make("adaskip", budget=Budget(sublayers=0))
    assert strategy.learn({0: FFNSimilarity(1.0, 1.0)}) is EMPTY_PLAN


def test_window_may_be_switched_off():
    assert make("adaskip", learning_window=0).window_tokens == 0
    with pytest.raises(ValueError, match="learning_window"):
        make("adaskip", learning_window=-1)


def test_full_model_is_no_strategy():
    assert build("full", phase="e2e", budget=Budget(sublayers=0), num_layers=M) is None
    with pytest.raises(ValueError, match="skips nothing"):
        build("full", phase="e2e", budget=Budget(sublayers=2), num_layers=M)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"Did you mean 'adaskip'\? Available: full, early_exit"):
        make("adaskp")
    with pytest.raises(ValueError, match="unknown phase 'train'"):
        make("early_exit", "train")
    with pytest.raises(ValueError, match="no option beta"):
        make("early_exit", beta=0.5)


def test_missing_or_foreign_profile_is_refused():
    with pytest.raises(ValueError, match="adaskip needs a profile"):
        build("adaskip", phase="e2e", budget=Budget(layers=1), num_layers=M)
    with pytest.raises(ValueError, match="has 16 layers, but the model has 20"):
        make("adaskip", num_layers=20)


def test_names_and_classes_agree():
    assert tuple(NAMES) == (
        "full",
        "early_exit",
        "skipdecode",
        "unified",
        "adaskip",
        "calibrated",
        "block_influence",
        "cosine_window",
        "blockpruner",
        "evopress",
        "pop",
        "most_skip",
        "least_skip",
    )
    assert [name for name in NAMES if needs_profile(name)] == [name for name in NAMES[4:] if name != "pop"]
    assert [name for name in NAMES if selection_method(name)] == [NAMES[5], *NAMES[7:10]]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("early_exit", {"num_layers": 16.0}, "num_layers of strategy early_exit must be a whole number above 0"),
        ("early_exit", {"num_layers": -1}, "num_layers of strategy early_exit must be a whole number above 0"),
        ("early_exit", {"budget": 2}, r"budget of strategy early_exit must be a Budget, e\.g\. Budget\(sublayers=4\)"),
        ("adaskip", {"profile": None}, "profile of strategy adaskip must be of class ImportanceProfile; got NoneType"),
        ("adaskip", {"learning_window": 1.5}, r"learning_window of strategy adaskip must be int; got 1\.5"),
        ("adaskip", {"beta_quantile": "0.5"}, "beta_quantile of strategy adaskip must be float or None; got '0.5'"),
        ("skipdecode", {"max_decode_steps": 512.0}, r"max_decode_steps of strategy skipdecode must be int; got 512\.0"),
    ],
)
def test_values_of_other_types_are_one_clear_line(name, options, message):
    given = {"num_layers": M, "budget": Budget(layers=3), **({"profile": PROFILE} if needs_profile(name) else {})}
    with pytest.raises(ValueError, match=message):
        STRATEGIES[name](**{**given, **options})
