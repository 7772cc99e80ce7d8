"""Skip plans and budgets."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip.core.plan import Budget, SkipPlan, Sublayer


def test_plan_is_frozen_and_hashable():
    plan = SkipPlan.of_sublayers({Sublayer("ffn", 3): 1.2})
    with pytest.raises(AttributeError):
        plan.ffn = frozenset()
    with pytest.raises(TypeError):
        plan.scales[Sublayer("ffn", 3)] = 2.0
    assert {plan, SkipPlan(ffn={3}, scales={("ffn", 3): 1.2})} == {plan}


def test_plan_survives_copy_and_pickle():
    plan = SkipPlan.of_sublayers({Sublayer("attention", 0): 1.2, Sublayer("ffn", 3): 0.9})
    assert copy.deepcopy(plan) == plan == pickle.loads(pickle.dumps(plan))


def test_whole_layers_count_twice_and_have_no_scale():
    plan = SkipPlan.of_layers([2, 5])
    assert len(plan) == 4
    assert plan.scale("ffn", 5) == 1.0
    assert Sublayer("attention", 2) in plan
    assert Sublayer("attention", 3) not in plan
    assert plan.to_dict() == {"attention": [2, 5], "ffn": [2, 5]}


def test_union_keeps_the_first_plans_scales():
    first = SkipPlan.of_sublayers({Sublayer("ffn", 1): 1.5})
    second = SkipPlan.of_sublayers({Sublayer("ffn", 1): 2.0, Sublayer("attention", 0): 3.0})
    both = first.union(second)
    assert both.scale("ffn", 1) == 1.5
    assert both.scale("attention", 0) == 3.0
    assert both.attention_only() == SkipPlan({0}, scales={("attention", 0): 3.0})


def test_union_keeps_a_sublayer_of_the_first_plan_that_has_no_scale_without_one():
    both = SkipPlan({1}, {2}).union(SkipPlan({1}, {2, 3}, {("attention", 1): 0.5, ("ffn", 2): 0.5, ("ffn", 3): 0.5}))
    assert (both.scale("attention", 1), both.scale("ffn", 2), both.scale("ffn", 3)) == (1.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": 3}, "attention of a plan must be the indices of layers"),
        ({"ffn": "12"}, "ffn of a plan must be the indices of layers"),
        ({"scales": None}, "scales of a plan must map sublayers to factors"),
        ({"attention": {1}, "scales": {("attention", 1.0): 0.5}}, "a layer's index must be a whole number"),
    ],
)
def test_a_plan_of_other_types_is_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        SkipPlan(**options)


def test_scale_of_a_sublayer_that_is_not_skipped_is_refused():
    with pytest.raises(ValueError, match="not skipped"):
        SkipPlan(attention={1}, scales={Sublayer("ffn", 1): 1.0})


@pytest.mark.parametrize(
    ("plan", "message"),
    [(SkipPlan.of_layers([4]), r"layers 0\.\.3"), (SkipPlan(attention=range(4)), "at least one must stay live")],
)
def test_plan_that_does_not_fit_is_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        plan.check_fits(4)


def test_negative_layer_is_refused():
    with pytest.raises(ValueError, match="start at 0"):
        SkipPlan(attention={-1})


@pytest.mark.parametrize(("alpha", "sublayers"), [(1.14, 8), (1.33, 16), (1.0, 0)])
def test_acceleration_ratio_gives_the_papers_budgets(alpha, sublayers):
    assert Budget(alpha=alpha).num_sublayers(32) == sublayers
    assert Budget(alpha=alpha).num_whole_layers(32, most=31) == sublayers // 2


@given(layers=st.integers(0, 31))
def test_units_agree(layers):
    assert Budget(layers=layers).num_sublayers(32) == 2 * layers
    assert Budget(sublayers=2 * layers).num_whole_layers(32, most=31) == layers
    assert Budget(alpha=32 / (32 - layers)).num_whole_layers(32, most=31) == layers


NO_NUMBERS = [math.inf, -math.inf, math.nan, True, "2", [2], 1j]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "exactly one"),
        ({"layers": 1, "alpha": 1.1}, "exactly one"),
        ({"sublayers": -1}, "at least 0; got -1"),
        ({"sublayers": 1.5}, "whole number"),
        ({"alpha": 0.9}, r"at least 1\.0 and finite; got 0\.9"),
        *(({unit: value}, "whole number|finite") for unit in ("sublayers", "alpha") for value in NO_NUMBERS),
    ],
)
def test_impossible_budget_is_refused(budget, message):
    with pytest.raises(ValueError, match=message):
        Budget(**budget)


def test_too_large_a_budget_names_the_allowed_range():
    with pytest.raises(ValueError, match=r"65 sublayers.*allowed for 32 layers: 0\.\.63"):
        Budget(sublayers=65).num_sublayers(32)
    with pytest.raises(ValueError, match=r"0\.\.30 layers = 0\.\.60 sublayers"):
        Budget(layers=31).num_whole_layers(32, most=30)
    with pytest.raises(ValueError, match="even number of sublayers; got 7"):
        Budget(sublayers=7).num_whole_layers(32, most=31)
