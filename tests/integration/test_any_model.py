"""A model that no list knows goes all the way: calibrate, run, grid, scores and tables."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from adaskip import cli
from tests.checkpoints import write_family
from tests.integration.test_real_road import script
from tests.tiny_runs import NUM_SAMPLES, NUM_SHORT, cell, error_of, make_checkpoint

NAME = "Qwen2.5-Tiny-Instruct"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random Qwen2 of five layers with a tokenizer."""
    path = tmp_path_factory.mktemp("models") / NAME
    tokenizer = AutoTokenizer.from_pretrained(write_family("llama", tmp_path_factory.mktemp("tokenizer")))
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen2Config(vocab_size=len(tokenizer) + 8, num_key_value_heads=1, initializer_range=0.5, **size, **ends)
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def given(folder, data_dir) -> list[str]:
    """What every command is given."""
    return ["--data-dir", str(data_dir), "--device", "cpu", "--threads", "1"]


def run(folder: Path, *options: str) -> list[str]:
    return ["run", *cell("adaskip", "prefill", "", str(folder)), *options]


def manifest(tmp_path: Path, label: str) -> dict:
    return json.loads((tmp_path / "results/runs" / label / "manifest.json").read_text())


def test_a_folder_of_another_family_is_calibrated_run_scored_and_tabulated(
    folder, given, tmp_path, away, monkeypatch, capsys
):
    assert cli.main(["calibrate", "--model", str(folder), *given]) == 0
    (profile,) = (tmp_path / "results/profiles").glob("*.json")
    assert profile.name.startswith(f"{NAME}-")
    assert cli.main(run(folder, *given)) == 0
    assert list((tmp_path / "results/profiles").glob("*.json")) == [profile]
    label = f"{NAME}-ADA-PREFILL/2-sublayers"
    assert f"{label}: {3 * NUM_SAMPLES} samples" in capsys.readouterr().out
    found = manifest(tmp_path, label)
    assert (found["model"], found["num_layers"], found["max_prompt_tokens"]) == (NAME, 5, 32768 - 512)
    assert found["budget"] == {"sublayers": 2, "layers": 1.0, "fraction": 0.2}
    assert script(monkeypatch, f"eval/eval.py --model {NAME}-ADA-PREFILL") == 0
    assert "2 of 10" in capsys.readouterr().out
    assert script(monkeypatch, f"eval/eval.py --model {NAME}-ada-prefill") == 0
    assert script(monkeypatch, "eval/tables.py") == 0
    assert NAME in (tmp_path / "results/tables/table3_prefill.md").read_text()


