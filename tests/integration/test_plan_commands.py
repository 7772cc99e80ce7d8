"""`adaskip plan`, `show` and `export` from the command line: what they print and write, and their refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from adaskip import from_pretrained, testbed
from adaskip.cli import main
from adaskip.core.context import skipping
from adaskip.core.plan import PLAN_FILE, SkipPlan
from tests.families import random_model
from tests.tiny_runs import ROOT, make_checkpoint

TESTBED = ["plan", "--testbed", "--model", "llama"]
LLAMA = str(testbed.checkpoint_dir("llama"))


def plan_of(away, *options):
    assert main([*TESTBED, *options, "--output", "plan"]) == 0
    return SkipPlan.from_pretrained(away / "plan")


def test_a_plan_is_made_shown_and_exported(away, capsys):
    plan = plan_of(away, "--strategy", "unified", "--budget", "4", "--phase", "prefill", "--base-model", "org/tiny")
    assert "4 of 32 sublayers, phase prefill; in plan" in capsys.readouterr().out
    assert main(["show", "plan", "--plot", "plan.png"]) == 0
    shown = capsys.readouterr().out
    assert "strategy       name unified" in shown
    assert "attention  .#.......#......\nffn        .#.......#......\n" in shown
    assert (away / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert main(["export", "plan", "--to", "hf", "--model", LLAMA, "--output", "out"]) == 0
    assert "4 sublayers left out; in out\ndistance " in capsys.readouterr().out
    report = json.loads((away / "out" / "adaskip_export.json").read_text())
    assert report["verified"]["distance"] <= report["verified"]["limit"]
    assert SkipPlan.from_pretrained(away / "out").origin == plan.origin
    assert len(AutoModelForCausalLM.from_pretrained(away / "out").model.layers) == 14


@pytest.mark.parametrize("threads", [1, 2])
def test_a_plan_is_measured_with_the_given_threads(threads, away):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - threads)
        plan_of(away, "--strategy", "unified", "--budget", "4", "--threads", str(threads))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_plan_of_a_measured_strategy_folds_its_scales(away):
    assert main(["calibrate", "--testbed", "--model", "llama", "--samples", "2", "--output", "p.json"]) == 0
    plan = plan_of(away, "--strategy", "adaskip", "--budget", "3", "--profile", "p.json")
    assert plan.origin.options == {"learning_window": 0, "beta_quantile": None}
    assert plan.origin.profile["kind"] == "ImportanceProfile"
    assert main(["export", "plan", "--to", "hf", "--output", "out"]) == 0  # the plan names the model's folder
    exported = from_pretrained(away / "out", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(LLAMA, dtype="float32").eval()
    prompt = model.dummy_inputs["input_ids"][:1]
    options = {"max_new_tokens": 8, "do_sample": False}
    with skipping(model, plan):
        expected = model.generate(prompt, **options)
    assert exported.generate(prompt, **options).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategy", "full"], "the full model skips nothing"),
        (["--strategy", "skipdecode", "--budget", "4"], "changes its set during an answer"),
        (["--strategy", "adaskip", "--budget", "4", "--profile", "none.json"], "--profile none.json does not exist"),
        (["--strategy", "early_exit", "--budget", "99"], "too large"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_plan_that_cannot_be_is_one_line(options, message, away, capsys):
    assert main([*TESTBED, *options, "--output", "plan"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (away / "plan").exists()


def test_a_relative_folder_is_recorded_by_its_absolute_path(away):
    make_checkpoint(away / "models" / "tiny")
    command = ["plan", "--model", "models/tiny", "--strategy", "early_exit", "--budget", "2", "--output", "plan"]
    assert main(command) == 0
    assert SkipPlan.from_pretrained("plan").origin.model == str(away / "models" / "tiny")
    assert "base_model" not in (away / "plan" / "README.md").read_text()
    assert from_pretrained("plan").config.num_hidden_layers == 3
    (away / "models" / "tiny").rename(away / "moved")
    with pytest.raises(ValueError, match=f"{away}/models/tiny' does not exist"):
        from_pretrained("plan")


def test_a_readme_of_somebody_else_is_kept_before_anything_is_measured(away, capsys, monkeypatch):
    (away / "plan").mkdir()
    (away / "plan" / "README.md").write_text("# Mine")
    monkeypatch.setattr("adaskip.runs.loading.Loading.load", lambda *args: pytest.fail("was loaded"))
    assert main([*TESTBED, "--strategy", "adaskip", "--budget", "4", "--output", "plan"]) == 2
    assert "README.md was not written by adaskip" in capsys.readouterr().err
    assert [path.name for path in (away / "plan").iterdir()] == ["README.md"]


def test_online_learning_that_is_asked_for_is_refused(away, capsys):
    assert main(["calibrate", "--testbed", "--model", "llama", "--samples", "1", "--output", "p.json"]) == 0
    options = ["--strategy", "adaskip", "--budget", "4", "--profile", "p.json", "--learning-window", "5"]
    assert main([*TESTBED, *options, "--output", "plan"]) == 2
    assert "learning_window=0" in capsys.readouterr().err


def test_exports_that_cannot_be_are_one_line_and_write_nothing(away, capsys):
    plan_of(away, "--strategy", "early_exit", "--budget", "4", "--phase", "decode")
    make_checkpoint(away / "other")
    random_model("llama").save_pretrained(away / "bin", safe_serialization=True)
    (away / "bin" / "model.safetensors").rename(away / "bin" / "pytorch_model.bin")
    corrupt = away / "corrupt"
    corrupt.mkdir()
    (corrupt / PLAN_FILE).write_text("{")
    capsys.readouterr()
    for options, message in [
        (["plan", "--to", "hf"], "changes its plan between prompt and answer"),
        (["plan", "--to", "hf", "--model", "other"], "has 16 layers, but the model has 3"),
        (["plan", "--to", "hf", "--model", "bin"], ".bin weights; allowed: safetensors"),
        (["plan", "--to", "onnx"], "unknown engine 'onnx'"),
        (["corrupt", "--to", "hf"], "is not JSON"),
        (["nothing", "--to", "hf"], "or a published name"),
        (["--to", "hf"], "missing PLAN"),
    ]:
        assert main(["export", *options, "--output", "out"]) != 0
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not (away / "out").exists()


def test_a_plan_of_other_weights_is_exported_only_if_told_to(away, capsys):
    plan_of(away, "--strategy", "early_exit", "--budget", "4")
    other = AutoModelForCausalLM.from_pretrained(LLAMA)
    other.model.norm.weight.data.mul_(1.5)
    other.save_pretrained(away / "other")
    command = ["export", "plan", "--to", "hf", "--model", "other", "--output", "out"]
    assert main(command) == 2
    assert "--allow-other-weights" in capsys.readouterr().err
    assert main([*command, "--allow-other-weights"]) == 0


def test_nothing_is_published_under_no_name(away, capsys, monkeypatch):
    monkeypatch.setattr("adaskip.common.named_files.PUBLISHED", away)
    assert main(["show"]) == 0
    assert capsys.readouterr().out == "nothing is published\n"


@pytest.mark.slow
def test_a_killed_export_leaves_no_output_and_the_next_one_clears_up(away):
    plan_of(away, "--strategy", "early_exit", "--budget", "4")
    code = "import sys, time; from adaskip.engines import hf_export as e; e.verify = lambda *a: time.sleep(600); "
    code += "from adaskip.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "export", "plan", "--to", "hf", "--output", "out"]
    process = subprocess.Popen(command, cwd=away, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        while not list(away.glob(".out.*.tmp/model.safetensors")):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (away / "out").exists()
    assert main(["export", "plan", "--to", "hf", "--output", "out"]) == 0
    assert sorted(path.name for path in away.iterdir()) == ["out", "plan"]
