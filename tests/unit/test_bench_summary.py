"""From rounds to what is reported: every ratio and reference counted by hand."""

from __future__ import annotations

import pytest

from adaskip.studies.bench.results import WINDOW_STEPS, entries_of, ideal_share, ratio, realised, window_cost
from adaskip.studies.bench.settings import (
    BREAKDOWN,
    COMPILED,
    MEASURING_PREFILL,
    PATCHED,
    PLAIN_PREFILL,
    WINDOWLESS,
    Cell,
    Workload,
)
from tests.saved_benchmarks import add, add_failure, generation, result_of

WORKLOAD = Workload(prompt_tokens=8, new_tokens=4, batch_size=2)
FULL, OURS = Cell("full"), Cell("adaskip", "e2e", 1)
SHAPE = {"model": "llama", "num_layers": 2, "parameters": 10}


@pytest.fixture
def strategies(tmp_path):
    return result_of(tmp_path, "some", "strategies", SHAPE)


def test_a_ratio_is_the_median_of_the_rounds_own_ratios(strategies):
    add(strategies, WORKLOAD, FULL, [generation(t, [0.1]) for t in (1.0, 1.2, 0.9)])
    add(strategies, WORKLOAD, OURS, [generation(t, [0.1]) for t in (0.5, 0.8, 0.9)])
    estimate = ratio(strategies, WORKLOAD, FULL, OURS, "prefill")  # 2.0, 1.5, 1.0
    assert estimate.value == pytest.approx(1.5)
    assert (estimate.low, estimate.high) == (pytest.approx(1.0), pytest.approx(2.0))


def test_decode_is_compared_by_the_mean_of_its_steps(strategies):
    add(strategies, WORKLOAD, FULL, [generation(1.0, [0.1, 0.1, 0.4])])
    add(strategies, WORKLOAD, OURS, [generation(1.0, [0.1, 0.1, 0.1])])
    assert ratio(strategies, WORKLOAD, FULL, OURS, "decode").value == pytest.approx(2.0)


def test_ideal_is_the_full_models_time_less_the_skipped_sublayers_own(strategies):
    shares = {
        "prefill_shares": {"attention": [0.0, 1.0], "ffn": [0.0, 0.0]},
        "decode_shares": {"attention": [0.0, 0.5], "ffn": [1.0, 0.0]},  # SkipDecode skips some in some steps only
    }
    timed = {
        "prefill_sublayers_s": {"attention": [0.1, 0.2], "ffn": [0.3, 0.1]},
        "decode_sublayers_s": {"attention": [0.01, 0.02], "ffn": [0.03, 0.01]},
    }
    add(strategies, WORKLOAD, FULL, [generation(1.0, [0.2, 0.2, 0.2])])
    add(strategies, WORKLOAD, Cell(BREAKDOWN), [generation(1.0, [0.1, 0.1, 0.4], **timed)])
    add(strategies, WORKLOAD, OURS, [generation(0.9, [0.14, 0.14, 0.14], **shares)])
    assert ideal_share(strategies, WORKLOAD, OURS, "prefill") == pytest.approx(0.2 / 1.0)
    assert ideal_share(strategies, WORKLOAD, OURS, "decode") == pytest.approx((0.5 * 0.02 + 0.03) / 0.1)  # median step
    full, ours = entries_of(strategies)  # and none of the breakdown
    assert (ours["ideal_ttft_s"], ours["ideal_tpot_s"]) == (pytest.approx(0.8), pytest.approx(0.2 * 0.6))
    assert ours["realised_prefill"] == pytest.approx((1 - 0.9) / 0.2)
    assert ours["realised_decode"] == pytest.approx((1 - 0.7) / 0.4)
    assert full["realised_prefill"] is None


def test_ideal_is_unknown_without_a_breakdown_and_for_compiled_steps(strategies):
    compiled = Cell("adaskip", "e2e", 1, COMPILED)
    for cell in (FULL, Cell("full", mode=COMPILED), OURS, compiled):
        add(strategies, WORKLOAD, cell, [generation(1.0, [0.1])])
    assert entries_of(strategies)[-1]["ideal_tpot_s"] is None
    sublayers = {"prefill_sublayers_s": {"attention": [0.1, 0.1], "ffn": [0.1, 0.1]}}
    add(strategies, WORKLOAD, Cell(BREAKDOWN), [generation(1.0, [0.1], **sublayers)])
    assert ideal_share(strategies, WORKLOAD, compiled, "prefill") is None
    assert ideal_share(strategies, WORKLOAD, OURS, "prefill") == 0.0  # nothing is told to be skipped
    assert realised(strategies, WORKLOAD, OURS, "prefill") is None


