"""Calibrated against the best of the other four: which cells are compared, and what is said of them."""

from __future__ import annotations

import pytest

from adaskip.common.intervals import Estimate, mean_of_means_estimate
from adaskip.runs.cells import Cell
from adaskip.studies.tables import selection
from adaskip.studies.tables.report import write_tables
from adaskip.studies.tables.results import load_results
from adaskip.studies.tables.selection import matches, sentence, to_text
from tests.saved_runs import write_run

OTHERS = {"early_exit": 0.3, "skipdecode": 0.1, "unified": 0.2, "adaskip": 0.6}


def write_all(folder, model, calibrated, **options):
    for strategy, quality in {**OTHERS, "calibrated": calibrated}.items():
        write_run(folder, Cell(model, "e2e", strategy, 4), quality, num_samples=40, **options)


@pytest.mark.parametrize(
    ("calibrated", "verdict", "beyond"),
    [(0.9, "better than", True), (0.6, "equal to", False), (0.3, "worse than", True)],
)
def test_the_difference_is_from_the_best_of_the_others(tmp_path, calibrated, verdict, beyond):
    write_all(tmp_path, "llama", calibrated)
    found = matches(load_results(tmp_path))
    (match,) = found.itertuples()
    assert (match.phase, match.model, match.fraction, match.best_other) == ("e2e", "llama", 0.125, "adaskip")
    assert match.difference == pytest.approx(match.calibrated - match.adaskip)
    assert (match.verdict, match.beyond_chance) == (verdict, beyond)
    (row,) = [line for line in to_text(found).splitlines() if line.startswith("| end to end")]
    assert ("**worse than** AdaSkip" in row) == (verdict == "worse than")


@pytest.mark.parametrize(("num_samples", "significant"), [(7, False), (8, True)])
def test_a_lead_on_less_than_eight_pairs_a_task_is_not_called_significant(tmp_path, num_samples, significant):
    for strategy, quality in {**dict.fromkeys(OTHERS, 0.0), "calibrated": 1.0}.items():
        write_run(tmp_path, Cell("llama", "e2e", strategy, 4), quality, num_samples=num_samples)
    (match,) = matches(load_results(tmp_path)).itertuples()
    assert (match.verdict, match.beyond_chance) == ("better than", significant)


def test_only_what_is_complete_is_compared_and_counted(tmp_path):
    write_all(tmp_path, "llama", 0.9)
    write_all(tmp_path, "vicuna", 0.6)
    write_all(tmp_path, "internlm", 0.9, expected=50)
    results = load_results(tmp_path)
    found = matches(results)
    assert [*found["model"]] == ["llama", "vicuna"]
    said = sentence(found)
    assert "In 2 of 2 combinations of model, phase and budget, calibrated" in said
    assert "more in 1 (1 significantly), the same in 1. It scores less in 0 (0 significantly)." in said
    assert (
        said
        in next(path for path in write_tables(results, tmp_path / "out") if path.name == "selection.md").read_text()
    )


@pytest.mark.parametrize(("gov_report", "compared"), [(0.9, True), (0.0, False)])
def test_tasks_at_their_floor_are_left_out(tmp_path, gov_report, compared):
    for strategy, quality in {**OTHERS, "calibrated": 0.5, "full": 0.9}.items():
        cell = Cell("llama", "e2e", strategy, 0 if strategy == "full" else 4)
        for_task = {"gov_report": gov_report if strategy == "full" else 0.0, "multi_news": quality}
        write_run(tmp_path, cell, for_task, num_samples=40)
    results = load_results(tmp_path)
    (match,) = matches(results).itertuples()
    cells = results.cells.query("phase == 'e2e' and strategy == 'calibrated' and score > 0")
    assert [*cells["task"]] == ["multi_news"]
    assert match.calibrated == pytest.approx((50 if compared else 100) * cells["score"].item())


def test_without_calibrated_there_is_no_document(tmp_path):
    write_run(tmp_path, Cell("llama", "e2e", "adaskip", 4), 0.6)
    assert "selection.md" not in [path.name for path in write_tables(load_results(tmp_path), tmp_path / "out")]


def test_groups_weigh_alike_whatever_their_size():
    estimate = mean_of_means_estimate([[1.0] * 90 + [0.0] * 10, [0.0, 0.2]])
    assert estimate.value == pytest.approx(0.5)
    assert estimate.low is not None
    assert estimate.high is not None
    assert 0.4 < estimate.low < 0.5 < estimate.high < 0.6
    assert mean_of_means_estimate([[1.0], [0.0, 1.0]]).low is None


@pytest.mark.parametrize("rounding_error", [-8.9e-16, 8.9e-16])
def test_a_tie_stays_a_tie_when_its_differences_do_not_add_up_to_zero(tmp_path, monkeypatch, rounding_error):
    write_all(tmp_path, "llama", 0.6)
    monkeypatch.setattr(selection, "mean_of_means_estimate", lambda groups: Estimate(rounding_error, -1.0, 1.0))
    found = matches(load_results(tmp_path))
    assert [*found["verdict"]] == ["equal to"]
    assert "| +0.0 [-1.0, +1.0] | equal to AdaSkip |" in to_text(found)
