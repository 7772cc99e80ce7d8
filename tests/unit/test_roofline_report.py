"""What `speed/roofline.py` predicts, beside naive twins, and the files it writes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import MistralConfig

from adaskip.core.plan import EMPTY_PLAN, SkipPlan, Sublayer
from adaskip.models.loading import architecture
from adaskip.profiles.assumed import ASSUMED, assumed_profile
from adaskip.roofline import Ceilings, ModelShape, forward_seconds, known_ceilings
from adaskip.studies.bench.settings import Workload
from adaskip.studies.limits.command import RooflineConfig, main, predict_all, write
from adaskip.studies.limits.launches import Launches
from adaskip.studies.limits.predictions import (
    ATTENTION_ALONE,
    Device,
    Way,
    compare,
    find_crossover,
    published_speedups,
    seconds,
    speedup_of_kind,
    ways,
)
from adaskip.studies.limits.report import gap_table, launch_table
from adaskip.studies.tables.paper import load_paper
from tests.families import random_model
from tests.saved_benchmarks import GPU, LLAMA_8B, add_strategies, result_of, save

L20 = known_ceilings("L20")
WORK = Workload(prompt_tokens=8000, new_tokens=6)
LLAMA = ModelShape.of(architecture("llama"))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Beside a measured prompt of 512 tokens on an L20."""
    out_dir, measured_dir = (tmp_path_factory.mktemp(name) for name in ("roofline", "measured"))
    result = result_of(measured_dir, "gpu_saving", "strategies", LLAMA_8B, device=GPU)
    add_strategies(result, Workload(512, 25), ("prefill",), (8,))
    save(result)
    sizes = {"models": ("llama",), "devices": ("L20", "H200"), "budgets": (8,), "new_tokens": 4}
    config = RooflineConfig(**sizes, measured_dir=str(measured_dir), output_dir=str(out_dir))
    assert [path.name for path in write(config, predict_all(config))] == [
        "roofline.md",
        "roofline.json",
        "sublayers.png",
        "sublayers.svg",
    ]
    return out_dir


def test_full_model_and_every_strategy_in_every_phase_are_predicted(written):
    record = json.loads((written / "roofline.json").read_text())
    assert len(record["predictions"]) == 2 * len(ways([8])) == 2 * 3 * 5
    assert {p["device"] for p in record["predictions"]} == {"L20", "H200"}
    assert record["adaskip_set"] == ASSUMED
    assert record["manifest"]["config"]["new_tokens"] == 4
    full = [p for p in record["predictions"] if p["way"]["strategy"] == "full"]
    assert all(p["ttft_speedup"] == p["tpot_speedup"] == 1 for p in full)


def test_the_figure_is_drawn(written):
    assert np.asarray(Image.open(written / "sublayers.png").convert("L")).std() > 5


