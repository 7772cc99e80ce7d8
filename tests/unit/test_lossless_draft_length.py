"""What drafting earns, against simulation; and the adaptive draft length."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip.speculative.draft_length import (
    MAX_DRAFT,
    PROBE_EVERY,
    AdaptiveDraftLength,
    best_draft_length,
    break_even_acceptance,
    expected_speedup,
    expected_tokens,
)
from adaskip.speculative.statistics import DraftStatistics

RATES = st.floats(0.0, 1.0)


def simulated_round(acceptance, drafted, draw):
    """Tokens of one round: those accepted up to the first rejection, and the full model's own."""
    accepted = 0
    while accepted < drafted and draw() < acceptance:
        accepted += 1
    return accepted + 1


@pytest.mark.parametrize(("acceptance", "drafted"), [(0.3, 1), (0.8, 4), (0.95, 8)])
def test_expected_tokens_are_what_a_simulation_gives(acceptance, drafted):
    draw = random.Random(0).random
    mean = sum(simulated_round(acceptance, drafted, draw) for _ in range(20000)) / 20000
    assert mean == pytest.approx(expected_tokens(acceptance, drafted), rel=0.01)
    closed_form = (1 - acceptance ** (drafted + 1)) / (1 - acceptance)
    assert expected_tokens(acceptance, drafted) == pytest.approx(closed_form)
    assert expected_tokens(1.0, drafted) == drafted + 1


@given(acceptance=RATES, draft_cost=st.floats(0.01, 1.5))
def test_drafting_pays_exactly_when_the_acceptance_is_above_the_cost(acceptance, draft_cost):
    length = best_draft_length(acceptance, draft_cost, MAX_DRAFT)
    if acceptance > draft_cost * (1 + 1e-9):
        assert length >= 1
    if acceptance < draft_cost * (1 - 1e-9):
        assert length == 0
    speedups = [expected_speedup(acceptance, drafted, draft_cost) for drafted in range(MAX_DRAFT + 1)]
    assert speedups[length] == max(speedups)


@given(draft_cost=st.floats(0.01, 0.999), drafted=st.integers(1, 12))
def test_break_even_is_where_the_speedup_is_one(draft_cost, drafted):
    acceptance = break_even_acceptance(draft_cost, drafted)
    assert expected_speedup(acceptance, drafted, draft_cost) == pytest.approx(1.0, abs=1e-6)
    assert acceptance >= draft_cost - 1e-9
    if drafted == 1:
        assert acceptance == pytest.approx(draft_cost, abs=1e-9)


def test_no_acceptance_breaks_even_when_a_draft_costs_more_than_a_step():
    assert break_even_acceptance(1.01) is None


def run(length, acceptance, rounds, seed=0):
    draw = random.Random(seed).random
    lengths = []
    for _ in range(rounds):
        lengths.append(length.next())
        accepted = simulated_round(acceptance, lengths[-1], draw) - 1
        length.add(accepted, min(accepted + 1, lengths[-1]))
    return lengths


@pytest.mark.parametrize("acceptance", [0.7, 0.9, 0.98])
def test_the_length_settles_at_the_best_one(acceptance):
    lengths = run(AdaptiveDraftLength(draft_cost=0.5), acceptance, 2000)[100:]
    best = best_draft_length(acceptance, 0.5, MAX_DRAFT)
    assert abs(sum(lengths) / len(lengths) - best) < 0.75


def test_a_useless_draft_is_given_up_but_for_a_probe_and_taken_up_again():
    length = AdaptiveDraftLength(draft_cost=0.6)
    useless = run(length, 0.0, 200)[40:]
    assert set(useless) == {0, 1}
    assert useless.count(1) == len(useless) // PROBE_EVERY
    useful = run(length, 1.0, 1000)
    assert useful[-1] == MAX_DRAFT


def test_a_draft_as_dear_as_the_full_model_is_never_made():
    assert set(run(AdaptiveDraftLength(draft_cost=1.0), 1.0, PROBE_EVERY - 1)) == {0}


def test_statistics_add_up():
    total = DraftStatistics()
    assert total.acceptance_rate is None
    assert total.tokens_per_verify is None
    for _ in range(2):
        total += DraftStatistics(requests=1, new_tokens=6, verify_forwards=2, accepted=3, judged=4, draft_s=0.5)
    assert (total.requests, total.acceptance_rate, total.tokens_per_verify, total.draft_s) == (2, 0.75, 3.0, 1.0)