def test_a_grid_of_a_folder_and_its_dry_run(folder, given, tmp_path, away, capsys, monkeypatch):
    forked = multiprocessing.get_context("fork")  # its workers import nothing anew
    monkeypatch.setattr("adaskip.runs.grid.multiprocessing.get_context", lambda method: forked)
    grid = ["grid", "--models", str(folder), "--phases", "decode", "--strategies", "full", "unified", "--limit", "1"]
    assert cli.main([*grid, *given, "--max-new-tokens", "2"]) == 0
    assert "2 of 2 cells complete" not in capsys.readouterr().err
    assert cli.main([*grid, *given, "--max-new-tokens", "2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"{NAME}-US-DECODE/2-sublayers" in out
    assert "missing" not in out


@pytest.mark.parametrize(
    ("budget", "sublayers"),
    [
        (["--skip_sub_layer_num", "8"], 8),
        (["--skip_full_layer_num", "4"], 8),
        (["--alpha", "1.25"], 2),
        (["--fraction", "0.3"], 3),
    ],
)
def test_a_budget_is_what_is_typed_at_any_depth(folder, given, tmp_path, away, budget, sublayers):
    assert cli.main(run(folder, *given, "--limit", "1", "--tasks", "trec", *budget)) == 0
    assert manifest(tmp_path, f"{NAME}-ADA-PREFILL/{sublayers}-sublayers")["budget"]["sublayers"] == sublayers


@pytest.mark.parametrize(
    ("strategy", "budget", "says"),
    [
        ("adaskip", ["--skip_full_layer_num", "5"], "budget of 10 sublayers (layers=5) is too large; allowed for 5"),
        ("adaskip", ["--fraction", "0.04"], "--fraction 0.04 of 10 sublayers (5 layers) is none to the nearest sub"),
        ("early_exit", ["--fraction", "0.95"], "(5 layers) is all of them to the nearest layer; allowed: 0.2 to 0.8"),
        ("adaskip", ["--fraction", "1.5"], "--fraction must be above 0 and below 1, e.g. 0.125; given: 1.5"),
        ("adaskip", ["--fraction", "0.5", "--alpha", "1.1"], "takes one budget:"),
        ("full", ["--fraction", "0.5"], "the full model skips nothing and takes no budget; given: --fraction 0.5"),
    ],
)
def test_a_budget_that_the_depth_cannot_hold_is_one_line(folder, given, away, capsys, strategy, budget, says):
    assert cli.main(["run", *cell(strategy, "prefill", "", str(folder)), *given, *budget]) == 2
    assert says in error_of(capsys)


def test_prompts_are_cut_at_the_limit_given_and_the_manifest_says_so(folder, given, tmp_path, away, capsys):
    label, short = f"{NAME}-ADA-PREFILL/2-sublayers", ["--limit", "1", "--tasks", "trec"]
    assert cli.main(run(folder, *given, *short, "--max-prompt-tokens", "10")) == 0
    found = manifest(tmp_path, label)
    assert (found["max_prompt_tokens"], found["given_max_prompt_tokens"]) == (10, 10)
    record = json.loads((tmp_path / "results/runs" / label / "trec.jsonl").read_text())
    assert record["prompt_tokens"] <= 10
    assert cli.main(run(folder, *given, *short)) == 2
    assert "max_prompt_tokens was 10, is 32256" in capsys.readouterr().err
    assert cli.main(run(folder, *given, "--max-prompt-tokens", "32257")) == 2
    assert "--max-prompt-tokens 32257 is too large" in capsys.readouterr().err


def test_only_short_records_can_be_had_to_run_and_to_calibrate_on(folder, given, tmp_path, away, capsys):
    short = ["--min-length", "0", "--max-length", "4000"]
    assert cli.main(run(folder, *given, *short, "--tasks", "trec")) == 0
    found = manifest(tmp_path, f"{NAME}-ADA-PREFILL/2-sublayers")
    assert (found["tasks"], found["min_length"], found["max_length"]) == ({"trec": NUM_SHORT}, 0, 4000)
    (profile,) = (tmp_path / "results/profiles").glob("*.json")
    ids = json.loads(profile.read_text())["data_ids"]
    assert len(ids) == NUM_SHORT
    assert all(name.startswith("qasper-short") for name in ids)
    assert cli.main(run(folder, *given, "--max-length", "3000")) == 2
    assert "--max-length 3000 leaves no record, since --min-length 4000" in capsys.readouterr().err
    assert cli.main(run(folder, *given, "--max-length", "4500")) == 2
    assert "holds no record of multifieldqa_en of over 4000 and at most 4500 words" in capsys.readouterr().err


def test_a_tokenizer_that_makes_no_tokens_of_a_text_is_refused(folder, given, tmp_path, away, capsys):
    """Transformers reads any tokenizer in a Qwen2 folder as byte-level."""
    words = AutoTokenizer.from_pretrained(make_checkpoint(tmp_path / "words"))
    broken = shutil.copytree(folder, tmp_path / "broken")
    words.save_pretrained(broken)
    assert cli.main(run(broken, *given)) == 2
    assert "turns text into no tokens" in capsys.readouterr().err


def test_a_manifest_without_the_new_options_has_no_field_of_them(folder, given, tmp_path, away):
    assert cli.main(run(folder, *given, "--limit", "1", "--tasks", "trec")) == 0
    found = manifest(tmp_path, f"{NAME}-ADA-PREFILL/2-sublayers")
    assert not {"max_length", "given_max_prompt_tokens"} & set(found)
