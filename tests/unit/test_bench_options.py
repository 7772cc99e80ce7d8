"""Options, figures and scripts of the benchmark, and the random models and assumed sets that it can measure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from adaskip.cli import main
from adaskip.common.configs import load_yaml
from adaskip.common.options import resolve
from adaskip.core.plan import Budget, Sublayer
from adaskip.models.loading import architecture
from adaskip.models.registry import registry
from adaskip.profiles.assumed import assumed_profile, assumed_ranking
from adaskip.strategies import AdaSkip, SkipDecode, build
from adaskip.studies.bench.settings import (
    MODES,
    STUDIES,
    BenchConfig,
    figure_settings,
)
from adaskip.studies.bench.subject import random_model
from adaskip.studies.bench.trials import decode_plans, shares
from tests.tiny_bench import ids, tiny_model

ROOT = Path(__file__).resolve().parents[2]


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
