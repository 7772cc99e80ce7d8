"""Options: a dataclass as command line and YAML file, and the configurations made of them."""

import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from adaskip.cli import main
from adaskip.common.options import Parser, add_options, option, resolve
from adaskip.core.plan import Budget
from adaskip.runs import job
from adaskip.runs.calibrate_config import CalibrateConfig
from adaskip.runs.cells import load_setup
from adaskip.runs.config import GridConfig, RunConfig
from adaskip.runs.grid import searches_first
from adaskip.runs.job import find_cells
from adaskip.studies.ablation.compensation import CompensationConfig
from adaskip.studies.ablation.online import AblationConfig
from adaskip.studies.ablation.stories import StoriesConfig
from adaskip.studies.bench.lossless import LosslessConfig
from adaskip.studies.bench.settings import BenchConfig
from adaskip.studies.limits.command import RooflineConfig
from adaskip.studies.observations.settings import ObserveConfig
from tests.tiny_runs import ROOT


@dataclass(frozen=True, kw_only=True)
class Example:
    name: str = option("a word", required=True)
    count: int | None = option("a number")
    ratio: float = option("a ratio", 1.5)
    words: tuple[str, ...] = option("words", ())
    loud: bool = option("say it loudly", False)
    other: int | None = option("odd spelling", aliases=["--other_one"])


def parse(*argv):
    parser = Parser(prog="example", allow_abbrev=False)
    add_options(parser, Example)
    given = vars(parser.parse_args(argv))
    return resolve(Example, given, given.pop("config"))


def test_defaults_then_yaml_then_command_line(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("name: file\ncount: 3\nratio: 2\nwords: [a, b]\nloud: true\n")
    assert parse("--name", "line") == Example(name="line")
    assert parse("--config", str(file)) == Example(name="file", count=3, ratio=2.0, words=("a", "b"), loud=True)
    assert parse("--config", str(file), "--count", "4", "--no-loud", "--words", "c") == Example(
        name="file", count=4, ratio=2.0, words=("c",)
    )


def test_an_alias_is_the_same_option():
    assert parse("--name", "x", "--other_one", "3") == parse("--name", "x", "--other", "3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "missing --name"),
        (["--name", "x", "--count", "many"], "argument --count: invalid int value: 'many'"),
        (["--name", "x", "--cou", "3"], "unrecognized arguments: --cou 3"),
        (["--name"], "argument --name: expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nmae: x", "unknown option 'nmae'. Did you mean 'name'\\? Allowed: name, count"),
        ("count: '3'", "count must be int, not '3'"),
        ("count: true", "count must be int, not True"),
        ("count: 1.5", "count must be int, not 1.5"),
        ("words: a", "words must be a list of str, not 'a'"),
        ("words: [1]", "words must be a list of str"),
        ("loud: 1", "loud must be bool, not 1"),
        ("- a", "must hold a mapping of options, not list"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_yaml_file_is_one_line(tmp_path, content, message):
    file = tmp_path / "x.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        parse("--name", "x", "--config", str(file))
    assert "\n" not in str(caught.value)


def test_a_missing_yaml_file_is_one_line():
    with pytest.raises(ValueError, match=r"--config nowhere\.yaml cannot be read: No such file"):
        parse("--config", "nowhere.yaml")


def test_every_option_has_a_help_text():
    for config in (RunConfig, GridConfig, CalibrateConfig):
        assert all(field.metadata["help"] for field in fields(config))
        parser = Parser()
        add_options(parser, config)
        assert parser.format_help()


CELL = {"model": "llama", "phase": "prefill", "strategy": "early_exit"}


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        ({"budget": 8}, Budget(sublayers=8)),
        ({"skip_sub_layer_num": 8}, Budget(sublayers=8)),
        ({"skip_full_layer_num": 4}, Budget(layers=4)),
        ({"alpha": 1.33}, Budget(alpha=1.33)),
    ],
)
def test_every_form_of_the_budget(given, budget):
    assert RunConfig(**CELL, **given).skip_budget == budget


def test_the_full_model_has_no_budget():
    assert RunConfig(**CELL | {"strategy": "full"}).skip_budget is None
    assert RunConfig(**CELL | {"strategy": "full"}, budget=0).skip_budget is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 8, "alpha": 1.2}, "strategy 'early_exit' takes one budget: .* given: --budget 8, --alpha 1.2"),
        ({"strategy": "full", "budget": 4}, "the full model skips nothing and takes no budget; given: --budget 4"),
        ({"model": "lama", "budget": 4}, "unknown model 'lama'. Did you mean 'llama'"),
        ({"phase": "night", "budget": 4}, "unknown phase 'night'.* Allowed: prefill, decode, e2e"),
        ({"strategy": "ADA", "budget": 4}, "unknown strategy 'ADA'. Did you mean 'adaskip'"),
        ({"budget": 4, "limit": 3, "subset": 3}, "--limit uses the first .* give only one of them"),
        ({"budget": 4, "subset": 0}, "--subset must be at least 1, not 0"),
        ({"budget": 4, "limit": 0}, "--limit must be at least 1, not 0"),
        ({"budget": 4, "batch_size": -1}, "--batch-size must be at least 1, not -1"),
        ({"budget": 4, "dtype": "int8"}, "unknown --dtype 'int8'.* Allowed: float32, bfloat16, float16"),
        ({"budget": 4, "tasks": ("terc",)}, "unknown LongBench task 'terc'"),
        ({"budget": 4, "tasks": ("trec", "trec")}, "task given more than once: trec"),
        (
            {"budget": 4, "tasks": ("trec", "trec_e")},
            "trec and trec_e are one set with --longbench-set auto: give one",
        ),
        (
            {"tasks": ("lcc_e", "lcc"), "longbench_set": "extended"},
            "lcc and lcc_e are one set with .* extended: give",
        ),
        ({"budget": 4, "longbench_set": "e"}, "unknown --longbench-set 'e'.* Allowed: auto, plain, extended"),
        ({"budget": 4, "min_length": -1}, "--min-length must be at least 0 words, not -1"),
        ({"budget": 4, "testbed": True, "min_length": 0}, "benchmark testbed has no option min_length; allowed: none"),
        (
            {"budget": 4, "testbed": True, "longbench_set": "plain", "max_length": 9},
            "no option longbench_set, max_length",
        ),
        ({"budget": 4, "testbed": True, "data_dir": "x"}, "benchmark testbed has no option data_dir"),
        ({"budget": 4, "testbed": True, "tasks": ("narrativeqa",)}, "unknown task of testbed 'narrativeqa'"),
        (
            {"budget": 4, "testbed": True, "benchmark": "longbench"},
            "--testbed means --benchmark testbed, but --benchmark is l",
        ),
        ({"budget": 4, "benchmark": "longbensh"}, "unknown benchmark 'longbensh'. Did you mean 'longbench'"),
        ({"budget": 4, "device": "cpu", "device_map": "auto"}, "give only one of them"),
        ({"budget": 4, "profile": "p.json"}, "--profile p.json is of no use: strategy 'early_exit' needs no profile"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**CELL | given)


