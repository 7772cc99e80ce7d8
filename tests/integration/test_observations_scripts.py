"""The scripts in `observations/` from start to end, on random models of three layers and the testbed's tasks."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from adaskip.runs.loading import Loading
from adaskip.studies.observations import command, importance_check, measuring
from dev.testbed_training.families import model_config
from dev.testbed_training.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("ob1", "ob2", "ob3", "tables12", "importance_check")
CELLS = 1 + 2 * 2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Random models called llama and vicuna, with the testbed's tokenizer."""
    root, tokenizer = tmp_path_factory.mktemp("checkpoints"), build_tokenizer()
    for seed, family in enumerate(("llama", "vicuna")):
        torch.manual_seed(seed)
        config = model_config(family, len(tokenizer), num_layers=3)
        config.initializer_range = 0.2  # large enough that layers and prompts differ
        LlamaForCausalLM(config).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    return root


@pytest.fixture
def observe(checkpoints, tmp_path, monkeypatch, capsys):
    """Runs a script as its command line does; returns exit code, standard output and standard error."""

    def call(script: str, *options: str, model: str = "llama", out: str = "out") -> tuple[int, str, str]:
        places = ["--checkpoint", str(checkpoints / model), "--output-dir", str(tmp_path / out)]
        limits = ["--limit", "3", "--batch-size", "2", "--threads", "1", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--testbed", "--model", model, *places, *limits, *options])
        code = command.main(script, "About the script.")
        return (code, *capsys.readouterr())

    return call


def measured_bytes(out_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out_dir)): path.read_bytes() for path in sorted(out_dir.rglob("*.jsonl"))}


def refuse(*args, **kwargs):
    raise AssertionError("a model was loaded")


def test_a_figure_is_measured_once_and_joins_all_models_saved(observe, tmp_path, monkeypatch):
    assert observe("ob1", "--tasks", "trec")[0] == 0
    code, said, _ = observe("ob1", "--tasks", "trec", model="vicuna")
    assert code == 0
    assert "Models rank their layers differently:" in said
    assert "not tested" not in said.splitlines()[1]
    out = tmp_path / "out"
    assert {path.name for path in out.glob("ob1.*")} == {"ob1.md", "ob1.csv", "ob1.json", "ob1.png", "ob1.svg"}
    saved = json.loads((out / "ob1.json").read_text())
    assert saved["sources"]["vicuna"]["trec-prefill"]["samples"] == 3
    records = (out / "measurements/llama/trec-prefill/trec.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["layer"]["similarity"]) for line in records] == [3, 3, 3]
    monkeypatch.setattr(Loading, "load", refuse)  # ob2 finds what ob1 has measured
    assert observe("ob2", "--tasks", "trec")[0] == 0
    assert observe("ob2", "--tasks", "trec", "--draw-only")[0] == 0


def test_a_killed_measurement_continues_to_the_same_bytes(observe, tmp_path, monkeypatch):
    options = ("--tasks", "trec", "--max-new-tokens", "8", "--limit", "5")
    assert observe("ob3", *options, out="whole")[0] == 0
    stock, calls = measuring.measure, 0

    def dies(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls in (2, 6):  # the second batch of the prompts, and of the answers
            raise KeyboardInterrupt
        return stock(*args, **kwargs)

    monkeypatch.setattr(measuring, "measure", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            observe("ob3", *options, out="killed")
        torn = max((tmp_path / "killed").rglob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        with torn.open("a") as handle:
            handle.write('{"id": "half a rec')
    assert observe("ob3", *options, out="killed")[0] == 0
    assert measured_bytes(tmp_path / "killed") == measured_bytes(tmp_path / "whole")
    one, other = (json.loads((tmp_path / name / "ob3.json").read_text()) for name in ("whole", "killed"))
    assert one == other


def test_tables_are_of_all_pairs_of_the_tasks_and_of_their_answers(observe, tmp_path):
    code, said, _ = observe("tables12", "--tasks", "gov_report", "multi_news", "--max-new-tokens", "32")
    assert code == 0
    assert "better than chance" in said
    offline, online = (json.loads((tmp_path / f"out/table{n}.json").read_text())["numbers"] for n in (1, 2))
    assert len(offline) == 2 * 2  # kinds x ordered pairs
    assert [row["samples"] for row in online] == [3, 3, 0] * 2  # 31 measured tokens: 40 is too long a window
    windows = json.loads((tmp_path / "out/measurements/llama/gov_report-decode/manifest.json").read_text())["windows"]
    assert windows == [5, 20, 40]


def test_the_importance_check_runs_cells_once_and_draws_from_their_scores(observe, tmp_path, monkeypatch):
    options = ("--tasks", "trec", "--max-new-tokens", "4")
    runs = []
    monkeypatch.setattr(
        importance_check, "run", lambda *a, run=importance_check.run, **k: runs.append(1) or run(*a, **k)
    )
    assert observe("importance_check", *options)[0] == 0
    assert len(runs) == CELLS  # three layers leave one or two to skip
    assert observe("importance_check", *options)[0] == 0
    assert len(runs) == CELLS
    rows = (tmp_path / "out/importance_check.csv").read_text().splitlines()
    floors = ["empty answer", "majority class", "first sentence"]
    assert [row.split(",")[2] for row in rows] == ["Layers skipped", "0", "1", "2", *floors]
    (task,) = json.loads((tmp_path / "out/importance_check.json").read_text())["numbers"]
    assert list(task["floors"]) == floors
    assert task["floors"]["empty answer"] == 0 < task["floors"]["majority class"] < 1
    monkeypatch.setattr(importance_check, "measure_check", refuse)
    assert observe("importance_check", "--draw-only")[0] == 0


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("ob1", ["--draw-only"], "no model with finished measurements of trec-prefill, triviaqa-prefill"),
        ("importance_check", ["--draw-only"], "does not exist; leave out --draw-only"),
        ("importance_check", ["--max-prompt-tokens", "1"], "at least 2"),
        ("ob2", ["--tasks", "trek"], "Did you mean 'trec'"),
        ("ob2", ["--modle", "llama"], "see ob2.py --help"),
    ],
)
def test_a_users_mistake_is_one_line(observe, script, options, expected):
    code, _, error = observe(script, *options)
    assert code == 2
    assert expected in error
    assert error.count("\n") == 1


def test_other_measurements_in_the_folder_are_refused(observe):
    assert observe("ob1", "--tasks", "trec")[0] == 0
    code, _, error = observe("ob1", "--tasks", "trec", "--limit", "2")
    assert code == 2
    assert "samples was 3, is 2" in error


def test_measurements_of_another_configuration_of_the_same_weights_are_refused(observe, checkpoints, tmp_path):
    (tmp_path / "own").mkdir()
    shutil.copytree(checkpoints / "llama", tmp_path / "own" / "llama")
    given = ("--tasks", "trec", "--checkpoint", str(tmp_path / "own" / "llama"))
    assert observe("ob1", *given)[0] == 0
    config = tmp_path / "own" / "llama" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.5}))
    code, _, error = observe("ob1", *given)
    assert code == 2
    assert "another configuration (config_fingerprint was " in error


def test_the_scripts_name_themselves_and_nothing_else():
    assert {path.stem for path in (ROOT / "observations").glob("*.py")} == set(SCRIPTS) == set(command.OBSERVATIONS)
    for name in SCRIPTS:
        source = (ROOT / f"observations/{name}.py").read_text()
        assert f"python observations/{name}.py" in (ast.get_docstring(ast.parse(source)) or "")
        assert source.rstrip().endswith(f'sys.exit(script("adaskip.studies.observations.command", "{name}", __doc__))')
