"""Predictions beside the benchmark's measurements: both speedups by hand, and what has none is left out."""

from __future__ import annotations

import json

import pytest

from adaskip.studies.bench.settings import COMPILED, EAGER, Cell, Workload
from adaskip.studies.limits.predictions import read_measured
from adaskip.studies.limits.report import measured_table
from tests.saved_benchmarks import (
    GPU,
    LLAMA_8B,
    add,
    add_failure,
    add_overhead,
    add_strategies,
    generation,
    result_of,
    save,
)

SHORT, LONG = Workload(512, 25), Workload(8000, 25, 4)


def test_speedups_are_predicted_by_the_limits_and_measured_by_the_entries(tmp_path):
    result = result_of(tmp_path, "gpu_saving", "strategies", LLAMA_8B, device=GPU)
    limits = {Cell("full"): (0.9, 0.06), Cell("adaskip", "e2e", 8): (0.6, 0.05)}
    times = {Cell("full"): (1.0, 0.2), Cell("adaskip", "e2e", 8): (0.8, 0.1)}
    for cell, (ttft_s, tpot_s) in limits.items():
        result.limits.append({"workload": vars(LONG), "cell": vars(cell), "ttft_s": ttft_s, "tpot_s": tpot_s})
        add(result, LONG, cell, [generation(times[cell][0], [times[cell][1]] * 24)] * 2)
    save(result)
    assert read_measured(tmp_path) == [
        {
            "device": "nvidia-l20",
            "model": "llama",
            "prompt_tokens": 8000,
            "new_tokens": 25,
            "batch_size": 4,
            "strategy": "adaskip",
            "phase": "e2e",
            "sublayers": 8,
            "mode": "eager",
            "predicted_prefill": pytest.approx(1.5),
            "measured_prefill": {"value": 1.25, "low": 1.25, "high": 1.25},
            "predicted_decode": pytest.approx(1.2),
            "measured_decode": {"value": 2.0, "low": 2.0, "high": 2.0},
            "result": "gpu_saving",
        }
    ]


def test_each_workload_and_mode_has_its_own_full_model(tmp_path):
    result = result_of(tmp_path, "compiled", "strategies")
    for workload in (SHORT, LONG):
        add_strategies(result, workload, ("prefill",), (6,), (EAGER, COMPILED))
    for limit in result.limits:  # of one full model alone
        if limit["cell"] == vars(Cell("full", mode=COMPILED)) and limit["workload"] == vars(LONG):
            limit["tpot_s"] *= 3
    save(result)
    found = {(m["prompt_tokens"], m["mode"]): m["predicted_decode"] for m in read_measured(tmp_path)}
    assert found == {
        (512, EAGER): pytest.approx(1.25),
        (512, COMPILED): pytest.approx(1.25),
        (8000, EAGER): pytest.approx(1.25),
        (8000, COMPILED): pytest.approx(3.75),
    }


def test_what_has_no_limits_is_no_study_of_strategies_or_no_result_is_left_out(tmp_path):
    interrupted = result_of(tmp_path, "interrupted", "strategies")
    add_strategies(interrupted, SHORT, ("prefill",), (3, 6))
    interrupted.limits = [limit for limit in interrupted.limits if limit["cell"]["sublayers"] != 6]
    save(interrupted)
    failed = result_of(tmp_path, "failed", "strategies")
    add_failure(failed, SHORT, Cell("full"))
    save(failed)
    overhead = result_of(tmp_path, "overhead", "overhead")
    add_overhead(overhead, SHORT, prefill=1.0, decode=1.0)
    save(overhead)
    (tmp_path / "roofline").mkdir()
    (tmp_path / "roofline" / "roofline.json").write_text(json.dumps({"manifest": {}}))
    assert [(m["result"], m["sublayers"]) for m in read_measured(tmp_path)] == [("interrupted", 3)]


@pytest.mark.parametrize("name", ["", "missing"])
def test_where_nothing_is_measured_there_is_nothing(tmp_path, name):
    assert read_measured(tmp_path / name) == []


def test_the_table_puts_measured_beside_predicted():
    work = {"device": "cpu", "model": "llama", "prompt_tokens": 512, "new_tokens": 25, "batch_size": 1}
    way = {"strategy": "adaskip", "phase": "e2e", "sublayers": 6, "mode": "eager", "result": "saving"}
    predicted = {"predicted_prefill": 1.333, "predicted_decode": 1.5}
    timed = [{"value": 1.2, "low": 1.1, "high": 1.3}, {"value": 1.4, "low": None, "high": None}]
    one = {**work, **way, **predicted, "measured_prefill": timed[0], "measured_decode": timed[1]}
    header, _, line = measured_table([one]).splitlines()
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == ["cpu", "llama", "1 x 512 + 25", "AdaSkip", "e2e", "6", "eager", "1.33", "1.20 [1.10, 1.30]",
                     "1.50", "1.40", "saving"]  # fmt: skip
    assert [cell.strip() for cell in header.split("|")[8:12]] == [
        "Prefill, predicted", "measured", "Decode, predicted", "measured",
    ]  # fmt: skip
