"""A plan's file gives back the very plan, scales included."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip.core.plan import Affine, SkipPlan, Sublayer

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
AFFINE = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4).map(
    lambda pairs: Affine(*zip(*pairs, strict=True))
)
KEYS = st.builds(Sublayer, st.sampled_from(["attention", "ffn"]), st.integers(0, 40))
PLANS = st.builds(
    lambda scaled, plain: SkipPlan.of_sublayers(scaled).union(SkipPlan(attention=plain, ffn={i + 1 for i in plain})),
    st.dictionaries(KEYS, NUMBERS | AFFINE, max_size=6),
    st.sets(st.integers(0, 40), max_size=3),
)
PLAN = SkipPlan({1, 10, 2}, {3}, {("attention", 10): 0.1 + 0.2, ("ffn", 3): Affine((1.0, 0.9), (0.0, -1e-30))})


@given(plan=PLANS)
def test_a_plan_survives_its_dictionary_as_json_exactly(plan):
    assert SkipPlan.from_dict(json.loads(json.dumps(plan.to_dict(scales=True)))) == plan


def test_a_plan_survives_its_file_exactly(tmp_path):
    path = PLAN.save(tmp_path / "made" / "plan.json")
    assert SkipPlan.load(path) == PLAN
    assert hash(SkipPlan.load(path)) == hash(PLAN)
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_records_of_runs_have_the_two_sets_only():
    assert PLAN.to_dict() == {"attention": [1, 2, 10], "ffn": [3]}
    with pytest.raises(ValueError, match="fields attention, ffn and scales"):
        SkipPlan.from_dict(PLAN.to_dict())


CHANGES = [
    *[{"format": value} for value in (None, "other", 3)],
    *[{"attention": value} for value in (None, 3, "12", {"1": 1}, [1, None], ["1"], [1.0], [True], [-1])],
    *[{"ffn": value} for value in ([], [2])],
    *[{"scales": value} for value in (None, [], {}, {"attention": {}}, {"attention": {}, "ffn": {}, "mlp": {}})],
    *[{"scales": {"attention": [], "ffn": {"3": value}}} for value in (1.0,)],
    *[
        {"scales": {"attention": {}, "ffn": {"3": value}}}
        for value in (None, "1", True, [1.0], math.nan, math.inf, {}, {"scale": [1.0]}, {"scale": [1.0], "shift": []})
    ],
    *[{"scales": {"attention": {}, "ffn": {"3": {"scale": [v], "shift": [0.0]}}}} for v in (None, "1", math.nan, True)],
    *[{"scales": {"attention": {}, "ffn": {"3": {"scale": v, "shift": [0.0]}}}} for v in (None, "1", 1.0)],
    *[{"scales": {"attention": {}, "ffn": {key: 1.0}}} for key in ("4", "-3", "x", "03", "3.0", "")],
    {"more": 1},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_malformed_plan_is_one_clear_line(change, tmp_path):
    path = PLAN.save(tmp_path / "plan.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=r"is not a (whole )?skip plan: ") as error:
        SkipPlan.load(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{", b"3", b"null", b"[]", b"[" * 100_000])
def test_what_is_no_plan_at_all_is_one_clear_line(content, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not") as error:
        SkipPlan.load(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, "1.0", True, None])
def test_a_scale_that_is_no_finite_number_is_refused(scale):
    with pytest.raises(ValueError, match="must be a finite number"):
        SkipPlan(ffn={1}, scales={("ffn", 1): scale})
    with pytest.raises(ValueError, match="must be a finite number"):
        Affine((scale,), (0.0,))


@pytest.mark.parametrize("layer", [1.0, "1", True, None])
def test_a_layer_that_is_no_whole_number_is_refused(layer):
    with pytest.raises(ValueError, match="must be a whole number"):
        SkipPlan(attention=[layer])


def test_an_unknown_kind_of_sublayer_is_refused():
    with pytest.raises(ValueError, match="kinds of sublayers are attention, ffn"):
        SkipPlan(ffn={1}, scales={("mlp", 1): 1.0})
