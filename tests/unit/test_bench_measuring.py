"""When rounds begin, what is kept when the memory ends, and that a repeated command ends: without a model."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from adaskip.studies.bench import measuring
from adaskip.studies.bench.measuring import run_bench
from adaskip.studies.bench.results import load_result
from adaskip.studies.bench.settings import MEASURING_PREFILL, BenchConfig, Cell, Workload
from adaskip.studies.bench.timing import StaticCaches

DEVICE = torch.device("cpu")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Machine:
    """A clock that only work turns: by prompt length, seconds of a warm-up and of a round; and errors by round."""

    def __init__(self):
        self.now = 0.0
        self.seconds: dict[int, tuple[float, float]] = {}
        self.errors: dict[tuple[int, str, int], Exception] = {}
        self.begun: list[tuple[int, int]] = []
        self._cells: Counter[tuple[int, str]] = Counter()

    def trials(self, subject, clock, **options) -> SimpleNamespace:
        self._cells.clear()
        self.began, self.begun = self.now, []
        parts = {"strategy": lambda cell, workload: None, "run": self._run, "static_caches": StaticCaches()}
        return SimpleNamespace(subject=subject, **parts)

    def _run(self, cell: Cell, workload: Workload) -> dict:
        """Rounds are counted from the command's warm-up, 0."""
        prompt, number = workload.prompt_tokens, self._cells[workload.prompt_tokens, cell.label]
        self._cells[prompt, cell.label] += 1
        if (prompt, number) not in self.begun:
            self.begun.append((prompt, number))
            self.now += self.seconds.get(prompt, (1.0, 1.0))[number > 0]
        if error := self.errors.get((prompt, cell.name, number)):
            raise error
        return {"prefill_s": 1.0, "ttft_s": 1.0, "steps_s": [0.1], "kv_bytes": 1, "peak_memory_bytes": None}


@pytest.fixture
def machine(monkeypatch) -> Machine:
    machine = Machine()
    subject = SimpleNamespace(num_layers=4, model=SimpleNamespace(device=DEVICE), describe=lambda: {"weights": "none"})
    monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=lambda: machine.now))
    monkeypatch.setattr(measuring, "load_subject", lambda config: subject)
    monkeypatch.setattr(measuring, "Trials", machine.trials)
    monkeypatch.setattr(measuring, "limits_of", lambda *args: [])
    return machine


@pytest.fixture
def config(tmp_path):
    def make(**options) -> BenchConfig:
        shape = {"random_weights": True, "device": "cpu", "study": "calibration", "new_tokens": 2, "rounds": 2}
        return BenchConfig(**{**shape, "output_dir": str(tmp_path), "name": "some", **options})

    return make


def rounds_of(outcome, prompt: int) -> int:
    return outcome.result.rounds_of(Workload(prompt, 2))


def test_a_warm_up_begins_only_if_a_round_still_fits(machine, config):
    machine.seconds = dict.fromkeys((1, 2, 3), (10.0, 30.0))
    outcome = run_bench(config(prompt_tokens=(1, 2, 3), time_limit_s=99))
    assert machine.begun == [(1, 0), (1, 1), (1, 2)]  # 70 s; another 30 would end at 100
    assert [rounds_of(outcome, prompt) for prompt in (1, 2, 3)] == [2, 0, 0]
    assert not outcome.complete
    assert outcome.notes == (
        "1 x 2 + 2 tokens: 0 of 2 rounds so far; the same command continues",
        "1 x 3 + 2 tokens: 0 of 2 rounds so far; the same command continues",
    )
    again = run_bench(config(prompt_tokens=(1, 2, 3), time_limit_s=99))
    assert machine.begun == [(2, 0), (2, 1), (2, 2)]
    assert [rounds_of(again, prompt) for prompt in (1, 2, 3)] == [2, 2, 0]


def test_a_warm_up_that_shows_a_round_to_be_too_long_is_the_last_thing_done(machine, config):
    machine.seconds = {1: (10.0, 10.0), 2: (60.0, 60.0), 3: (10.0, 10.0)}
    outcome = run_bench(config(prompt_tokens=(1, 2, 3), time_limit_s=100))
    assert machine.begun == [(1, 0), (1, 1), (1, 2), (2, 0)]  # 90 s
    assert [rounds_of(outcome, prompt) for prompt in (1, 2, 3)] == [2, 0, 0]


def test_however_slow_the_warm_up_a_repeated_command_comes_to_an_end(machine, config):
    machine.seconds = dict.fromkeys((1, 2), (500.0, 40.0))
    outcomes = []
    while not (outcomes and outcomes[-1].complete):
        outcomes.append(run_bench(config(prompt_tokens=(1, 2), time_limit_s=100)))
        assert len(outcomes) <= 4, "no progress"
    assert [sum(rounds_of(outcome, prompt) for prompt in (1, 2)) for outcome in outcomes] == [1, 2, 3, 4]


