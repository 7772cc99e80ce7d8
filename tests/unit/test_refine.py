"""Scales of a finished selection that are adjusted to one another."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest

from adaskip import refine_scales
from adaskip.calibration import refine
from adaskip.calibration.divergence import OutputDivergence
from adaskip.calibration.refine import SPREADS, STEPS, refined_scales
from adaskip.calibration.search import SCREENING_PROMPTS
from adaskip.calibration.select import select
from adaskip.core.plan import KINDS, Sublayer
from adaskip.profiles.fields import ProfileError
from adaskip.runs.calibrate_config import CalibrateConfig
from tests.families import random_model, random_prompts

pytestmark = pytest.mark.usefixtures("short_answers")
ENDS = {"eos_token_ids": [2], "pad_token_id": 0}
PROMPTS = random_prompts([9, 14, 11, 8, 10, 9])
BEST = {Sublayer("attention", 1): 1.08, Sublayer("ffn", 2): 0.92, Sublayer("ffn", 0): 1.0}
ONES = dict.fromkeys(BEST, 1.0)


def distance(number: int, asked: list):
    """A measure that is least at BEST, with a different size on each of `number` prompts."""

    def measure(scales, which):
        asked.append((scales, list(which)))
        return [sum((1 + i / number) * (scales[s] - best) ** 2 for s, best in BEST.items()) for i in which]

    return measure


def test_every_scale_goes_where_the_divergence_is_least():
    asked = []
    scales, divergence = refined_scales(distance(6, asked), ONES, 6)
    assert scales == pytest.approx(BEST)
    assert divergence == pytest.approx(0, abs=1e-9)
    whole, single = asked[: 1 + len(SPREADS)], asked[1 + len(SPREADS) :]
    assert [which for _, which in whole] == [list(range(6))] * len(whole)
    screened = [which for _, which in single if which[0] == 0]
    confirmed = [which for _, which in single if which[0] != 0]
    assert screened == [list(range(SCREENING_PROMPTS))] * len(screened)
    assert confirmed == [list(range(SCREENING_PROMPTS, 6))] * 2  # the two changes that are better when screened
    assert len(screened) <= 2 * len(STEPS) * len(BEST)


def test_scales_that_are_all_too_far_from_1_move_together():
    far = {sublayer: 1 + (scale - 1) / 0.7 for sublayer, scale in BEST.items()}
    scales, divergence = refined_scales(distance(6, []), far, 6)
    assert scales == pytest.approx(BEST)
    assert divergence == pytest.approx(0, abs=1e-9)


def test_a_change_that_is_worse_on_the_other_prompts_is_not_kept():
    def measure(scales, which):
        return [abs(scales[Sublayer("ffn", 2)] - (0.92 if i < SCREENING_PROMPTS else 1.0)) * 10 for i in which]

    assert refined_scales(measure, ONES, 12) == (ONES, pytest.approx(4 * 0.8 / 12))


def test_scales_that_are_not_significantly_better_are_left():
    def measure(scales, which):  # lower in the mean, by one prompt alone
        return [1.0 - (abs(scales[Sublayer("ffn", 0)] - 1.0) if i == 0 else 0.0) for i in which]

    assert refined_scales(measure, ONES, 8) == (ONES, 1.0)


@pytest.fixture(scope="module")
def model():
    return random_model("llama", 4)


@pytest.fixture(scope="module")
def selection(model):
    """With scales that are all too large."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("adaskip.calibration.divergence.ANSWER_TOKENS", 12)
        made = select(model, PROMPTS, "decode", up_to=3, data_ids=["a", "b"], **ENDS)
    enlarged = {
        count: replace(chosen, **{kind: {i: 1.4 * s for i, s in getattr(chosen, kind).items()} for kind in KINDS})
        for count, chosen in made.selected.items()
    }
    return replace(made, selected=enlarged)


def scaled(chosen):
    """The same set with other scales."""
    return replace(
        chosen,
        attention={i: 1.01 * s for i, s in chosen.attention.items()},
        ffn={i: 1.01 * s for i, s in chosen.ffn.items()},
    )