def test_the_document_has_the_papers_number_beside_the_predictions(written):
    lines = (written / "roofline.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    row = next(row for row in cells if row[:4] == ["llama", "decode", "16", "AdaSkip"])
    paper = load_paper().tables["decode"].speedup("llama", "adaskip", 0.25)
    assert row[4] == f"{paper:.2f}" == "1.32"
    full = forward_seconds(LLAMA, EMPTY_PLAN, tokens=8000, context=8000, ceilings=L20)
    assert ["0", "Full model", f"{1000 * full:.4g}"] in [row[:3] for row in cells]


def test_the_document_has_measured_speedups_beside_those_predicted_for_them(written):
    lines = (written / "roofline.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    way = [GPU, "llama", "1 x 512 + 25", "AdaSkip", "prefill", "8", "eager"]
    assert [*way, "1.11", "1.11 [1.11, 1.11]", "1.11", "1.11 [1.11, 1.11]", "gpu_saving"] in rows
    (measured,) = json.loads((written / "roofline.json").read_text())["measured"]
    assert measured["predicted_decode"] == pytest.approx(1 / 0.9)
    assert measured["measured_decode"]["value"] == pytest.approx(1 / 0.9)


def test_a_model_that_is_not_listed_is_predicted_under_its_own_name(tmp_path):
    random_model("qwen2", num_layers=3).config.save_pretrained(folder := tmp_path / "Tiny-Qwen2")
    config = RooflineConfig(models=(str(folder),), devices=("L20",), budgets=(2,), new_tokens=2, prompt_tokens=9)
    roofline = predict_all(config)
    assert {p["model"] for p in roofline.predictions} == set(roofline.operators) == {"Tiny-Qwen2"}
    assert roofline.explained == []  # the paper has no such model


def test_a_document_without_measurements_says_so(tmp_path):
    sizes = {"models": ("llama",), "devices": ("L20",), "budgets": (8,), "new_tokens": 2}
    roofline = predict_all(RooflineConfig(**sizes, measured_dir=str(tmp_path / "none"), output_dir=str(tmp_path)))
    assert roofline.to_dict()["measured"] == []
    title = "## Beside what the benchmark measured"
    assert f"{title}\n\nNothing is measured yet: `adaskip bench` times" in roofline.to_markdown("figure.png")


@pytest.mark.parametrize(
    "way", [Way("prefill", "early_exit", 8), Way("e2e", "adaskip", 8), Way("decode", "unified", 12)]
)
def test_speedups_equal_the_forwards_summed_by_hand(way):
    profile = assumed_profile(32)
    skipped = {
        "early_exit": SkipPlan.of_layers(range(28, 32)),
        "adaskip": SkipPlan(attention=frozenset(range(26, 32)), ffn=frozenset({30, 31})),
        "unified": SkipPlan.of_layers(1 + i * 32 // 6 for i in range(6)),
    }[way.strategy]

    def prefill(plan: SkipPlan) -> float:
        return forward_seconds(LLAMA, plan, tokens=8000, context=8000, ceilings=L20)

    def decode(plan: SkipPlan) -> float:
        return sum(forward_seconds(LLAMA, plan, tokens=1, context=8000 + step, ceilings=L20) for step in range(1, 6))

    (prediction,) = compare("llama", LLAMA, Device(L20), WORK, [way], profile)
    prompt = EMPTY_PLAN if way.phase == "decode" else skipped
    assert prediction["ttft_speedup"] == pytest.approx(prefill(EMPTY_PLAN) / prefill(prompt))
    assert prediction["tpot_speedup"] == pytest.approx(decode(EMPTY_PLAN) / decode(skipped))


def test_speedups_of_the_paper_are_all_there_and_adaskips_stand_for_attention_alone():
    published = published_speedups("internlm")
    assert published[Way("prefill", "adaskip", 16)] == published[Way("prefill", ATTENTION_ALONE, 16)] == 1.51
    assert len(published) == 2 * 2 * 5  # phases with speedups, budgets, strategies and attention alone
    assert published_speedups("gpt2") == {}
    strategy = Way("decode", ATTENTION_ALONE, 3).build(32, assumed_profile(32), 8)
    assert strategy is not None
    assert strategy.decode_plan(1).to_dict() == {"attention": [29, 30, 31], "ffn": []}


@given(
    st.sampled_from(["prefill", "decode"]),
    st.sampled_from(["fused", "eager"]),
    st.floats(1e12, 1e15),
    st.floats(1e11, 1e13),
)
def test_attention_overtakes_the_ffn_exactly_at_the_crossover(step, attention, flops, bandwidth):
    device = Ceilings("any", flops, bandwidth)
    context = find_crossover(LLAMA, step, device, attention)
    assert context is not None

    def lead(context: int) -> float:
        of_attention = seconds(LLAMA, "attention", step, context, device, attention)
        return of_attention - seconds(LLAMA, "ffn", step, context, device, attention)

    assert lead(context - 1) < 0 <= lead(context)
    assert lead(2 * context) > 0


def test_skipping_attention_wins_just_beyond_the_crossover_and_loses_before_it():
    context = find_crossover(LLAMA, "decode", L20)
    assert context is not None
    for at, attention_wins in ((context + 2, True), (context - 2, False)):
        attention, ffn = (speedup_of_kind(LLAMA, kind, "decode", at, L20, 16) for kind in ("attention", "ffn"))
        assert (attention > ffn) is attention_wins


def test_a_window_keeps_attention_below_the_ffn_for_good():
    config = architecture("llama").to_dict() | {"sliding_window": 64, "num_hidden_layers": 1}
    config.pop("model_type")
    shape = ModelShape.of(MistralConfig(**config))
    assert find_crossover(shape, "decode", L20) is None


def test_launches_count_what_a_plan_leaves():
    launches = Launches(architecture("llama"))
    counts = launches.by_kind()
    assert counts["attention"] > counts["ffn"] > 5
    layers = SkipPlan.of_layers(range(1, 9))
    assert launches.of(layers) == counts["step"] - 8 * (counts["attention"] + counts["ffn"])
    scaled = SkipPlan.of_sublayers({Sublayer("ffn", 3): 1.05})
    assert launches.of(scaled) == counts["step"] - counts["ffn"] + 1  # the multiplication by the scale


def test_an_ffn_dispatches_its_operators():
    norm = len(["to float32", "square", "mean", "+ epsilon", "rsqrt", "times that", "to bfloat16", "times weight"])
    ffn = len(["gate", "up", "down", "SiLU", "gate times up"])
    residual = 1
    assert Launches(architecture("vicuna")).by_kind()["ffn"] == norm + ffn + residual


def test_the_time_an_operator_may_take_is_the_tokens_time_over_the_operators():
    predictions = compare("llama", LLAMA, Device(L20), WORK, ways([8]), assumed_profile(32))
    table = launch_table(predictions, {"llama": {"step": 1302}})
    token = mean(forward_seconds(LLAMA, EMPTY_PLAN, tokens=1, context=8000 + n, ceilings=L20) for n in range(1, 6))
    assert table.splitlines()[2].split() == ["|", "llama", "|", "1302", "|", f"{1e6 * token / 1302:.1f}", "|"]


def test_gaps_are_means_and_the_nearest_is_named():
    def explained(strategy: str, paper: float, fused: float, eager: float, launches: float) -> dict:
        way = {"phase": "decode", "strategy": strategy, "sublayers": 8}
        return {"model": "llama", "way": way, "paper": paper, "fused": fused, "eager": eager, "launches": launches}

    cases = [
        explained("adaskip", 1.1, 1.0, 1.2, 1.15),
        explained("adaskip", 1.2, 1.2, 1.3, 1.25),
        explained(ATTENTION_ALONE, 1.1, 9, 9, 9),
    ]
    cells = [cell.strip() for cell in gap_table(cases).splitlines()[2].split("|")[1:-1]]
    assert cells == ["llama", "decode", "AdaSkip", "-0.05", "+0.10", "+0.05", "ceilings = launches"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "h100"], "error: unknown device 'h100'. Did you mean 'H100'? Available: L20,"),
        (["--models", "lama"], "error: unknown model 'lama'. Did you mean 'llama'?"),
        (["--new-tokens", "1"], "error: --new-tokens must be at least 2, not 1"),
        (["--budgets", "7"], "error: a whole-layer strategy needs an even number of sublayers; got 7"),
        (["--measure", "--device", "tpu"], "error: cannot measure device 'tpu'; present here: cpu"),
        (["--device", "cpu"], "error: --device needs --measure"),
        (["--models", "llama", "--profile", "none.json"], "error: --profile none.json does not exist"),
    ],
)
def test_a_users_mistake_is_one_line_and_writes_nothing(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed/roofline.py", *options, "--output-dir", str(tmp_path / "out")])
    assert main("About.") == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_script_is_the_command(monkeypatch, capsys):
    script = Path(__file__).parents[2] / "speed" / "roofline.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(script), run_name="__main__")
    assert left.value.code == 0
    assert "--prompt-tokens" in capsys.readouterr().out
