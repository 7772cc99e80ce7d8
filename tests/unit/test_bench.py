"""The benchmark: its rounds, that it continues, and that a memory too small ends one prompt length only."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch

from adaskip.common.locks import LockedError, exclusive
from adaskip.profiles.assumed import assumed_profile
from adaskip.roofline import Ceilings
from adaskip.strategies import FULL
from adaskip.studies.bench import measuring, settings
from adaskip.studies.bench.measuring import run_bench
from adaskip.studies.bench.results import Result, load_result, ratio
from adaskip.studies.bench.settings import (
    BREAKDOWN,
    COMPARISONS,
    COMPILED,
    COUNTS,
    REFERENCE_EVERY,
    STUDIES,
    BenchConfig,
    Cell,
    Workload,
    cells_of,
    rotated,
    with_references,
)
from adaskip.studies.bench.subject import Subject
from adaskip.studies.bench.trials import Trials
from tests.tiny_bench import LAYERS, tiny_model


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(tiny_model(), assumed_profile(LAYERS), "random")


@pytest.fixture
def tiny(monkeypatch, subject, tmp_path):
    """Makes configurations that are measured on a tiny model and saved in a temporary folder."""
    monkeypatch.setattr(measuring, "load_subject", lambda config: subject)
    monkeypatch.setattr(measuring, "measure_ceilings", lambda device, dtype: Ceilings("CPU", 1e10, 1e9, "of a test"))

    def make(**options):
        defaults = {
            "device": "cpu",
            "random_weights": True,
            "prompt_tokens": (8,),
            "new_tokens": 4,
            "budgets": (2,),
            "strategies": ("adaskip", "unified"),
            "rounds": 2,
            "output_dir": str(tmp_path),
            "name": "tiny",
        }
        return BenchConfig(**{**defaults, **options})

    return make


def test_every_study_measures_and_saves_whole_rounds(tiny):
    for study in STUDIES:
        outcome = run_bench(tiny(study=study, name=study, rounds=2))
        saved = load_result(outcome.result.path)
        assert outcome.complete
        assert not outcome.notes
        assert saved.records == outcome.result.records
        (workload,) = saved.workloads
        for cell in saved.cells(workload):
            rounds = [record["round"] for record in saved.of(workload, cell)]
            runs = 2 if cell.name == FULL and study in COMPARISONS else 1
            assert rounds == ([1] if cell.name == COUNTS else [1] * runs + [2] * runs)


def test_an_interrupted_round_is_lost_and_no_other(tiny, monkeypatch):
    stock, calls = Trials.run, []

    def run(self, cell, workload):
        calls.append(cell)
        if len(calls) == 11:  # five runs warm up, five are the first round
            raise KeyboardInterrupt
        return stock(self, cell, workload)

    monkeypatch.setattr(Trials, "run", run)
    with pytest.raises(KeyboardInterrupt):
        run_bench(tiny(rounds=3))
    path = Path(tiny().output_dir) / "cpu" / "tiny.json"
    before = load_result(path).records
    assert {record["round"] for record in before} == {1}
    outcome = run_bench(tiny(rounds=3))
    assert outcome.result.records[: len(before)] == before
    assert [r["round"] for r in outcome.result.of(Workload(8, 4), Cell("full"))] == [1, 1, 2, 2, 3, 3]
    assert run_bench(tiny(rounds=3)).result.records == outcome.result.records  # nothing is left to measure


def test_a_time_limit_stops_between_rounds_and_says_so(tiny):
    outcome = run_bench(tiny(rounds=100_000, time_limit_s=1))
    assert not outcome.complete
    (note,) = outcome.notes
    assert re.fullmatch(r"1 x 8 \+ 4 tokens: \d+ of 100000 rounds so far; the same command continues", note)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_prompt_too_long_for_the_memory_is_one_line_and_the_sweep_goes_on(tiny, monkeypatch, error):
    stock = Trials.run

    def run(self, cell, workload):
        if workload.prompt_tokens == 16 and cell.name == "unified":
            raise error
        return stock(self, cell, workload)

    monkeypatch.setattr(Trials, "run", run)
    outcome = run_bench(tiny(prompt_tokens=(16, 8)))
    assert outcome.notes == ("1 x 16 + 4 tokens: not enough memory on cpu for unified e2e 2 eager; 0 of 2 rounds",)
    assert outcome.complete
    assert outcome.result.rounds_of(Workload(16, 4)) == 0
    assert outcome.result.rounds_of(Workload(8, 4)) == 2
    assert {entry["prompt_tokens"] for entry in outcome.result.entries} == {8}


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny, monkeypatch):
    def run(self, cell, workload):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Trials, "run", run)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_bench(tiny())


def test_a_result_is_not_continued_by_another_measurement(tiny):
    run_bench(tiny(rounds=1))
    with pytest.raises(ValueError, match=r"another new_tokens \(there 4, now 5\): give another --name, or --fresh"):
        run_bench(tiny(new_tokens=5))
    outcome = run_bench(tiny(new_tokens=5, rounds=1, fresh=True))
    assert outcome.result.workloads == [Workload(8, 5)]


def test_impossible_budgets_are_refused_before_anything_runs(tiny, monkeypatch):
    monkeypatch.setattr(Trials, "run", lambda *args: pytest.fail("ran"))
    with pytest.raises(ValueError, match="even number of sublayers"):
        run_bench(tiny(budgets=(3,)))


def test_entries_hold_time_memory_and_references_of_every_cell(tiny):
    outcome = run_bench(tiny(phases=("prefill", "decode")))
    entries = outcome.result.entries
    assert [(e["strategy"], e["phase"], e["budget"]) for e in entries] == [
        ("full", "", 0),
        *((name, phase, 2) for phase in ("decode", "prefill") for name in ("adaskip", "unified")),
    ]
    for entry in entries:
        assert entry["prefill_tokens_per_s"] == pytest.approx(8 / entry["ttft_s"])
        assert entry["decode_tokens_per_s"] == pytest.approx(1 / entry["tpot_s"])
        assert 0 < entry["ideal_tpot_s"] <= 1.0001 * entry["tpot_s"] * entry["speedup_decode"]
        assert 0 < entry["limit_tpot_s"] <= entries[0]["limit_tpot_s"]
    assert outcome.result.manifest["ceilings"]["bandwidth_bytes_per_s"] > 0
    saved = {e["phase"]: 1 - e["ideal_ttft_s"] / (e["ttft_s"] * e["speedup_prefill"]) for e in entries[1:]}
    assert saved["decode"] == pytest.approx(0)
    assert 0.01 < saved["prefill"] < 0.5  # 2 of 8 sublayers


def test_the_order_of_cells_changes_and_what_is_exact_runs_once():
    cells = cells_of("overhead", (), (), (), ("eager",))
    assert {cell.name for cell in rotated(cells, 1)} == {"full", "patched", COUNTS}
    orders = [tuple(cell.name for cell in rotated(cells, number)) for number in (2, 3)]
    assert sorted(orders) == [("full", "patched"), ("patched", "full")]


def test_the_full_model_runs_before_after_and_between_the_cells_that_it_is_compared_with():
    cells = cells_of("strategies", ("prefill", "decode"), ("adaskip", "unified"), (2, 4), ("eager", "compiled"))
    for number in (1, 2, 3, 4):
        order = with_references(rotated(cells, number))
        assert Counter(cell for cell in order if cell.name != "full") == Counter(c for c in cells if c.name != "full")
        for mode, block in groupby(order, key=lambda cell: cell.mode):
            names = [cell.name for cell in block]
            assert names[0] == names[-1] == "full"
            gaps = [len(list(run)) for is_full, run in groupby(names, key=lambda name: name == "full") if not is_full]
            assert max(gaps) <= REFERENCE_EVERY, mode
            assert "full full" not in " ".join(names)


def test_a_ratio_is_to_the_full_models_runs_beside_a_cell_of_the_same_round():
    """The machine becomes twice as slow within the first round, and is slow in the second."""
    full, early, late = Cell(FULL), Cell("early_exit", "prefill", 2), Cell("unified", "prefill", 2)
    workload = Workload(8, 2)
    seconds = [(1, full, 1.0), (1, early, 0.6), (1, full, 1.4), (1, late, 0.8), (1, full, 1.8), (2, full, 2.0)]
    seconds += [(2, late, 1.0), (2, early, 1.0), (2, full, 2.0)]
    records = [
        {"workload": vars(workload), "cell": vars(cell), "round": number, "ttft_s": time, "steps_s": [time]}
        for number, cell, time in seconds
    ]
    result = Result(Path("result.json"), {}, records)
    assert ratio(result, workload, full, early).value == pytest.approx(2.0)
    assert ratio(result, workload, full, late, "decode").value == pytest.approx(2.0)
    assert ratio(result, workload, full, full).value == 1


def test_runs_of_one_round_are_no_rounds():
    """Two runs of the full model in the only round are no reason for an interval."""
    workload, eager, compiled = Workload(8, 2), Cell(FULL), Cell(FULL, mode=COMPILED)
    cells = ((eager, 2.0), (eager, 2.2), (compiled, 1.0), (compiled, 1.2))
    records = [
        {"workload": vars(workload), "cell": vars(cell), "round": 1, "ttft_s": time, "steps_s": [time]}
        for cell, time in cells
    ]
    measured = ratio(Result(Path("result.json"), {}, records), workload, eager, compiled)
    assert (measured.value, measured.low) == (pytest.approx((2.2 / 1.0 + 2.2 / 1.2) / 2), None)


def test_a_result_does_not_continue_with_other_sets_or_fewer_runs_of_the_full_model(tiny, monkeypatch):
    run_bench(tiny(rounds=1))
    other = Subject(tiny_model(), replace(made := assumed_profile(LAYERS), attention=made.ffn), "random")
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "load_subject", lambda config: other)
        with pytest.raises(ValueError, match="holds a measurement with another subject"):
            run_bench(tiny(rounds=2))
    monkeypatch.setattr(settings, "REFERENCE_EVERY", 1)
    with pytest.raises(ValueError, match="holds a measurement with another reference_every"):
        run_bench(tiny(rounds=2))


def test_a_complete_result_of_an_older_version_stays_as_it_is_and_gets_no_more_rounds(tiny):
    path = run_bench(tiny(rounds=1)).result.path
    older = load_result(path)
    del older.identity["reference_every"], older.identity["subject"]["fingerprints"]
    older.save()
    before = path.read_bytes()
    assert run_bench(tiny(rounds=1)).complete
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="holds a measurement with another reference_every, subject"):
        run_bench(tiny(rounds=2))
    with pytest.raises(ValueError, match="holds a measurement with another clock"):
        run_bench(tiny(rounds=1, clock="process", threads=1))


def test_two_benchmarks_of_one_result_do_not_run_at_once(tiny):
    path = Path(tiny().output_dir) / "cpu" / "tiny.json"
    with exclusive(path.with_suffix(".lock")), pytest.raises(LockedError, match=r"tiny\.json is in use"):
        run_bench(tiny())


@pytest.mark.gpu
def test_a_benchmark_runs_on_cuda(tmp_path, monkeypatch):
    subject = Subject(tiny_model(torch.device("cuda")), assumed_profile(LAYERS), "random")
    monkeypatch.setattr(measuring, "load_subject", lambda config: subject)
    config = BenchConfig(device="cuda", prompt_tokens=(8,), new_tokens=4, budgets=(2,), output_dir=str(tmp_path))
    outcome = run_bench(config)
    assert outcome.complete
    assert all(entry["peak_memory_bytes"] > 0 for entry in outcome.result.entries)
    timed = outcome.result.of(Workload(8, 4), Cell(BREAKDOWN))
    assert all(min(record["prefill_sublayers_s"]["ffn"]) > 0 for record in timed)
