"""The bars: each figure is found in the results that have it, held against its bound, and named like no other."""

from __future__ import annotations

import pytest

from adaskip.common.configs import load_yaml
from adaskip.common.intervals import Estimate
from adaskip.studies.bench.bars import (
    INFORMATION,
    MET,
    MISSED,
    NEEDS_GPU,
    NO_MEMORY,
    PARAMETERS_8B,
    TOO_SHORT,
    Row,
    bars_markdown,
    rows_of,
    verdict,
)
from adaskip.studies.bench.settings import COMPILED, EAGER, MEASURING_PREFILL, PLAIN_PREFILL, WINDOWLESS, Cell, Workload
from tests.saved_benchmarks import (
    GPU,
    INTERNLM,
    LLAMA_8B,
    add,
    add_failure,
    add_kv,
    add_overhead,
    add_strategies,
    generation,
    kv_check,
    result_of,
)

SHORT, LONG = Workload(512, 25), Workload(8000, 25)
BOTH = (EAGER, COMPILED)


def of(rows: list[Row], figure: str) -> dict[str, Row]:
    """The rows of a figure that have a number, by what they are about."""
    found = [row for row in rows if row.figure.startswith(f"{figure}: ")]
    by_about = {row.figure.removeprefix(f"{figure}: "): row for row in found}
    assert len(by_about) == len(found)
    return by_about


def bare(rows: list[Row], figure: str) -> list[str]:
    """The verdicts of the rows of a figure without a number."""
    return [row.verdict for row in rows if row.figure == figure]


@pytest.mark.parametrize(
    ("bar", "measured", "expected"),
    [
        ({"at_most": 1.01}, Estimate(1.005), MET),
        ({"at_most": 1.01}, Estimate(1.01), MET),
        ({"at_most": 1.01}, Estimate(1.02), MISSED),
        ({"at_most": 1.01}, Estimate(1.005, 0.99, 1.02), f"{MET} (the interval includes the bar)"),
        ({"at_most": 1.01}, Estimate(1.015, 1.0, 1.02), f"{MISSED} (the interval includes the bar)"),
        ({"at_most": 1.01}, Estimate(1.005, 1.0, 1.01), MET),
        ({"at_least": 1.5}, Estimate(1.5), MET),
        ({"at_least": 1.5}, Estimate(1.4, 1.3, 1.45), MISSED),
        ({"at_least": 1.5}, Estimate(2.0, 1.9, 2.1), MET),
        ({"at_least": 0.9, "ideal": 1.0}, Estimate(1.2, 1.1, 1.3), f"{MET} (the interval lies above the ideal)"),
        ({"at_least": 0.9, "ideal": 1.0}, Estimate(1.2, 0.95, 1.3), MET),
        ({"at_least": 0.9, "ideal": 1.0}, Estimate(1.2, 0.8, 1.3), f"{MET} (the interval includes the bar)"),
        ({"at_least": 0.9, "ideal": 1.0}, Estimate(1.2), MET),
    ],
)
def test_the_median_decides_and_the_interval_says_how_sure_that_is(bar, measured, expected):
    assert verdict(measured, bar) == expected


def test_every_figure_has_a_row_when_nothing_is_measured():
    rows = rows_of([])
    bars = load_yaml("bench")["bars"].values()
    assert [row.figure for row in rows] == [bar["figure"] for bar in bars]
    gpu_only = {bar["figure"] for bar in bars if bar.get("gpu")}
    assert len(gpu_only) == 3
    for row in rows:
        assert row.verdict == (NEEDS_GPU if row.figure in gpu_only else "not measured yet")


def test_overhead_is_found_with_its_counts(tmp_path):
    result = result_of(tmp_path, "overhead", "overhead")
    add_overhead(result, SHORT, prefill=1.005, decode=1.02, calls=103)
    found = of(rows_of([result]), "nothing skipped, patched / stock")
    assert {about: row.verdict for about, row in found.items()} == {"prefill": MET, "decode": MISSED}
    assert found["prefill"].measured == "1.005 [1.005, 1.005]; the same torch operations, 1.030x the Python calls"
    assert found["prefill"].where == "cpu, llama-100m (random), 1 x 512 + 25 tokens, 3 rounds"
    assert found["prefill"].command == "`adaskip bench --figure overhead`"
    result.records[-1]["patched"]["torch_operations"]["decode_step"] += 1
    assert "other torch operations" in of(rows_of([result]), "nothing skipped, patched / stock")["decode"].measured