def test_the_sets_stay_and_diverge_less_as_recorded(model, selection):
    refined = refine_scales(model, selection, PROMPTS, [2, 3], data_ids=["b", "c"], **ENDS)
    divergence = OutputDivergence(model, PROMPTS, "decode", **ENDS)
    assert refined.selected[1] == selection.selected[1]
    for count in (2, 3):
        before, after = selection.selected[count], refined.selected[count]
        assert after.plan.sublayers == before.plan.sublayers
        assert after.found_by == before.found_by
        assert after.divergence == pytest.approx(fmean(divergence(after.plan)), rel=1e-4)
        assert after.divergence < 0.98 * fmean(divergence(before.plan))
    assert {**refined.settings, "refined_from": None} == {"refined_2": 1.0, "refined_3": 1.0, "refined_from": None}
    assert refined.data_ids == ("a", "b", "c")
    assert refined.cost.num_forwards > selection.cost.num_forwards
    assert refined.cost.adaskip_seconds == selection.cost.adaskip_seconds


def test_sets_that_keep_the_kv_are_refined_for_that(model):
    kept = select(model, PROMPTS, "prefill", up_to=2, keep_kv=True, **ENDS)
    refined = refine_scales(model, kept, PROMPTS, [2], **ENDS)
    divergence = OutputDivergence(model, PROMPTS, "prefill", keep_kv=True, **ENDS)
    assert refined.keep_kv
    assert refined.selected[2].divergence == pytest.approx(fmean(divergence(refined.selected[2].plan)), rel=1e-4)


def test_a_stopped_refinement_goes_on_after_its_last_set(model, selection, tmp_path, monkeypatch):
    path, sizes = tmp_path / "refined.json", []
    whole = refine_scales(model, selection, PROMPTS, [2, 3], **ENDS)

    def counted(measure, scales, number):
        sizes.append(len(scales))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return refined_scales(measure, scales, number)

    monkeypatch.setattr(refine, "refined_scales", counted)
    with pytest.raises(KeyboardInterrupt):
        refine_scales(model, selection, PROMPTS, [2, 3], path=path, **ENDS)
    again = refine_scales(model, selection, PROMPTS, [2, 3], path=path, **ENDS)
    assert sizes == [2, 3, 3]
    assert again.selected == whole.selected
    monkeypatch.setattr(refine, "OutputDivergence", None)
    assert refine_scales(model, selection, PROMPTS, [3, 2], path=path, **ENDS) == again  # nothing is left to do
    others = {
        "phase": (replace(selection, phase="e2e"), PROMPTS),
        "prompts": (selection, [PROMPTS[0][:-1], *PROMPTS[1:]]),
        "scales": (replace(selection, selected={**selection.selected, 1: scaled(selection.selected[1])}), PROMPTS),
    }
    for other, prompts in others.values():
        with pytest.raises(
            ValueError,
            match=r"refined\.json holds a refinement of another selection or on other prompts",
        ):
            refine_scales(model, other, prompts, [2], path=path, **ENDS)


def test_impossible_requests_are_refused_before_anything_is_measured(model, selection, monkeypatch):
    monkeypatch.setattr(refine, "OutputDivergence", None)
    with pytest.raises(ValueError, match="the selection has no set of 5 sublayers; it has 1, 2, 3"):
        refine_scales(model, selection, PROMPTS, [2, 5], **ENDS)
    with pytest.raises(ValueError, match="set of 2 sublayers are refined already; leave it out"):
        refine_scales(model, replace(selection, settings={"refined_2": 1.0}), PROMPTS, [3, 2], **ENDS)
    with pytest.raises(ValueError, match="in sets of method search; got a selection of method evopress"):
        refine_scales(model, replace(selection, method="evopress"), PROMPTS, [2], **ENDS)
    with pytest.raises(ProfileError, match="weights"):
        refine_scales(random_model("llama", 4, seed=1), selection, PROMPTS, [2], **ENDS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--refine sets.json needs --output"),
        ({"output": "new.json", "select": "decode"}, "leave out --select and --effort"),
        ({"output": "new.json", "effort": 0.5}, "leave out --select and --effort"),
        ({"output": "new.json", "up_to": 8}, "--up-to 8 needs --select"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        CalibrateConfig(model="smollm2", refine="sets.json", **given)
