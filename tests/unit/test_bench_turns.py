"""Cells that compute in turns: who runs when, what each measures, and what lossless mode takes without drafts."""

from __future__ import annotations

import platform
import threading
import time
from pathlib import Path

import pytest
import torch

from adaskip.common.errors import RunError
from adaskip.core.context import skipping
from adaskip.core.in_place_cache import InPlaceCache
from adaskip.core.patching import patches_of
from adaskip.core.plan import SkipPlan
from adaskip.profiles.assumed import assumed_profile
from adaskip.roofline import Ceilings
from adaskip.strategies import FULL, FixedPlan
from adaskip.studies.bench import measuring, turns
from adaskip.studies.bench.bars import rows_of
from adaskip.studies.bench.measuring import run_bench
from adaskip.studies.bench.memory import keep_freed_memory
from adaskip.studies.bench.plain_steps import NeverDrafting
from adaskip.studies.bench.report import result_markdown
from adaskip.studies.bench.results import Result, slowdown
from adaskip.studies.bench.settings import (
    BREAKDOWN,
    COUNTS,
    IN_PLACE,
    PATCHED,
    PLAIN_STEPS,
    REFERENCE_EVERY,
    BenchConfig,
    Cell,
    Workload,
    cells_of,
    groups_of,
)
from adaskip.studies.bench.subject import Subject
from adaskip.studies.bench.timing import Stopwatch
from adaskip.studies.bench.trials import Trials
from adaskip.studies.bench.turns import in_turns, shared_copy, taking_turns
from tests.families import random_model

LAYERS = 4
IDS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def model():
    return random_model("llama", LAYERS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(monkeypatch, tmp_path, model):
    """Makes configurations that are measured on a tiny model and saved in a temporary folder."""
    subject = Subject(model, assumed_profile(LAYERS), "random")
    monkeypatch.setattr(measuring, "load_subject", lambda config: subject)
    monkeypatch.setattr(measuring, "measure_ceilings", lambda device, dtype: Ceilings("CPU", 1e10, 1e9, "of a test"))

    def make(**options) -> BenchConfig:
        small = {"device": "cpu", "random_weights": True, "prompt_tokens": (8,), "new_tokens": 4, "budgets": (2,)}
        turns = {"clock": "turns", "threads": 1, "rounds": 2, "output_dir": str(tmp_path), "name": "tiny"}
        return BenchConfig(**{**small, **turns, **options})

    return make


def spin_elsewhere(seconds: float) -> None:
    """Compute in another thread."""

    def spin() -> None:
        while time.thread_time() < seconds:
            pass

    other = threading.Thread(target=spin)
    other.start()
    other.join()


def test_one_thread_runs_at_a_time_and_each_in_its_turn():
    seen, running = [], []

    def work(name: str, steps: int):
        def run(pass_on) -> str:
            for step in range(steps):
                assert not running
                running.append(name)
                time.sleep(0.001)
                seen.append((name, step))
                running.remove(name)
                pass_on()
            return name.upper()

        return run

    assert in_turns([work("a", 3), work("b", 1), work("c", 2)]) == ["A", "B", "C"]
    assert seen == [("a", 0), ("b", 0), ("c", 0), ("c", 1), ("a", 1), ("a", 2)]


def test_each_thread_is_the_first_of_a_round_equally_often():
    seen = []

    def work(name: str):
        def run(pass_on) -> None:
            for _ in range(6):
                seen.append(name)
                pass_on()

        return run

    in_turns([work(name) for name in "abc"])
    assert "".join(seen) == "abcbcacababcbcacab"


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_the_first_error_ends_all_and_is_raised(failing):
    ended = []

    def work(number: int):
        def run(pass_on) -> None:
            try:
                pass_on()
                if number == failing:
                    raise MemoryError(f"of {number}")
                while True:
                    pass_on()
            finally:
                ended.append(number)

        return run

    with pytest.raises(MemoryError, match=f"of {failing}"):
        in_turns([work(number) for number in range(3)])
    assert sorted(ended) == [0, 1, 2]


def test_an_interrupt_of_the_main_thread_ends_all(monkeypatch):
    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(turns, "wait", interrupted)

    def work(pass_on) -> None:
        while True:
            time.sleep(0.001)
            pass_on()

    with pytest.raises(KeyboardInterrupt):
        in_turns([work] * 3)


def test_time_that_is_spent_in_other_threads_is_no_measurement():
    with pytest.raises(RunError, match="torch must compute in one thread: set OMP_NUM_THREADS=1"):
        in_turns([lambda pass_on: spin_elsewhere(2 * turns.OTHERS_S)])


def test_a_lap_is_the_time_of_its_own_thread():
    stopwatch = Stopwatch(torch.device("cpu"), "turns")
    stopwatch.mark()
    spin_elsewhere(0.1)
    stopwatch.mark()
    assert stopwatch.laps()[0] < 0.05


def test_a_copy_shares_the_weights_and_is_patched_by_itself(model):
    copied = shared_copy(model)
    pairs = list(zip(model.parameters(), copied.parameters(), strict=True))
    assert pairs
    assert all(one is other for one, other in pairs)
    stock = model(IDS).logits
    with skipping(copied, FixedPlan(num_layers=LAYERS, plan=SkipPlan.of_layers([1]))):
        assert torch.equal(model(IDS).logits, stock)
        assert not torch.equal(copied(IDS).logits, stock)
    assert torch.equal(copied(IDS).logits, stock)


@pytest.mark.parametrize(
    ("cell", "keep_kv"),
    [
        (Cell(FULL), False),
        (Cell(BREAKDOWN), False),
        (Cell(PATCHED), False),
        (Cell("adaskip", "e2e", 4), False),
        (Cell("adaskip", "prefill", 4), True),
        (Cell("pop", "prefill", 4), False),
        (Cell(PLAIN_STEPS, "decode", 4), False),
    ],
    ids=lambda each: each.label if isinstance(each, Cell) else "kept" * each,
)
def test_whatever_a_cell_does_its_turns_are_layers_of_the_prompt_and_steps_of_the_answer(model, cell, keep_kv):
    patches_of(model)  # their proof runs the layers
    passed, trials = [], Trials(Subject(model, assumed_profile(LAYERS), "random"), "turns", keep_kv=keep_kv)
    with taking_turns(model, lambda: passed.append(None)):
        trials.run(cell, Workload(8, 5))
    assert len(passed) == LAYERS + 4
    trials.run(cell, Workload(8, 5))
    assert len(passed) == LAYERS + 4


def test_a_lack_of_memory_names_the_cells_that_were_together(config, monkeypatch):
    def lacking(self, cells, workload):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trials, "run_in_turns", lacking)
    outcome = run_bench(config(strategies=("adaskip", "unified")))
    assert outcome.notes == ("1 x 8 + 4 tokens: not enough memory on cpu for 5 cells in turns; 0 of 2 rounds",)
    assert "Not enough memory for 5 cells in turns in the warm-up." in result_markdown(outcome.result)


