"""A strategy in one file of another package, from the command line to tables and plots, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adaskip import cli
from adaskip.common import commands
from adaskip.common.plugins import PLUGINS
from adaskip.strategies.registry import registry
from tests.outside_strategy import COLOR, LABEL, MODULE, NAME, SHORT_NAME, install, write_module
from tests.tiny_runs import ROOT, cell, error_of, records

GIVEN = f"{MODULE}:OutsideSkip"
FEW = (
    "--testbed",
    "--tasks",
    "multi_news",
    "--limit",
    "1",
    "--max-new-tokens",
    "4",
    "--threads",
    "1",
    "--device",
    "cpu",
)


def python(*argv: str, packages: Path, plugins: str = "") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "ADASKIP_PLUGINS"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]), "OMP_NUM_THREADS": "1"}
    if plugins:
        environment["ADASKIP_PLUGINS"] = plugins
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of packages, and the runs of the strategy that it holds."""
    folder = tmp_path_factory.mktemp("outside")
    packages, runs = write_module(folder / "packages"), folder / "runs"
    argv = ["--model", "llama", "--phase", "e2e", "--strategy", GIVEN, "--budget", "4", "--strategy-option", "first=2"]
    done = python("-m", "adaskip", "run", *argv, *FEW, "--output-dir", str(runs), packages=packages)
    assert done.returncode == 0, done.stderr
    return packages, runs


def test_the_command_line_runs_it_and_its_records_say_what_it_skipped(made):
    folder = made[1] / f"llama-{SHORT_NAME}-E2E" / "4-sublayers"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["strategy"], manifest["strategy_options"], manifest["profile"]) == (NAME, {"first": 2}, None)
    (record,) = records(folder)["multi_news"]
    assert record["plan"]["decode"] == {"attention": [], "ffn": [2, 3, 4, 5]}


@pytest.mark.slow
def test_eval_and_plots_name_it_and_draw_it_in_its_colour(made, tmp_path):
    packages, runs = made
    here = {"packages": packages, "plugins": MODULE}
    told = python("eval/eval.py", "--model", f"llama-{SHORT_NAME}-E2E", "--results-dir", str(runs), **here)
    assert told.returncode == 0, told.stderr
    assert f"llama-{SHORT_NAME}-E2E" in told.stdout
    for script in ("tables", "plots"):
        argv = (f"eval/{script}.py", "--results-dir", str(runs), "--output-dir", str(tmp_path))
        made_now = python(*argv, **here)
        assert made_now.returncode == 0, made_now.stderr
    assert f"| {LABEL} " in (tmp_path / "tables/table4_e2e.md").read_text()
    scores = (tmp_path / "plots/scores_e2e.svg").read_text()
    assert COLOR in scores
    assert f"<!-- {LABEL} -->" in scores
    assert "<!-- outside -->" in (tmp_path / "plots/skip_map_llama.svg").read_text()


def test_results_of_a_strategy_that_is_not_at_hand_are_one_line(made, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval/tables.py", "--results-dir", str(made[1])])
    assert commands.script("adaskip.studies.tables.command", "tables", None) == 2
    line = error_of(capsys)
    assert f"llama-{SHORT_NAME}-E2E" in line
    assert "ADASKIP_PLUGINS" in line


@pytest.mark.slow
def test_the_workers_of_a_grid_know_it(tmp_path):
    packages, runs = write_module(tmp_path / "packages"), tmp_path / "runs"
    argv = ["--models", "llama", "--phases", "e2e", "--strategies", GIVEN, "--budgets", "2", "4", "--jobs", "2"]
    done = python("-m", "adaskip", "grid", *argv, *FEW, "--output-dir", str(runs), packages=packages)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 cells complete" in done.stdout


def test_an_installed_package_needs_no_option(tmp_path):
    told = python("-m", "adaskip", "run", "--help", packages=install(tmp_path / "packages"))
    assert told.returncode == 0, told.stderr
    assert NAME in told.stdout
    assert "the first FFN that it skips" in " ".join(told.stdout.split())


@pytest.mark.parametrize(("kind", "what"), [("ImportanceProfile", "importance"), ("SelectionProfile", "selection")])
def test_the_profile_that_it_declares_is_made_first(kind, what, options, tmp_path, monkeypatch):
    source = f"""
from dataclasses import dataclass
from functools import cached_property

import adaskip
from adaskip.strategies import Look, Strategy


@dataclass(frozen=True, kw_only=True)
class Measured(Strategy):
    name, short_name, label = "measured_{what}", "M{what[:3].upper()}", "Measured {what}"
    look = Look("{COLOR}", "P")
    profile_type = adaskip.{kind}

    profile: adaskip.{kind}

    @cached_property
    def skipped(self) -> adaskip.SkipPlan:
        layer = self.profile.num_layers - 1
        return adaskip.SkipPlan(ffn=frozenset({{layer}}))
"""
    monkeypatch.setattr(registry, "classes", dict(registry.classes))
    monkeypatch.setenv(PLUGINS, "")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"measured_{what}.py").write_text(source, encoding="utf-8")
    argv = ["run", *cell(f"measured_{what}:Measured", "decode", "1"), *options, "--limit", "1"]
    assert cli.main(argv) == 0
    profiles = sorted(path.name for path in (tmp_path / "profiles").glob("*.json"))
    assert any("selection" in name for name in profiles) == (what == "selection")
    assert len(profiles) == (2 if what == "selection" else 1)  # a search begins with importance
    rows = records(tmp_path / "runs" / f"llama-M{what[:3].upper()}-DECODE" / "1-sublayers")
    assert all(row["plan"]["decode"]["ffn"] == [2] for each in rows.values() for row in each)


@pytest.mark.slow
def test_the_benchmark_times_and_draws_it(tmp_path):
    packages = write_module(tmp_path / "packages")
    argv = ["--model", "llama", "--testbed", "--strategies", GIVEN, "--budgets", "2", "4", "--prompt-tokens", "16"]
    argv += [
        "--new-tokens",
        "2",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--name",
        "outside",
        "--output-dir",
        str(tmp_path),
    ]
    done = python("-m", "adaskip", "bench", *argv, packages=packages)
    assert done.returncode == 0, done.stderr
    told = python("-m", "adaskip", "bench-report", "--results-dir", str(tmp_path), packages=packages, plugins=MODULE)
    assert told.returncode == 0, told.stderr
    assert f"| {LABEL} " in (tmp_path / "cpu/outside.md").read_text()
    (figure,) = (tmp_path / "cpu/plots").glob("*.svg")
    assert COLOR in figure.read_text()
