"""A benchmark in one file of another package, from the command line to scores and tables."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest

from adaskip import cli
from adaskip.benchmarks.protocol import BENCHMARKS
from adaskip.common import commands
from adaskip.common.plugins import PLUGINS
from tests.outside_benchmark import MODULE, NAME, install, write_module
from tests.tiny_runs import ROOT, cell, error_of, records

GIVEN = f"{MODULE}:OutsideTasks"
STRATEGIES = {"full": "FULL", "adaskip": "ADA", "early_exit": "EE"}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The module can be imported; what it registers is forgotten after the test."""
    monkeypatch.syspath_prepend(str(write_module(tmp_path / "packages")))
    monkeypatch.setattr(BENCHMARKS, "classes", dict(BENCHMARKS.all()))
    monkeypatch.setattr(BENCHMARKS, "loaded", set(BENCHMARKS.loaded))
    monkeypatch.setenv(PLUGINS, "")
    yield
    sys.modules.pop(MODULE, None)


@pytest.fixture
def given(outside, checkpoint, tmp_path):
    """What every command of these tests is given."""
    places = ("--checkpoint", str(checkpoint), "--output-dir", str(tmp_path / "runs"))
    return [*places, "--device", "cpu", "--dtype", "float32", "--threads", "1", "--benchmark", GIVEN]


def script(monkeypatch, name: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    return commands.script("adaskip.studies.tables.command", name, "A script.")


def test_it_is_calibrated_on_run_scored_and_tabulated(given, tmp_path, monkeypatch, capsys):
    assert cli.main(["calibrate", "--model", "llama", *given]) == 0
    (profile,) = (tmp_path / "profiles").glob("*.json")
    made_on = json.loads(profile.read_text())
    assert (made_on["dataset"], made_on["data_ids"][0], len(made_on["data_ids"])) == ("repeat", "repeat-4", 20)
    for strategy in STRATEGIES:
        assert cli.main(["run", *cell(strategy, "e2e", None if strategy == "full" else "2"), *given]) == 0
    assert list((tmp_path / "profiles").glob("*.json")) == [profile], "the runs found it"
    folders = {name: next((tmp_path / "runs" / f"llama-{name}-E2E").iterdir()) for name in STRATEGIES.values()}
    manifest = json.loads((folders["ADA"] / "manifest.json").read_text())
    assert (manifest["benchmark"], manifest["benchmark_options"]) == (NAME, {"size": 5})
    assert (manifest["tasks"], manifest["max_new_tokens"]) == (
        {"repeat": 4, "first-words": 4},
        {"repeat": 6, "first-words": 3},
    )
    rows = records(folders["FULL"])["repeat"]
    assert rows[0]["asked"] == rows[0]["references"][0]
    assert rows[0]["reference_tokens"] == 1, "the loss is that of the first reference"

    capsys.readouterr()
    assert script(monkeypatch, "eval", "--model", "llama-ADA-E2E", "--results-dir", str(tmp_path / "runs")) == 0
    assert "first-words" in capsys.readouterr().out
    scores = json.loads((folders["ADA"] / "scores.json").read_text())["tasks"]["repeat"]
    expected = [
        sum(word in row["prediction"].split() for word in row["references"]) / 5
        for row in records(folders["ADA"])["repeat"]
    ]
    assert scores["main"]["metric"] == "words"
    assert list(scores["main"]["by_id"].values()) == expected
    for name in ("tables", "plots"):
        assert script(monkeypatch, name, "--results-dir", str(tmp_path / "runs")) == 0
    table = (tmp_path / "tables/scores_e2e.md").read_text()
    assert "first-words words" in table
    assert "paper" not in table.lower().replace("the best of the four", "")
    measures = (tmp_path / "tables/measures_e2e.md").read_text()
    assert f"Score: {NAME}'s" in measures
    assert {path.stem for path in (tmp_path / "plots").glob("*.svg")} == {"scores_e2e", "retention", "skip_map_llama"}
    lines = list(csv.DictReader((tmp_path / "tables/scores_e2e.csv").open()))
    run = {line["strategy"]: line for line in lines if line["task"] == "repeat" and line["score"]}
    assert run.keys() == STRATEGIES.keys()
    assert float(run["full"]["retention"]) == 100 or float(run["full"]["score"]) == 0


def test_a_search_and_a_dry_run_take_it(given, capsys, tmp_path):
    few = ["--samples", "2", "--up-to", "1"]
    assert cli.main(["calibrate", "--model", "llama", *given, "--select", "decode", *few]) == 0
    assert len(list((tmp_path / "profiles").glob("llama-selection-decode-*.json"))) == 1
    capsys.readouterr()
    assert cli.main(["grid", "--models", "llama", "--phases", "decode", "--dry-run", *given]) == 0
    out = capsys.readouterr().out
    assert "llama-ADA-DECODE/2-sublayers" in out
    assert "a word is taken as 1.4 tokens" in out, "prompts are counted though no record has a length"


def test_other_options_are_another_run(given, capsys):
    argv = ["run", *cell("early_exit", "e2e"), *given]
    assert cli.main([*argv, "--benchmark-option", "size=4"]) == 0
    capsys.readouterr()
    assert cli.main(argv) == 2
    assert 'benchmark_options was {"size": 4}, is {"size": 5}' in error_of(capsys)
    assert cli.main([*argv, "--benchmark-option", "length=4"]) == 2
    assert f"benchmark {NAME} has no option length; allowed: size" in error_of(capsys)
    assert cli.main([*argv, "--min-length", "4"]) == 2
    assert f"benchmark {NAME} has no option min_length; allowed: size" in error_of(capsys)


def test_results_of_a_benchmark_that_is_not_at_hand_are_one_line(given, tmp_path, monkeypatch, capsys):
    assert cli.main(["run", *cell("early_exit", "e2e"), *given, "--limit", "1"]) == 0
    monkeypatch.setenv(PLUGINS, "")
    monkeypatch.setattr(BENCHMARKS, "classes", {name: cls for name, cls in BENCHMARKS.classes.items() if name != NAME})
    capsys.readouterr()
    assert script(monkeypatch, "tables", "--results-dir", str(tmp_path / "runs")) == 2
    line = error_of(capsys)
    assert f"unknown benchmark '{NAME}'" in line
    assert "ADASKIP_PLUGINS" in line


@pytest.mark.slow
def test_an_installed_package_needs_no_option_and_the_workers_of_a_grid_know_it(checkpoint, tmp_path):
    packages = install(tmp_path / "packages")
    environment = {name: value for name, value in os.environ.items() if name != PLUGINS}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]), "OMP_NUM_THREADS": "1"}
    argv = ["--models", "llama", "--phases", "e2e", "--strategies", "full", "early_exit", "--jobs", "2"]
    argv += ["--budgets", "2", "--benchmark", NAME, "--checkpoint", str(checkpoint), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "adaskip", "grid", *argv, "--output-dir", str(tmp_path / "runs")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 2 cells complete" in done.stdout
