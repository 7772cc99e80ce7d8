"""`eval/` as typed: the artifact's command line, its table, and one line for each mistake."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from adaskip.runs.cells import Cell
from tests.saved_runs import write_run

EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def run_script(away, monkeypatch, capsys):
    """Runs a script in an empty folder; returns exit code, stdout, stderr."""

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(EVAL / name), run_name="__main__")
        printed = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, printed.out, printed.err

    return run


def test_the_artifacts_command_scores_every_budget_of_a_run(run_script):
    for sublayers in (8, 16):
        write_run(Path("results/runs"), Cell("llama", "prefill", "early_exit", sublayers), 1.0, num_layers=32)
    code, out, err = run_script("eval.py", "--model", "llama-EE-PREFILL")
    assert (code, err) == (0, "")
    for text in ("8 of 64", "16 of 64", "multifieldqa_en", "trec", "100.00 [100.0, 100.0]"):
        assert text in out
    assert Path("results/runs/llama-EE-PREFILL/8-sublayers/scores.json").exists()


def test_longbench_e_is_shown_by_buckets_and_an_empty_one_has_no_samples(run_script):
    folder = write_run(Path("results/runs"), Cell("llama", "prefill", "early_exit", 4), 1.0, num_samples=3)
    manifest = json.loads((folder / "manifest.json").read_text())
    sets = {"trec": "trec_e", "triviaqa": "triviaqa", "multifieldqa_en": "multifieldqa_en"}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sets": sets}))
    code, out, _ = run_script("eval.py", "--model", "llama-EE-PREFILL")
    assert code == 0
    table = out[out.index("by length") :]
    assert re.search(r"0-4k +4-8k +8k\+", table)
    assert re.search(r"4 of 32 +trec +classification +100\.00 \(3\) +no samples +no samples", table)
    assert "triviaqa" not in table


def test_a_run_of_no_longbench_e_set_has_no_buckets(run_script):
    write_run(Path("results/testbed/runs"), Cell("llama", "e2e", "adaskip", 4), 0.5)
    assert "by length" not in run_script("eval.py", "--model", "llama-ADA-E2E", "--testbed")[1]


def test_testbed_scores_the_testbeds_run(run_script):
    write_run(Path("results/testbed/runs"), Cell("llama", "e2e", "adaskip", 4), 0.5)
    code, out, _ = run_script("eval.py", "--model", "llama-ADA-E2E", "--testbed")
    assert code == 0
    assert "rouge_score" in out


def test_partial_and_damaged_runs_are_named(run_script):
    folder = write_run(Path("runs"), Cell("llama", "prefill", "early_exit", 4), 1.0, num_samples=3, expected=5)
    (folder / "trec.jsonl").write_text("")
    with (folder / "triviaqa.jsonl").open("a") as handle:
        handle.write('{"id": "trivia')
    code, out, _ = run_script("eval.py", "--model", "llama-EE-PREFILL", "--results-dir", "runs")
    assert code == 0
    for text in (
        "3 of 5, partial",
        "no samples",
        "0 of 5, partial",
        "llama-EE-PREFILL/4-sublayers/triviaqa: triviaqa.jsonl, line 4 is torn",
        "llama-EE-PREFILL/4-sublayers/trec: partial, 0 of 5 records",
    ):
        assert text in out
    assert "nan" not in out.lower()


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        ("eval.py", [], "required: --model"),
        ("eval.py", ["--model", "llama-EE-PREFILL"], "no run llama-EE-PREFILL in results/runs"),
        ("eval.py", ["--model", "llama"], "not a run name"),
        ("tables.py", ["--results-dir", "x", "--testbed"], "not allowed with argument"),
        ("tables.py", ["--results-dir", "x"], "no results in x: there is no such folder"),
        ("plots.py", ["--testbed"], "no results in results/testbed/runs"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run_script, script, arguments, line):
    code, _, err = run_script(script, *arguments)
    assert code == 2
    assert line in err
    assert len(err.strip().splitlines()) == 1


def test_tables_and_plots_are_written_beside_the_runs(run_script, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    write_run(Path("results/testbed/runs"), Cell("llama", "e2e", "adaskip", 4), 0.5, num_samples=3)
    code, out, _ = run_script("tables.py", "--testbed")
    assert (code, "Here AdaSkip cannot be compared yet" in out) == (0, True)
    assert Path("results/testbed/tables/table4_e2e.md").exists()
    assert run_script("plots.py", "--testbed")[0] == 0
    assert {path.name for path in Path("results/testbed/plots").glob("*.svg")} == {
        "scores_e2e.svg",
        "retention.svg",
        "skip_map_llama.svg",
    }