def test_a_task_and_its_longbench_e_set_are_two_where_the_plain_name_means_the_plain_set():
    tasks = ("trec", "trec_e", "narrativeqa")
    assert RunConfig(**CELL, tasks=tasks, longbench_set="plain").tasks == tasks


def test_the_output_directory_follows_the_testbed():
    assert str(RunConfig(**CELL, budget=8).runs_dir) == "results/runs"
    assert str(RunConfig(**CELL, budget=8, testbed=True).runs_dir) == "results/testbed/runs"
    assert str(RunConfig(**CELL, budget=8, benchmark="testbed").runs_dir) == "results/testbed/runs"
    assert str(RunConfig(**CELL, budget=8, testbed=True, output_dir="x").runs_dir) == "x"


def test_what_is_not_given_lies_in_the_checkout_and_what_is_given_below_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for config, name, place in (
        (RunConfig(**CELL, budget=8), "runs_dir", "results/runs"),
        (RunConfig(**CELL, budget=8, testbed=True), "runs_dir", "results/testbed/runs"),
        (CalibrateConfig(model="llama"), "runs_dir", "results/runs"),
        (ObserveConfig(testbed=True), "out_dir", "results/testbed/observations"),
        (AblationConfig(), "out_dir", "results/online"),
        (CompensationConfig(), "out_dir", "results/compensation"),
        (StoriesConfig(), "out_dir", "results/stories"),
        (BenchConfig(), "out_dir", "speed/results"),
        (LosslessConfig(), "out_dir", "speed/results"),
    ):
        assert getattr(config, name) == ROOT / place
        assert getattr(replace(config, output_dir="x"), name) == Path("x")
    for cell in find_cells(GridConfig(testbed=True, models=("llama",), budgets=(4,))):
        assert cell.output_dir == str(ROOT / "results/testbed/runs")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: GridConfig(testbed=True, budgets=(0, 4)), "--budgets must be at least 1, not 0"),
        (lambda: AblationConfig(windows=(20, 20)), "--windows names something twice"),
        (lambda: AblationConfig(quantiles=(0.5, 0.5)), "--quantiles names something twice"),
        (lambda: RooflineConfig(models=("llama", "llama")), "--models names something twice"),
        (lambda: RooflineConfig(devices=("L20", "L20")), "--devices names something twice"),
        (lambda: RooflineConfig(budgets=(8, 8)), "--budgets names something twice"),
        (
            lambda: CalibrateConfig(model="llama", select="e2e", method="evopress", batch_size=2),
            "--batch-size 2 is for importance and --method search; got --method evopress",
        ),
        (
            lambda: CalibrateConfig(model="llama", refine="a.json", output="b.json", batch_size=2),
            "--batch-size 2 is for importance and --method search; got --refine",
        ),
        (
            lambda: CalibrateConfig(model="llama", refine="a.json", output="b.json", output_dir="d"),
            "--refine a.json needs --output, .* and takes no --output-dir",
        ),
    ],
)
def test_what_would_run_twice_or_as_something_else_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_an_observation_of_a_checkpoint_has_the_name_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ObserveConfig(models=("llama",), checkpoint=".")
    assert config.label("llama") == config.out_dir.name == tmp_path.name