def test_with_a_limit_of_0_nothing_is_run(machine, config):
    machine.seconds = dict.fromkeys((1, 2), (10.0, 10.0))
    run_bench(config(prompt_tokens=(1, 2), time_limit_s=30))
    machine.begun.clear()
    outcome = run_bench(config(prompt_tokens=(1, 2), time_limit_s=0))
    assert not machine.begun
    assert [rounds_of(outcome, prompt) for prompt in (1, 2)] == [2, 0]
    assert outcome.notes == ("1 x 2 + 2 tokens: 0 of 2 rounds so far; --time-limit-s 0 runs none",)


def test_a_limit_of_0_needs_a_saved_result_and_keeps_it(machine, config):
    with pytest.raises(ValueError, match="adds the limits of the device to a saved result; there is none at "):
        run_bench(config(time_limit_s=0))
    with pytest.raises(ValueError, match="measures nothing and cannot be given with --fresh"):
        config(time_limit_s=0, fresh=True)


def test_a_warm_ups_time_is_no_estimate_once_a_round_is_timed(machine, config):
    machine.seconds = {1: (60.0, 5.0)}
    outcome = run_bench(config(prompt_tokens=(1,), rounds=8, time_limit_s=100))
    assert outcome.complete
    assert machine.now == 100.0


@pytest.mark.parametrize(
    "error",
    [
        OUT_OF_MEMORY,
        torch.OutOfMemoryError("Allocation on device"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "another allocator", "cpu", "CUDA", "cuBLAS"],
)
def test_a_lack_of_memory_is_told_from_other_errors(machine, config, error):
    machine.errors[1, MEASURING_PREFILL, 0] = error
    outcome = run_bench(config(prompt_tokens=(1, 2)))
    label = f"{MEASURING_PREFILL} eager"
    assert outcome.notes == (f"1 x 1 + 2 tokens: not enough memory on cpu for {label}; 0 of 2 rounds",)
    assert outcome.complete
    assert (rounds_of(outcome, 1), rounds_of(outcome, 2)) == (0, 2)
    machine.errors[3, MEASURING_PREFILL, 0] = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_bench(config(prompt_tokens=(3,), fresh=True))


def test_whole_rounds_before_the_memory_ended_stay_and_the_cell_is_named(machine, config):
    options = {"study": "strategies", "strategies": ("adaskip",), "phases": ("e2e",), "budgets": (2,), "rounds": 4}
    machine.errors[1, "adaskip", 3] = OUT_OF_MEMORY
    outcome = run_bench(config(prompt_tokens=(1, 2), **options))
    work, cell = Workload(1, 2), Cell("adaskip", "e2e", 2)
    assert outcome.notes == ("1 x 1 + 2 tokens: not enough memory on cpu for adaskip e2e 2 eager; 2 of 4 rounds",)
    saved = load_result(outcome.result.path)
    assert [record["round"] for record in saved.of(work, cell)] == [1, 2]
    about = {"workload": vars(work), "cell": vars(cell)}
    assert saved.failure(work) == {**about, "round": 3, "error": "out of memory"}
    entries = [(e["prompt_tokens"], e["strategy"], e["rounds"]) for e in saved.entries]
    assert entries == [(1, "full", 2), (1, "adaskip", 2), (2, "full", 4), (2, "adaskip", 4)]
    assert run_bench(config(prompt_tokens=(1, 2), **options)).result.records == saved.records
    assert machine.begun == []  # what lacked memory is not tried again


def test_a_stopped_benchmark_leaves_the_medians_of_its_rounds(machine, config):
    machine.errors[1, "adaskip", 3] = KeyboardInterrupt()
    options = config(
        prompt_tokens=(1,), study="strategies", strategies=("adaskip",), phases=("e2e",), budgets=(2,), rounds=4
    )
    with pytest.raises(KeyboardInterrupt):
        run_bench(options)
    saved = load_result(options.out_dir / "cpu" / f"{options.result_name}.json")
    assert [(entry["strategy"], entry["rounds"]) for entry in saved.entries] == [("full", 2), ("adaskip", 2)]


def test_a_benchmark_for_which_the_memory_is_never_enough_is_complete_and_empty(machine, config):
    options = {"study": "strategies", "strategies": ("adaskip",), "budgets": (2,)}
    for prompt in (1, 2):
        machine.errors[prompt, "full", 0] = OUT_OF_MEMORY
    outcome = run_bench(config(prompt_tokens=(1, 2), **options))
    assert outcome.complete
    assert outcome.result.entries == []
    assert all(map(outcome.result.failure, outcome.result.workloads))


def test_a_lack_of_memory_does_not_lift_the_time_limit(machine, config):
    machine.seconds = {1: (200.0, 1.0)}
    machine.errors[1, MEASURING_PREFILL, 0] = OUT_OF_MEMORY
    outcome = run_bench(config(prompt_tokens=(1, 2), time_limit_s=100))
    assert machine.begun == [(1, 0)]
    assert not outcome.complete