def test_a_cell_is_compared_with_the_full_model_of_its_own_group():
    """The machine is twice as slow while the second group runs."""
    cells = cells_of("plain_steps", ("prefill", "decode", "e2e"), (), (2, 4, 6), ("eager",))
    workload = Workload(8, 2)
    records = [
        {"workload": vars(workload), "cell": vars(cell), "round": 1, "ttft_s": time, "steps_s": [time]}
        for group, time in zip(groups_of(cells, "plain_steps", "turns"), (1.0, 2.0), strict=True)
        for cell in group
    ]
    result = Result(Path("result.json"), {}, records)
    assert {slowdown(result, workload, cell, "decode").value for cell in cells} == {1.0}


def test_freed_memory_is_kept_where_glibc_is(monkeypatch):
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


def test_every_group_has_the_full_model_at_both_ends():
    cells = cells_of("strategies", ("prefill", "decode"), ("adaskip", "unified"), (2, 3, 4), ("eager",))
    groups = groups_of(cells, "strategies", "turns")
    assert [len(group) for group in groups] == [REFERENCE_EVERY + 2, REFERENCE_EVERY + 2, 3]
    assert all(group[0] == group[-1] == Cell(FULL) for group in groups)
    assert [cell for group in groups for cell in group[1:-1]] == [cell for cell in cells if cell.name != FULL]


def test_what_is_counted_runs_alone(config):
    cells = cells_of("overhead", (), (), (), ("eager",))
    assert groups_of(cells, "overhead", "turns") == [[Cell(FULL), Cell(PATCHED), Cell(FULL)], [Cell(COUNTS)]]
    result = run_bench(config(study="overhead")).result
    assert [record["cell"]["name"] for record in result.records] == [FULL, PATCHED, FULL, COUNTS, FULL, PATCHED, FULL]
    rows = [row for row in rows_of([result]) if row.figure.startswith("nothing skipped")]
    assert all("the same torch operations" in row.measured for row in rows)