def test_a_grid_is_its_runs_in_order():
    runs = find_cells(GridConfig(testbed=True, models=("vicuna",), phases=("e2e",), limit=3, budgets=(4,)))
    assert [(run.model, run.strategy, run.budget, run.limit) for run in runs] == [
        ("vicuna", "full", None, 3),
        ("vicuna", "early_exit", 4, 3),
        ("vicuna", "skipdecode", 4, 3),
        ("vicuna", "unified", 4, 3),
        ("vicuna", "adaskip", 4, 3),
        ("vicuna", "calibrated", 4, 3),
    ]


def test_a_grid_leaves_out_cells_of_phases_that_a_strategy_is_not_defined_for(capsys, tmp_path):
    grid = ["grid", "--testbed", "--models", "llama", "--budgets", "4", "--output-dir", str(tmp_path), "--dry-run"]
    assert main([*grid, "--strategies", "unified", "pop"]) == 0
    told = capsys.readouterr()
    labels = [line.split("/")[0] for line in told.out.splitlines()[:-1]]
    assert labels == ["llama-US-PREFILL", "llama-POP-PREFILL", "llama-US-DECODE", "llama-US-E2E"]
    assert told.err == "cells left out, since not defined: pop in phase decode, pop in phase e2e\n"
    assert main([*grid, "--strategies", "unified"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*grid, "--strategies", "pop", "--phases", "decode"]) == 2
    assert "the grid has no cells; not defined: pop in phase decode" in capsys.readouterr().err


def test_the_workers_of_a_grid_begin_with_one_cell_of_each_search():
    cells = find_cells(GridConfig(testbed=True, models=("vicuna", "llama"), budgets=(4, 6)))
    ordered = searches_first(cells)
    assert sorted(map(repr, ordered)) == sorted(map(repr, cells))
    half = len(cells) // 2
    assert {cell.model for cell in ordered[:half]} == {"vicuna"}
    for model in (ordered[:half], ordered[half:]):
        searching = [(cell.strategy, cell.phase, cell.budget) for cell in model[:3]]
        assert searching == [("calibrated", phase, 4) for phase in ("prefill", "decode", "e2e")]
        assert model[3:] == [cell for cell in cells if cell in model[3:]]


@pytest.mark.parametrize(
    ("num_layers", "budgets"), [(32, (8, 12, 16)), (28, (8, 10, 14)), (8, (2, 4)), (2, (2,)), (80, (20, 30, 40))]
)
def test_the_setups_budgets_are_the_nearest_whole_layers_of_another_depth(num_layers, budgets):
    assert load_setup("paper").budgets_for(num_layers) == budgets


@pytest.mark.parametrize("strategy", ["early_exit", "adaskip"])
def test_without_a_budget_a_run_skips_an_eighth(strategy):
    assert job.resolve(RunConfig(**CELL | {"strategy": strategy})).cell.sublayers == 8
    assert job.resolve(RunConfig(**CELL | {"strategy": strategy}, testbed=True)).cell.sublayers == 4


@pytest.mark.parametrize(("strategy", "sublayers"), [("early_exit", 4), ("adaskip", 3), ("calibrated", 3)])
@pytest.mark.parametrize("budget", [{"alpha": 1.05}, {"fraction": 0.05}])
def test_a_ratio_is_rounded_to_the_unit_the_strategy_can_skip(strategy, sublayers, budget):
    assert job.resolve(RunConfig(**CELL | {"strategy": strategy} | budget)).cell.sublayers == sublayers


def test_a_grid_of_several_models_has_no_checkpoint():
    with pytest.raises(ValueError, match="exactly one model in --models"):
        GridConfig(checkpoint="x")


@pytest.mark.slow
def test_a_reader_that_has_had_enough_of_a_dry_run_is_no_error():
    ours, theirs = os.pipe()
    os.close(ours)
    few = ["--models", "llama", "--phases", "prefill", "--strategies", "full", "adaskip", "--limit", "1"]
    command = [sys.executable, "-m", "adaskip", "grid", "--dry-run", "--testbed", *few]
    try:
        done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    finally:
        os.close(theirs)
    assert done.returncode == 0
    assert "Broken pipe" not in done.stderr
    assert "Traceback" not in done.stderr