def test_the_saving_is_held_against_the_ideal_at_the_shares_of_the_bar(tmp_path):
    result = result_of(tmp_path, "saving", "strategies")
    add_strategies(result, SHORT, ("prefill",), budgets=(3, 4, 6))  # 12.5 %, a share without a bar, 25 %
    found = of(rows_of([result]), "saving realised / ideal")
    assert set(found) == {"prefill, 12.5 %", "decode, 12.5 %", "prefill, 25 %", "decode, 25 %"}
    for row in found.values():
        assert row.measured.startswith("1 [")
    assert found["prefill, 25 %"].bar == "at least 0.95"
    assert found["decode, 25 %"].bar == "at least 0.90"


@pytest.mark.parametrize(
    ("saved", "verdict"), [(0.191, MET), (0.189, MISSED), (0.3, f"{MET} (the interval lies above the ideal)")]
)
def test_a_saving_too_small_and_one_too_good_to_be_true_are_told(tmp_path, saved, verdict):
    result = result_of(tmp_path, "saving", "strategies")
    add_strategies(result, SHORT, ("prefill",), budgets=(6,))  # skips 20 % of the time
    for record in result.of(SHORT, Cell("adaskip", "prefill", 6)):
        record["ttft_s"] = 1 - saved
    assert of(rows_of([result]), "saving realised / ideal")["prefill, 25 %"].verdict == verdict


def test_only_sets_that_serve_prompt_and_answer_tell_the_saving_and_no_toy_does(tmp_path):
    e2e = result_of(tmp_path, "e2e", "strategies")
    add_strategies(e2e, SHORT, ("e2e",), budgets=(6,))
    toy = result_of(tmp_path, "toy", "strategies", testbed=True)
    add_strategies(toy, SHORT, ("prefill",), budgets=(6,))
    assert bare(rows_of([e2e, toy]), "saving realised / ideal") == ["not measured yet"]


def add_window(result, workload: Workload, added: float) -> None:
    plain, steps = [0.01] * workload.decode_steps, workload.decode_steps
    add(result, workload, Cell(WINDOWLESS, "decode", 6), [generation(1.0, plain)] * 2)
    add(result, workload, Cell("adaskip", "decode", 6), [generation(1.0, [0.01 + added] * min(steps, 21))] * 2)


@pytest.mark.parametrize(("added", "verdict"), [(0.001, MET), (0.002, MISSED)])
def test_the_windows_cost_is_found(tmp_path, added, verdict):
    result = result_of(tmp_path, "window", "window")
    add_window(result, Workload(64, 22), added)
    row = of(rows_of([result]), "learning window's cost over 256 tokens")["adaskip decode 6 eager"]
    assert row.verdict == verdict
    assert row.measured.startswith(f"{21 * added / 2.55:.4g} ")


def test_answers_shorter_than_the_window_are_a_row_that_says_so(tmp_path):
    result = result_of(tmp_path, "window", "window")
    add_window(result, Workload(64, 21), 0.001)
    (row,) = of(rows_of([result]), "learning window's cost over 256 tokens").values()
    assert (row.measured, row.verdict) == ("", TOO_SHORT)
    assert "21 decode steps" in row.verdict


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, MET), (1.05, MISSED)])
def test_the_cost_of_calibration_is_found(tmp_path, factor, verdict):
    result = result_of(tmp_path, "calibration", "calibration")
    add(result, LONG, Cell(PLAIN_PREFILL), [{"prefill_s": 2.0}] * 3)
    add(result, LONG, Cell(MEASURING_PREFILL), [{"prefill_s": 2.0 * factor}] * 3)
    row = of(rows_of([result]), "calibration / plain prefill")["8000 tokens"]
    assert (row.verdict, row.bar) == (verdict, "at most 1.02x")


