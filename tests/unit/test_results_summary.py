"""The counted claim: the paper's tables as printed, ours with ties, losses and chance apart, the window."""

from __future__ import annotations

import pytest

from adaskip.runs.cells import Cell
from adaskip.studies.tables.report import headline_of
from adaskip.studies.tables.results import load_results
from adaskip.studies.tables.summary import summarise, to_text
from tests.saved_runs import write_run

OTHERS = {"early_exit": 0.6, "skipdecode": 0.1, "unified": 0.3}


def summary_of(runs_dir, *, num_samples=30, **quality):
    """The summary of llama's decode runs at one budget."""
    for strategy, share in {"full": 1.0, **OTHERS, **quality}.items():
        cell = Cell("llama", "decode", strategy, 0 if strategy == "full" else 4)
        write_run(runs_dir, cell, share, num_samples=num_samples, online_ffns=3 if strategy == "adaskip" else 0)
    return summarise(load_results(runs_dir))


def counts(tally):
    return {name: tally[name] for name in ("compared", "best", "tied", "beaten")}


def test_the_papers_claim_is_counted_from_its_tables(tmp_path):
    paper = summary_of(tmp_path, adaskip=0.9)["paper"]
    assert counts(paper) == {"compared": 42, "best": 40, "tied": 1, "beaten": 1}
    assert counts(paper["by_phase"]["prefill"]) == {"compared": 18, "best": 17, "tied": 0, "beaten": 1}
    assert counts(paper["by_phase"]["decode"]) == {"compared": 12, "best": 11, "tied": 1, "beaten": 0}


def test_a_clear_lead_is_best_beyond_chance(tmp_path):
    summary = summary_of(tmp_path, adaskip=0.95)
    assert summary["cells"] == 63
    assert counts(summary["ours"]) == {"compared": 2, "best": 2, "tied": 0, "beaten": 0}
    assert (summary["ours"]["interval_above"], summary["ours"]["paired_better"]) == (2, 2)
    assert summary["ours"]["paired_worse"] == 0


@pytest.mark.parametrize(("num_samples", "significant"), [(7, 0), (8, 2)])
def test_a_lead_on_few_samples_is_not_called_significant(tmp_path, num_samples, significant):
    summary = summary_of(tmp_path, adaskip=1.0, early_exit=0.0, unified=0.0, skipdecode=0.0, num_samples=num_samples)
    assert counts(summary["ours"]) == {"compared": 2, "best": 2, "tied": 0, "beaten": 0}
    assert summary["ours"]["paired_better"] == significant


def test_a_clear_loss_is_beaten_beyond_chance(tmp_path):
    summary = summary_of(tmp_path, adaskip=0.2)
    assert counts(summary["ours"]) == {"compared": 2, "best": 0, "tied": 0, "beaten": 2}
    assert (summary["ours"]["paired_better"], summary["ours"]["paired_worse"]) == (0, 2)
    assert "| significantly |" in to_text(summary)


def test_a_narrow_lead_is_best_but_within_chance(tmp_path):
    summary = summary_of(tmp_path, adaskip=0.62)
    assert summary["ours"]["best"] == 2
    assert summary["ours"]["interval_above"] == 0
    assert summary["ours"]["paired_better"] < 2


def test_ties_are_counted_apart(tmp_path):
    summary = summary_of(tmp_path, adaskip=OTHERS["early_exit"])
    assert counts(summary["ours"]) == {"compared": 2, "best": 0, "tied": 2, "beaten": 0}
    assert (summary["ours"]["paired_better"], summary["ours"]["paired_worse"]) == (0, 0)


def test_a_cell_counts_only_when_all_four_have_run_to_their_end(tmp_path):
    summary_of(tmp_path, adaskip=0.9)
    folder = Cell("llama", "decode", "unified", 4).folder(tmp_path)
    path = folder / "multi_news.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert counts(summarise(load_results(tmp_path))["ours"]) == {"compared": 1, "best": 1, "tied": 0, "beaten": 0}


def test_nothing_to_compare_is_said_so(tmp_path):
    write_run(tmp_path, Cell("llama", "decode", "early_exit", 4), 0.5)
    results = load_results(tmp_path)
    assert counts(summarise(results)["ours"])["compared"] == 0
    assert headline_of(results)[0].startswith("Here AdaSkip cannot be compared yet")
    assert "Online learning" not in to_text(summarise(results))


def test_online_additions_are_counted_per_request(tmp_path):
    online = summary_of(tmp_path, adaskip=0.9)["online"]
    assert (online["requests"], online["fired"], online["most_added"]) == (60, 30, 3)
    assert online["mean_added"] == pytest.approx(1.5)
    assert online["mean_added_when_fired"] == 3
    assert [(run["phase"], run["model"], run["fraction"]) for run in online["runs"]] == [("decode", "llama", 0.125)]


def test_prefill_runs_have_no_online_window_to_count(tmp_path):
    write_run(tmp_path, Cell("llama", "prefill", "adaskip", 4), 0.5)
    assert summarise(load_results(tmp_path))["online"]["requests"] == 0


def test_mean_retention_needs_every_model(tmp_path):
    lines = summary_of(tmp_path, adaskip=0.9)["mean_retention"]
    (line,) = [
        line for line in lines if (line["phase"], line["fraction"], line["strategy"]) == ("decode", 0.125, "adaskip")
    ]
    assert line["ours"] is None  # internlm and vicuna were not run
    assert line["paper"] == pytest.approx(
        (30.9 / 34.2 + 24 / 25.8 + 13.7 / 18.2 + 13.3 / 17.6 + 23.6 / 27.2 + 20.2 / 22.4) / 6
    )


def test_the_text_states_the_counts(tmp_path):
    text = to_text(summary_of(tmp_path, adaskip=0.95))
    assert "Here AdaSkip is the best of the four strategies in 2 of 2 cells (100 %)" in text
    assert "61 of 63 cells are not complete." in text
    assert "in 30 of 60 requests (50 %), 1.50 per request on average and 3 at most" in text
