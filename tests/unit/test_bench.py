"""The benchmark: what it times, that it continues, and that a memory too small ends one prompt length only."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from adaskip.cli import main
from adaskip.common.configs import load_yaml
from adaskip.common.locks import LockedError, exclusive
from adaskip.common.options import resolve
from adaskip.core import context, patching
from adaskip.core.plan import EMPTY_PLAN, Budget, SkipPlan, Sublayer
from adaskip.models.loading import architecture
from adaskip.models.registry import registry
from adaskip.profiles.assumed import assumed_profile, assumed_ranking
from adaskip.roofline import Ceilings
from adaskip.strategies import FULL, AdaSkip, FixedPlan, SkipDecode, build
from adaskip.studies.bench import measuring, settings
from adaskip.studies.bench.measuring import run_bench
from adaskip.studies.bench.results import Result, load_result, ratio
from adaskip.studies.bench.settings import (
    BREAKDOWN,
    COMPARISONS,
    COMPILED,
    COUNTS,
    MODES,
    REFERENCE_EVERY,
    STUDIES,
    BenchConfig,
    Cell,
    Workload,
    cells_of,
    figure_settings,
    rotated,
    with_references,
)
from adaskip.studies.bench.subject import Subject, random_model
from adaskip.studies.bench.timing import StaticCaches, Stopwatch, check_kv, count_work, sublayer_times, timed_generation
from adaskip.studies.bench.trials import Trials, decode_plans, shares

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 4
CPU = torch.device("cpu")


def tiny_model(device: torch.device = CPU):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return random_model(config, device, torch.float32, "sdpa")


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


def ids(length: int) -> torch.Tensor:
    return torch.arange(length)[None] % 64


def test_a_generation_has_the_time_of_every_token(subject):
    timed = timed_generation(subject.model, None, ids(8), 5, "wall")
    assert timed.ttft_s > 0
    assert len(timed.steps_s) == 4
    assert min(timed.steps_s) > 0


def test_the_breakdown_times_every_sublayer_of_every_forward_within_the_whole(subject):
    before = [dict(vars(layer)) for layer in subject.model.model.layers]
    timed, forwards = sublayer_times(subject.model, ids(8), 3, "wall")
    assert [len(forward) for forward in forwards] == [2 * LAYERS] * 3
    assert min(map(min, forwards)) > 0
    assert sum(map(sum, forwards)) < timed.ttft_s + sum(timed.steps_s)
    assert [dict(vars(layer)) for layer in subject.model.model.layers] == before


def test_counted_operations_are_the_stock_ones_with_nothing_to_skip_and_fewer_with_something(subject):
    stock = count_work(subject.model, None, ids(8))
    nothing = count_work(subject.model, FixedPlan(num_layers=LAYERS, plan=EMPTY_PLAN), ids(8))
    fewer = count_work(subject.model, FixedPlan(num_layers=LAYERS, plan=SkipPlan.of_layers([1])), ids(8))
    assert nothing["torch_operations"] == stock["torch_operations"]
    assert nothing["python_calls"]["decode_step"] > stock["python_calls"]["decode_step"]
    for phase in ("prefill", "decode_step"):
        assert fewer["torch_operations"][phase] < stock["torch_operations"][phase]


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_kv_bytes_are_exactly_those_of_the_live_layers(subject, phase):
    strategy = FixedPlan(num_layers=LAYERS, plan=SkipPlan(attention={0, 2}), phase=phase)
    check = check_kv(subject.model, strategy, ids(8), 3)
    per_layer = 2 * 2 * 8 * 4  # keys and values, heads, head size, bytes
    assert check["bytes_before_decode"] == check["expected_before_decode"] == 2 * per_layer * 8
    assert check["bytes_at_end"] == check["expected_at_end"] == 2 * per_layer * 10
    assert check["all_layers_at_end"] == 2 * check["expected_at_end"]
    assert check["kept_alive"] == []


def test_kv_that_somebody_keeps_is_seen(subject, monkeypatch):
    kept, stock = [], patching.release_skipped

    def keep_and_release(cache, *args):
        kept.extend(layer.keys for layer in cache.layers)
        stock(cache, *args)

    monkeypatch.setattr(patching, "release_skipped", keep_and_release)
    strategy = FixedPlan(num_layers=LAYERS, plan=SkipPlan(attention={2}), phase="decode")
    assert check_kv(subject.model, strategy, ids(8), 3)["kept_alive"] == [2]


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


def test_assumed_sets_are_mostly_attention_in_late_layers():
    first = assumed_ranking(32)[:8]
    assert [s.layer for s in first if s.kind == "attention"] == [31, 30, 29, 28, 27, 26]
    assert [s.layer for s in first if s.kind == "ffn"] == [31, 30]
    strategy = AdaSkip(num_layers=32, budget=Budget(sublayers=8), profile=assumed_profile(32))
    assert {s for s in assumed_ranking(32) if s in strategy.skipped} == set(first)
    assert sorted(assumed_ranking(5)) == sorted(Sublayer(k, i) for k in ("attention", "ffn") for i in range(5))


def test_shares_of_the_steps_follow_the_schedule():
    strategy = SkipDecode(num_layers=8, budget=Budget(layers=4), max_decode_steps=4, phase="decode")
    plans = decode_plans(strategy, 4, online_ffns=())
    for step in (1, 4):
        skipped = [float(i in strategy.decode_plan(step).ffn) for i in range(8)]
        assert shares([plans[step - 1]], 8) == {"attention": skipped, "ffn": skipped}
    assert sum(shares(plans, 8)["ffn"]) == sum(len(strategy.decode_plan(t).ffn) for t in range(1, 5)) / 4


def test_online_ffns_count_from_the_end_of_the_window_on():
    strategy = build(
        "adaskip", phase="e2e", budget=Budget(sublayers=2), num_layers=4, profile=assumed_profile(4), learning_window=3
    )
    assert strategy is not None
    plans = decode_plans(strategy, 5, online_ffns=(0,))
    assert [0 in plan.ffn for plan in plans] == [False, False, False, True, True]


@pytest.mark.parametrize(("name", "billions"), [("llama", 8.03), ("internlm", 7.32), ("vicuna", 6.74)])
def test_a_bare_architecture_has_the_published_size(name, billions):
    model = random_model(architecture(name), torch.device("meta"), torch.bfloat16, "sdpa")
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_random_weights_are_usable_numbers():
    model = tiny_model()
    assert model(ids(8)).logits.isfinite().all()
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.model.norm.weight, torch.ones(32))
    assert torch.equal(tiny_model().lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_weights": True, "testbed": True}, "--random-weights, --testbed all choose the weights"),
        ({"model": "llama-100m"}, "llama-100m has no checkpoint: give --random-weights"),
        ({"clock": "process"}, "so it needs --threads 1"),
        (
            {"clock": "turns", "device": "cpu"},
            "--clock turns needs one of --study strategies, overhead, plain_steps, cache",
        ),
        ({"study": "cache", "modes": ("compiled",)}, "--study cache needs --modes eager"),
        ({"study": "plain_steps", "batch_sizes": (2,)}, "--study plain_steps needs --modes eager and --batch-sizes 1"),
        ({"clock": "turns", "threads": 1}, "and --device cpu --threads 1 --modes eager"),
        ({"clock": "turns", "device": "cpu", "threads": 1, "study": "window"}, "--clock turns needs one of"),
        (
            {"clock": "turns", "device": "cpu", "threads": 1, "modes": ("compiled",)},
            "--clock turns needs one of",
        ),
        ({"new_tokens": 1}, "--new-tokens must be at least 2"),
        ({"prompt_tokens": (8, 8)}, "--prompt-tokens names something twice: 8 8"),
        ({"budgets": (0,)}, "--budgets must be at least 1, not 0"),
        ({"strategies": ("adaskipp",)}, "Did you mean 'adaskip'"),
        ({"modes": ("fast",)}, "unknown --modes 'fast'"),
        ({"strategies": ("pop",), "phases": ("prefill", "e2e")}, "with --phases: not defined are pop in phase e2e"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BenchConfig(**options)


@pytest.mark.parametrize("block", ["cpu", "testbed", "real", "cuda", "engines"])
def test_the_makefile_runs_every_figure_and_each_is_a_valid_measurement(block):
    names = tuple(load_yaml("bench")[block])
    variables = {
        "cpu": "BENCH",
        "testbed": "BENCH_TESTBED",
        "real": "BENCH_REAL",
        "cuda": "BENCH_GPU",
        "engines": "BENCH_ENGINES",
    }
    variable = variables[block]
    (line,) = re.findall(rf"^{variable} := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert tuple(line.split()) == names
    for name in names:
        config = resolve(BenchConfig, {"figure": name}, preset=figure_settings)
        assert config.result_name == name
        assert config.device == ("cuda" if block == "cuda" else "cpu")
        if block == "cuda" and config.study != "kv":
            assert config.time_limit_s is not None
            assert config.time_limit_s <= 600


def test_unknown_figures_are_refused_with_a_suggestion(capsys):
    assert main(["bench", "--figure", "gpu_savings"]) == 2
    assert "Did you mean 'gpu_saving'?" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_without_cuda_a_gpu_figure_is_one_line(capsys, tmp_path):
    assert main(["bench", "--figure", "gpu_kv", "--output-dir", str(tmp_path)]) == 2
    assert re.fullmatch(r"error: --device cuda: .* finds no CUDA device; use cpu\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_speed_scripts_name_their_model_and_nothing_else():
    names = {path.name: path.read_text() for path in (ROOT / "speed").glob("run_*_speed.py")}
    assert names.keys() == {f"run_{model}_speed.py" for model in registry()}
    for name, text in names.items():
        assert f'run_speed(model="{name.split("_")[1]}")' in text


def test_modes_and_studies_are_described():
    assert all(MODES.values())
    assert all(STUDIES.values())


def test_laps_lie_between_marks():
    stopwatch = Stopwatch(CPU, "process")
    for _ in range(3):
        stopwatch.mark()
    assert len(stopwatch.laps()) == 2
    assert min(stopwatch.laps()) >= 0


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


def test_a_cells_static_cache_is_used_again_as_if_new():
    """After a generation that skipped attention it holds stand-ins; emptied, it serves the stock model."""
    model, caches = tiny_model(), StaticCaches()
    cell, work = Cell("early_exit", "e2e", 2, COMPILED), Workload(6, 4)
    ids = torch.arange(6)[None]
    plan = FixedPlan(num_layers=LAYERS, plan=SkipPlan(attention={1}), phase="decode")
    cache = caches.emptied(cell, work, model)
    for _ in range(2):
        with context.skipping(model, plan):
            skipped = model.generate(
                ids, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, disable_compile=True
            )
        assert caches.emptied(cell, work, model) is cache
        assert int(cache.get_seq_length()) == 0
        stock = model.generate(ids, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, disable_compile=True)
        assert torch.equal(stock, model.generate(ids, max_new_tokens=4, min_new_tokens=4))
        assert caches.emptied(cell, work, model) is cache
        assert skipped.shape == stock.shape
    other = caches.emptied(cell, Workload(8, 4), model)
    assert list(caches.caches.values()) == [other]