@pytest.mark.parametrize(
    ("compiled_speedup", "over_limit", "verdict"), [(2.0, "1 [1, 1]", MET), (1.25, "1.6 [1.6, 1.6]", MISSED)]
)
def test_compiled_decoding_of_the_8b_shape_on_a_gpu_has_bars(tmp_path, compiled_speedup, over_limit, verdict):
    assert LLAMA_8B["parameters"] == PARAMETERS_8B
    result = result_of(tmp_path, "gpu_compiled", "strategies", LLAMA_8B, device=GPU)
    add_strategies(result, LONG, ("e2e",), (8, 16), BOTH, compiled_speedup)
    rows = rows_of([result])
    names = {"full compiled", "adaskip e2e 8 compiled", "adaskip e2e 16 compiled"}
    limit, faster = of(rows, "compiled decode / limit"), of(rows, "eager / compiled decode")
    assert set(limit) == set(faster) == names
    assert {row.verdict for row in (*limit.values(), *faster.values())} == {verdict}
    assert limit["full compiled"].measured == over_limit
    assert (
        faster["full compiled"].measured == f"{compiled_speedup:.4g} [{compiled_speedup:.4g}, {compiled_speedup:.4g}]"
    )
    assert limit["full compiled"].bar == "at most 1.35x"
    assert not bare(rows, "compiled decode / limit")


@pytest.mark.parametrize(
    ("shape", "device", "batch_size"),
    [(LLAMA_8B, "cpu", 1), (LLAMA_8B, GPU, 4), (INTERNLM, GPU, 1)],
    ids=["on a CPU", "in a batch", "of another shape"],
)
def test_elsewhere_compiled_decoding_is_for_information(tmp_path, shape, device, batch_size):
    result = result_of(tmp_path, "compiled", "strategies", shape, device=device)
    add_strategies(result, Workload(8000, 25, batch_size), ("prefill",), (8,), BOTH, 1.25)
    rows = rows_of([result])
    for figure in ("compiled decode / limit", "eager / compiled decode"):
        found = of(rows, figure)
        assert set(found) == {"full compiled", "adaskip prefill 8 compiled"}
        assert {row.verdict for row in found.values()} == {INFORMATION}
        assert all("(the 8B shape's at batch 1 on a GPU)" in row.bar for row in found.values())
        assert bare(rows, figure) == [NEEDS_GPU]


def test_a_compiled_cell_without_limits_or_an_eager_twin_has_no_number(tmp_path):
    result = result_of(tmp_path, "gpu_compiled", "strategies", LLAMA_8B, device=GPU)
    add_strategies(result, LONG, ("e2e",), (8,), (COMPILED,))
    result.limits.clear()
    rows = rows_of([result])
    assert bare(rows, "compiled decode / limit") == bare(rows, "eager / compiled decode") == [NEEDS_GPU]


def test_the_8b_shape_on_a_gpu_is_held_against_the_papers_speedups(tmp_path):
    result = result_of(tmp_path, "gpu_strategies", "strategies", LLAMA_8B, device=GPU)
    for workload in (LONG, Workload(1024, 25)):
        add_strategies(result, workload, ("e2e",), (8, 12, 16))
    found = of(rows_of([result]), "AdaSkip's speedup, against the paper's L20")
    assert {about: row.bar for about, row in found.items()} == {
        "prefill, adaskip e2e 8 eager": "at least 1.09x",
        "decode, adaskip e2e 8 eager": "at least 1.15x",
        "prefill, adaskip e2e 16 eager": "at least 1.22x",
        "decode, adaskip e2e 16 eager": "at least 1.32x",
    }
    # speedups 1 / (1 - 0.1) = 1.111 and 1 / (1 - 0.2) = 1.25
    assert [row.verdict for row in found.values()] == [MET, MISSED, MET, MISSED]
    assert found["decode, adaskip e2e 16 eager"].measured.startswith("1.25 ")


