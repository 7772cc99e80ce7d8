"""Ties of a search that are decided by time: the fastest of the sets that do not diverge significantly more."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from adaskip.calibration.divergence import OutputDivergence
from adaskip.calibration.search import SCREENING_PROMPTS, SEARCH, most_measured, search
from adaskip.calibration.select import select
from adaskip.core.plan import SkipPlan, Sublayer
from adaskip.profiles.fields import ProfileError
from adaskip.profiles.selection import SelectionProfile
from adaskip.runs.calibrate_config import CalibrateConfig
from adaskip.runs.loading import find_loading
from adaskip.runs.ties import find_ties
from tests.families import random_model, random_prompts

pytestmark = pytest.mark.usefixtures("short_answers")
LAYERS, PROMPTS = 4, 20
ENDS = {"eos_token_ids": [2], "pad_token_id": 0}
ALL = [Sublayer(kind, layer) for layer in range(LAYERS) for kind in ("attention", "ffn")]
SLOW, FAST, *OTHERS = (frozenset({sublayer}) for sublayer in ALL)


def prefers_ffns(chosen) -> float:
    return 1.0 + sum(sublayer.kind == "ffn" for sublayer in chosen)


def measure_of(means: dict, spread: float):
    """Divergences with these means; those of all but the first set differ by `spread` from prompt to prompt."""

    def measure(chosen, which):
        gap = 0.0 if chosen == next(iter(means)) else spread
        return [means.get(chosen, 3.0 * len(chosen)) + (gap if prompt % 2 else -gap) for prompt in which]

    return measure


def searched(measure, up_to: int = 1, **options):
    return search(measure, ALL, num_layers=LAYERS, num_prompts=PROMPTS, up_to=up_to, **{"starts": {}, **options})


@pytest.mark.parametrize(("spread", "chosen"), [(0.5, FAST), (0.01, SLOW)])
def test_the_faster_set_is_chosen_if_it_does_not_diverge_significantly_more(spread, chosen):
    measure = measure_of({SLOW: 1.0, FAST: 1.1}, spread)
    assert searched(measure)[1].sublayers == SLOW
    found = searched(measure, faster=prefers_ffns)[1]
    assert (found.sublayers, found.found_by) == (chosen, SEARCH)
    assert found.divergence == pytest.approx({SLOW: 1.0, FAST: 1.1}[chosen])


def test_of_equally_fast_sets_the_less_divergent_one_is_chosen():
    measure = measure_of({SLOW: 1.0, FAST: 1.1, OTHERS[1]: 1.05}, spread=0.5)
    assert OTHERS[1] == {Sublayer("ffn", 1)}
    assert searched(measure, faster=prefers_ffns)[1].sublayers == OTHERS[1]


def test_the_search_goes_on_from_the_faster_set():
    measure = measure_of({SLOW: 1.0, FAST: 1.1, SLOW | OTHERS[0]: 1.5}, spread=0.5)
    assert searched(measure, up_to=2)[2].sublayers == SLOW | OTHERS[0]
    assert searched(measure, up_to=2, faster=prefers_ffns)[2].sublayers > FAST


@pytest.mark.parametrize(
    ("usual", "means", "chosen"),
    [
        (SLOW, {SLOW: 1.0, FAST: 1.1}, SEARCH),  # the set found is faster, and not significantly worse
        (OTHERS[1], {SLOW: 1.0, FAST: 1.1, OTHERS[1]: 1.2}, "adaskip"),  # it is as fast
        (OTHERS[1], {SLOW: 1.0, FAST: 1.1, OTHERS[1]: 2.5}, SEARCH),  # it is significantly better
    ],
)
def test_the_default_is_kept_if_none_of_the_ties_is_faster(usual, means, chosen):
    found = searched(
        measure_of(means, spread=0.5), starts={"adaskip": {1: usual}}, default="adaskip", faster=prefers_ffns
    )[1]
    assert (found.found_by, found.sublayers) == (chosen, FAST if chosen == SEARCH else usual)


def test_the_default_that_diverges_significantly_more_than_the_best_set_is_not_kept():
    """Although it does not diverge significantly more than the fastest set that ties with the best one."""
    steps = {SLOW: [0.0, 0.0], FAST: [-0.9, 1.1], OTHERS[1]: [0.1, 0.3]}

    def measure(chosen, which):
        return [1.0 + steps.get(chosen, [2.0, 2.0])[prompt % 2] for prompt in which]

    options = {"starts": {"adaskip": {1: OTHERS[1]}}, "default": "adaskip", "faster": prefers_ffns}
    assert searched(measure, **options)[1].sublayers == FAST


@pytest.mark.parametrize("default", [None, "adaskip"])
@pytest.mark.parametrize("num_prompts", [1, 3, SCREENING_PROMPTS])
def test_sets_that_are_all_as_fast_are_chosen_as_without_times(num_prompts, default):
    """With so few prompts, no comparison ends early."""
    for seed in range(20):
        rng = random.Random(seed)
        starts = {"adaskip": {count: frozenset(rng.sample(ALL[:5], count)) for count in (1, 2, 3)}}

        def measure(chosen, which, seed=seed):
            return [random.Random(f"{seed} {sorted(chosen)} {prompt}").random() for prompt in which]

        options = {"num_layers": LAYERS, "num_prompts": num_prompts, "up_to": 3, "starts": starts, "default": default}
        assert search(measure, ALL, **options, faster=lambda chosen: 1.0) == search(measure, ALL, **options)


def test_a_set_that_overflows_is_not_chosen_for_its_speed():
    measure = measure_of({SLOW: 1.0, FAST: float("inf")}, spread=2.0)
    assert searched(measure, faster=lambda chosen: float(chosen == FAST))[1].sublayers != FAST


@pytest.mark.parametrize("num_prompts", [3, 6])
def test_no_contender_is_dropped_and_no_more_is_measured_than_foretold(num_prompts):
    asked = set()

    def measure(chosen, which):
        asked.update((chosen, prompt) for prompt in which)
        return [float(ALL.index(next(iter(chosen))))] * len(which)  # most are dropped without times

    options = {"num_layers": LAYERS, "num_prompts": num_prompts, "up_to": 1, "starts": {}}
    search(measure, ALL, **options, faster=prefers_ffns)
    assert len(asked) == most_measured(len(ALL), num_prompts, [0])


@pytest.fixture(scope="module")
def model():
    return random_model("llama")


def by_ffns(plan: SkipPlan) -> float:
    return 1.0 + len(plan.ffn)


def test_a_selection_by_time_records_it_and_its_measurements_serve_a_plain_search(model, tmp_path, monkeypatch):
    prompts, described = random_prompts([9, 14, 11, 8, 10]), {"faster_at": 64, "tflops": 0.5}
    options = {"up_to": 3, "progress_path": tmp_path / "partial.jsonl", **ENDS}
    same = select(model, prompts, "e2e", **options, faster=lambda plan: 1.0, settings=described)
    profile = SelectionProfile.load(same.save(tmp_path / "selection.json"), model)
    assert profile.settings == described
    monkeypatch.setattr(OutputDivergence, "__call__", lambda *args: pytest.fail("measured again"))
    plain = select(model, prompts, "e2e", **options)
    assert plain.settings == {}
    assert replace(same, settings={}, cost=plain.cost) == plain


def test_kept_kv_is_part_of_the_plans_that_are_compared(model):
    for keep_kv in (False, True):
        seen = []
        faster = lambda plan, seen=seen: (seen.append(plan), by_ffns(plan))[1]  # noqa: E731
        select(model, random_prompts([9, 14]), "prefill", up_to=1, keep_kv=keep_kv, faster=faster, **ENDS)
        assert {plan.keeps_kv for plan in seen} == {keep_kv}


def test_impossible_requests_are_refused_before_anything_is_measured(model, monkeypatch):
    monkeypatch.setattr("adaskip.calibration.select.calibrate", lambda *args, **kwargs: pytest.fail("measured"))
    options = {"up_to": 2, "faster": by_ffns, **ENDS}
    with pytest.raises(ValueError, match="faster decides ties of method search; got method cosine_window"):
        select(model, random_prompts([9]), "e2e", method="cosine_window", **options)
    with pytest.raises(ProfileError, match="setting faster_at must be a number; got 'long'"):
        select(model, random_prompts([9]), "e2e", settings={"faster_at": "long"}, **options)
    with pytest.raises(ValueError, match="method search has no setting faster_at"):
        select(model, random_prompts([9]), "e2e", settings={"faster_at": 64}, **options | {"faster": None})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--faster-at 64 needs --select and --method search"),
        ({"select": "decode", "method": "evopress"}, "--faster-at 64 needs --select and --method search"),
        ({"select": "decode", "faster_at": 0}, "--faster-at must be at least 1, not 0"),
        ({"select": "decode", "speedup_on": "L2"}, "unknown device 'L2'. Did you mean 'L20'"),
        ({"select": "decode", "faster_at": None, "speedup_on": "L20"}, "--speedup-on L20 needs --faster-at"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        CalibrateConfig(model="smollm2", **{"faster_at": 64, **given})


@pytest.mark.parametrize(("phase", "answer"), [("prefill", 1), ("decode", 128), ("e2e", 128)])
def test_the_answers_have_the_cap_of_the_phase_and_fit_the_positions(phase, answer):
    longest = 8192 - answer + 1
    config = CalibrateConfig(model="smollm2", select=phase, faster_at=longest)
    loading = find_loading(config, "smollm2")
    ties = find_ties(config, loading)
    assert (ties.request.prompt_tokens, ties.request.new_tokens) == (longest, answer)
    with pytest.raises(ValueError, match=f"--faster-at {longest + 1}, .* needs 8193 positions; the model has 8192"):
        find_ties(replace(config, faster_at=longest + 1), loading)
