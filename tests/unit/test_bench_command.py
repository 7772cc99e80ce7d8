"""`adaskip bench` and `adaskip bench-report`: what they print, and their exit codes."""

from __future__ import annotations

import pytest

from adaskip.cli import main
from adaskip.studies.bench import measuring
from adaskip.studies.bench.measuring import Outcome
from adaskip.studies.bench.settings import BenchConfig, Cell, Workload
from tests.saved_benchmarks import add_failure, add_overhead, add_strategies, result_of, save

SHORT, LONG = Workload(512, 25), Workload(8000, 25)


@pytest.fixture
def result(tmp_path):
    return result_of(tmp_path, "some", "strategies")


def run(monkeypatch, outcome: Outcome, *options: str) -> int:
    """`adaskip bench` where measuring has that outcome."""
    monkeypatch.setattr(measuring, "run_bench", lambda config: outcome)
    return main(["bench", "--random-weights", *options])


def test_a_complete_benchmark_prints_its_table_and_ends_well(monkeypatch, capsys, result):
    add_strategies(result, SHORT, ("prefill",), budgets=(6,))
    assert run(monkeypatch, Outcome(save(result), (), complete=True)) == 0
    out = capsys.readouterr().out
    assert "| AdaSkip    | prefill | 6" in out
    assert out.endswith(f"\ncomplete: {result.path}\n")


def test_an_incomplete_one_says_what_is_missing_and_ends_with_1(monkeypatch, capsys, result):
    add_strategies(result, SHORT, ("prefill",), budgets=(6,))
    outcome = Outcome(save(result), ("3 of 5 rounds so far; the same command continues",), complete=False)
    assert run(monkeypatch, outcome) == measuring.INCOMPLETE == 1
    assert capsys.readouterr().out.endswith(
        f"\n3 of 5 rounds so far; the same command continues\nincomplete: {result.path}\n"
    )


def test_a_study_without_a_table_prints_notes_alone(monkeypatch, capsys, tmp_path):
    overhead = result_of(tmp_path, "overhead", "overhead")
    add_overhead(overhead, SHORT, prefill=1.0, decode=1.0)
    assert run(monkeypatch, Outcome(save(overhead), ("a note",), complete=True), "--study", "overhead") == 0
    assert capsys.readouterr().out == f"a note\ncomplete: {overhead.path}\n"


def test_a_figures_options_reach_the_benchmark_and_the_command_line_goes_before_them(monkeypatch, result):
    asked: list[BenchConfig] = []

    def run_bench(config: BenchConfig) -> Outcome:
        asked.append(config)
        return Outcome(result, (), complete=True)

    monkeypatch.setattr(measuring, "run_bench", run_bench)
    assert main(["bench", "--figure", "batch_100m", "--rounds", "7"]) == 0
    (config,) = asked
    assert (config.model, config.batch_sizes, config.rounds) == ("llama-100m", (1, 4), 7)
    assert config.result_name == "batch_100m"


def test_a_yaml_file_may_name_a_figure_and_goes_before_its_options(monkeypatch, tmp_path, result):
    asked: list[BenchConfig] = []
    monkeypatch.setattr(measuring, "run_bench", lambda config: asked.append(config) or Outcome(result, (), True))
    (tmp_path / "bench.yaml").write_text("figure: batch_100m\nrounds: 2\n")
    (tmp_path / "rounds.yaml").write_text("rounds: 2\n")
    assert main(["bench", "--config", str(tmp_path / "bench.yaml"), "--threads", "1"]) == 0
    assert main(["bench", "--config", str(tmp_path / "rounds.yaml"), "--figure", "batch_100m"]) == 0
    assert [(each.batch_sizes, each.rounds, each.clock) for each in asked] == [((1, 4), 2, "process")] * 2


def test_a_mistake_is_told_by_a_process_that_has_a_rank_and_is_alone(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["bench", "--figure", "nope"]) == 2
    assert "nope" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", "--figure", "nope"]) == 2
    assert not capsys.readouterr().err


def test_the_report_says_how_much_it_wrote(capsys, tmp_path, result):
    add_strategies(result, SHORT, ("prefill",), budgets=(3, 6))
    add_failure(result, LONG, Cell("full"))
    save(result)
    assert main(["bench-report", "--results-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"wrote 4 files, first {tmp_path / 'summary.md'}\n"


def test_a_report_of_nothing_is_a_mistake_of_one_line(capsys, tmp_path):
    assert main(["bench-report", "--results-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"error: no benchmark results in {tmp_path}; `adaskip bench` makes them\n"