def test_other_models_and_devices_stand_beside_the_paper_for_information(tmp_path):
    small = result_of(tmp_path, "saving", "strategies")
    add_strategies(small, SHORT, ("prefill",), budgets=(3, 4, 6))
    decoding = result_of(tmp_path, "decoding", "strategies")
    add_strategies(decoding, SHORT, ("decode",), budgets=(6,))
    other = result_of(tmp_path, "gpu_internlm", "strategies", INTERNLM, device=GPU)
    add_strategies(other, LONG, ("e2e",), budgets=(16,))
    rows = rows_of([small, decoding, other])
    figure = "AdaSkip's speedup, against the paper's L20"
    found = of(rows, figure)
    assert {about: row.bar for about, row in found.items()} == {
        "prefill, adaskip prefill 3 eager": "llama's in the paper 1.09x",
        "decode, adaskip prefill 3 eager": "llama's in the paper 1.15x",
        "prefill, adaskip prefill 6 eager": "llama's in the paper 1.22x",
        "decode, adaskip prefill 6 eager": "llama's in the paper 1.32x",
        "decode, adaskip decode 6 eager": "llama's in the paper 1.32x",
        "prefill, adaskip e2e 16 eager": "internlm's in the paper 1.51x",
        "decode, adaskip e2e 16 eager": found["decode, adaskip e2e 16 eager"].bar,
    }
    assert {row.verdict for row in found.values()} == {INFORMATION}
    assert found["decode, adaskip prefill 6 eager"].measured == "1.25 [1.25, 1.25]"
    assert bare(rows, figure) == [NEEDS_GPU]


def test_kv_bytes_are_exact_or_missed(tmp_path):
    result = result_of(tmp_path, "kv", "kv")
    add_kv(result, SHORT, "prefill", 3, kv_check())
    add_kv(result, SHORT, "decode", 3, kv_check(held=801))
    add_kv(result, SHORT, "e2e", 3, kv_check(kept=[4]))
    add_kv(result, SHORT, "e2e", 6, kv_check(held=801), kv_check())  # in the first of two rounds
    found = of(rows_of([result]), "KV bytes")
    assert {about: row.verdict for about, row in found.items()} == {
        "prefill, 3 sublayers": MET,
        "decode, 3 sublayers": MISSED,
        "e2e, 3 sublayers": MISSED,
        "e2e, 6 sublayers": MISSED,
    }
    live = "800 of 960 bytes with 10 of 12 layers live"
    assert found["prefill, 3 sublayers"].measured == f"{live}; freed before the step"
    assert found["e2e, 3 sublayers"].measured == f"{live}; not freed: layers [4]"
    assert found["e2e, 6 sublayers"].measured.startswith("801 of 960 bytes")


def test_what_lacked_memory_is_told_and_its_whole_rounds_count(tmp_path):
    overhead = result_of(tmp_path, "overhead", "overhead")
    add_overhead(overhead, SHORT, prefill=1.0, decode=1.0)
    add_failure(overhead, SHORT, Cell("patched"), 4)
    add_failure(overhead, LONG, Cell("full"))
    kv = result_of(tmp_path, "kv", "kv")
    add_failure(kv, LONG, Cell("kv check", "e2e", 6))
    rows = rows_of([overhead, kv])
    assert set(of(rows, "nothing skipped, patched / stock")) == {"prefill", "decode"}
    assert bare(rows, "nothing skipped, patched / stock") == bare(rows, "KV bytes") == [NO_MEMORY]
    strategies = result_of(tmp_path, "strategies", "strategies")
    add_failure(strategies, LONG, Cell("full"))
    assert bare(rows_of([strategies]), "saving realised / ideal") == ["not measured yet"]


def test_no_two_rows_are_alike(tmp_path):
    compiled = result_of(tmp_path, "gpu_compiled", "strategies", LLAMA_8B, device=GPU)
    small = result_of(tmp_path, "compiled_100m", "strategies")
    for result, budgets in ((compiled, (8, 16)), (small, (3, 6))):
        for workload in (LONG, Workload(1024, 25), Workload(8000, 25, 4)):
            add_strategies(result, workload, ("prefill", "decode", "e2e"), budgets, BOTH)
    kv = result_of(tmp_path, "kv", "kv")
    for phase in ("prefill", "decode"):
        for sublayers in (3, 6):
            add_kv(kv, SHORT, phase, sublayers, kv_check(), kv_check())
    rows = rows_of([compiled, small, kv])
    assert len(rows) > 100
    labels = [(row.figure, row.where, row.command) for row in rows]
    assert len(set(labels)) == len(labels)


def test_the_table_has_a_line_for_every_row(tmp_path):
    result = result_of(tmp_path, "saving", "strategies")
    add_strategies(result, SHORT, ("prefill",), budgets=(6,))
    header, _, *lines = bars_markdown([result]).splitlines()
    assert [cell.strip() for cell in header.split("|")[1:3]] == ["figure", "bar"]
    assert len(lines) == len(rows_of([result]))
    assert len({len(line) for line in lines}) == 1