def test_entries_hold_medians_and_put_the_full_model_first(strategies):
    add(strategies, WORKLOAD, OURS, [generation(t, [0.05, 0.05, 0.05]) for t in (0.5, 0.8, 0.9)])
    add(strategies, WORKLOAD, FULL, [generation(t, [0.1, 0.1, 0.1]) for t in (1.0, 1.2, 0.9)])
    about = {"workload": vars(WORKLOAD), "cell": vars(OURS)}
    strategies.limits.append({**about, "ttft_s": 0.4, "tpot_s": 0.02})
    full, ours = entries_of(strategies)
    assert (full["strategy"], full["speedup_prefill"], full["limit_ttft_s"]) == ("full", 1.0, None)
    assert (ours["strategy"], ours["phase"], ours["budget"], ours["rounds"]) == ("adaskip", "e2e", 1, 3)
    assert ours["ttft_s"] == 0.8
    assert ours["prefill_tokens_per_s"] == pytest.approx(2 * 8 / 0.8)
    assert ours["decode_tokens_per_s"] == pytest.approx(2 / 0.05)
    assert ours["speedup_prefill"] == pytest.approx(1.5)
    assert ours["speedup_decode_interval"] == [pytest.approx(2.0), pytest.approx(2.0)]
    assert (ours["limit_ttft_s"], ours["limit_tpot_s"]) == (0.4, 0.02)


def test_whole_rounds_before_memory_ran_out_are_entries_like_any_other(strategies):
    for cell in (FULL, OURS):
        add(strategies, WORKLOAD, cell, [generation(1.0, [0.1])])
    add_failure(strategies, WORKLOAD, OURS, 2)
    add_failure(strategies, Workload(16, 4), FULL)
    assert [(e["strategy"], e["rounds"]) for e in entries_of(strategies)] == [("full", 1), ("adaskip", 1)]


def test_patched_over_stock_is_the_ratio_of_their_times(tmp_path):
    result = result_of(tmp_path, "overhead", "overhead", SHAPE)
    add(result, WORKLOAD, FULL, [generation(1.0, [0.1, 0.1]), generation(2.0, [0.1, 0.1])])
    add(result, WORKLOAD, Cell(PATCHED), [generation(1.01, [0.1, 0.12]), generation(2.06, [0.1, 0.1])])
    assert ratio(result, WORKLOAD, Cell(PATCHED), FULL, "prefill").value == pytest.approx((1.01 + 1.03) / 2)
    assert ratio(result, WORKLOAD, Cell(PATCHED), FULL, "decode").value == pytest.approx((1.1 + 1.0) / 2)


def window_result(folder, steps: int, added: float, noise: float = 0.0):
    """21 steps that take `added` longer with the window, and `noise` in what follows."""
    result, work = result_of(folder, "window", "window", SHAPE), Workload(8, steps + 1)
    plain, ours = [0.01] * steps, ([0.01 + added] * WINDOW_STEPS + [0.01 + noise] * steps)[:steps]
    add(result, work, Cell(WINDOWLESS, "decode", 2), [generation(1.0, plain)] * 2)
    add(result, work, Cell("adaskip", "decode", 2), [generation(1.0, ours)] * 2)
    return result, work, Cell("adaskip", "decode", 2)


@pytest.mark.parametrize("noise", [0.0, 5.0])
def test_the_windows_cost_is_what_its_steps_add_to_a_generation_of_256_tokens(tmp_path, noise):
    cost = window_cost(*window_result(tmp_path, 30, 0.002, noise))
    assert cost.value == pytest.approx(21 * 0.002 / (255 * 0.01))


def test_the_windows_cost_needs_the_steps_in_which_it_shows(tmp_path):
    assert WINDOW_STEPS == 21
    assert window_cost(*window_result(tmp_path, 21, 0.002)).value == pytest.approx(0.042 / 2.55)
    assert window_cost(*window_result(tmp_path, 20, 0.002)) is None


def test_calibration_is_held_against_the_plain_prefill_of_its_round(tmp_path):
    result = result_of(tmp_path, "calibration", "calibration", SHAPE)
    add(result, WORKLOAD, Cell(PLAIN_PREFILL), [{"prefill_s": t} for t in (1.0, 2.0, 4.0)])
    add(result, WORKLOAD, Cell(MEASURING_PREFILL), [{"prefill_s": t} for t in (1.0, 2.02, 4.4)])
    assert ratio(result, WORKLOAD, Cell(MEASURING_PREFILL), Cell(PLAIN_PREFILL)).value == pytest.approx(1.01)