def test_cells_in_turns_do_the_work_that_they_do_alone(model):
    subject = Subject(model, assumed_profile(LAYERS), "random")
    cells = [Cell(FULL), Cell(BREAKDOWN), Cell("adaskip", "decode", 2), Cell("unified", "e2e", 2), Cell(FULL)]
    workload, times = Workload(8, 24), ("ttft_s", "steps_s", "prefill_sublayers_s", "decode_sublayers_s")

    def exact(measured):
        return [{name: value for name, value in each.items() if name not in times} for each in measured]

    trials = Trials(subject, "turns")
    together = trials.run_in_turns(cells, workload)
    assert exact(together) == exact([Trials(subject, "process").run(cell, workload) for cell in cells])
    assert all(min(each["ttft_s"], *each["steps_s"]) > 0 for each in together)
    assert len(trials.copies) == len(cells)
    again = trials.run_in_turns(cells[:2], workload)
    assert exact(again) == exact(together[:2])
    assert len(trials.copies) == len(cells)


def test_rounds_in_turns_are_saved_reported_and_continued(config):
    run_bench(config(strategies=("adaskip", "unified"), rounds=1))
    outcome = run_bench(config(strategies=("adaskip", "unified"), rounds=2))
    result, (workload,) = outcome.result, outcome.result.workloads
    assert outcome.complete
    assert result.rounds_of(workload) == 2
    assert len(result.of(workload, Cell(FULL))) == 2 * 2  # the cells are one group
    assert {entry["strategy"] for entry in result.entries} == {FULL, "adaskip", "unified"}
    page = result_markdown(result)
    assert "up to 8 cells in turns of a layer or a step" in page
    assert ("The process keeps the memory that it frees" in page) == (result.identity.get("freed_memory") == "kept")
    with pytest.raises(ValueError, match="holds a measurement with another clock"):
        run_bench(config(strategies=("adaskip", "unified"), clock="process"))


def test_the_warm_up_runs_each_copy_once(config, monkeypatch):
    groups = []
    stock = Trials.run_in_turns
    monkeypatch.setattr(
        Trials, "run_in_turns", lambda self, cells, work: groups.append(len(cells)) or stock(self, cells, work)
    )
    run_bench(config(strategies=("adaskip", "unified"), budgets=(2, 4), phases=("prefill", "decode"), rounds=1))
    assert groups == [8, 8, 5]


def test_plain_steps_decide_draft_nothing_and_are_reported(config, model, monkeypatch):
    made = []
    stock = NeverDrafting.with_strategy
    monkeypatch.setattr(NeverDrafting, "with_strategy", lambda *args: made.append(stock(*args)) or made[-1])
    outcome = run_bench(config(study="plain_steps", new_tokens=12, phases=("decode",)))
    result, (workload,) = outcome.result, outcome.result.workloads
    plain = Cell(PLAIN_STEPS, "decode", 2)
    assert [record["cell"]["name"] for record in result.of(workload)] == [FULL, PLAIN_STEPS, FULL] * 2
    assert len(result.of(workload, plain)[0]["steps_s"]) == 11
    assert len(made) == 3
    for request in (decoder.last_request for decoder in made):
        assert (request.verify_forwards, request.draft_forwards, request.copied) == (11, 0, 0)
    rows = [row for row in rows_of([result]) if row.figure.startswith("lossless mode, nothing drafted")]
    assert [row.figure.split(": ")[1] for row in rows] == [
        f"{phase}, float32, AdaSkip's 2 in decode as drafts" for phase in ("prefill", "decode")
    ]


def test_plain_steps_give_the_full_models_tokens_and_ask_every_source(model, monkeypatch):
    strategy = FixedPlan(num_layers=LAYERS, plan=SkipPlan.of_layers([1]))
    decoder = NeverDrafting.with_strategy(model, strategy)
    asked = []
    monkeypatch.setattr("adaskip.speculative.ngrams.NGrams.survival", lambda self, most: asked.append(most) or [0.99])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, custom_generate=decoder, **options), model.generate(IDS, **options))
    assert asked == [3, 2, 1]


def test_the_in_place_cache_is_used_and_reported(config, model, monkeypatch):
    made = []
    stock = InPlaceCache.__init__
    monkeypatch.setattr(InPlaceCache, "__init__", lambda self, **given: made.append(self) or stock(self, **given))
    outcome = run_bench(config(study="cache", new_tokens=6))
    result, (workload,) = outcome.result, outcome.result.workloads
    assert [record["cell"]["name"] for record in result.of(workload)] == [FULL, IN_PLACE, FULL] * 2
    assert [cache.get_seq_length() for cache in made] == [workload.prompt_tokens + 5] * 3
    rows = [row for row in rows_of([result]) if row.figure.startswith("in-place cache / stock cache")]
    assert [row.figure.split(": ")[1] for row in rows] == ["prefill, float32", "decode, float32"]
