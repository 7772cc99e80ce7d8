"""Fidelity and loss beside the score: paired with the full model's, of any model, whatever part of it has run."""

from __future__ import annotations

import json
import re
from dataclasses import astuple
from pathlib import Path

import pytest

from adaskip.common.intervals import mean_estimate
from adaskip.runs.cells import Cell
from adaskip.studies.tables import claims, scores
from adaskip.studies.tables.compare import comparisons, contests
from adaskip.studies.tables.documents import measures_document, scores_document
from adaskip.studies.tables.latex import measures_latex, scores_latex
from adaskip.studies.tables.report import measures_csv, write_plots, write_tables
from adaskip.studies.tables.results import FIDELITY, LOSS, SCORE, estimate, load_results
from adaskip.studies.tables.runs import ResultsError, load_run
from adaskip.studies.tables.scores import score_run
from adaskip.studies.tables.summary import headline, summarise
from tests.saved_runs import write_run

LAYERS = 30
QUALITY = {"full": 0.9, "early_exit": 0.1, "skipdecode": 0.0, "unified": 0.2, "adaskip": 0.7}
LOSSES = {"full": 2.8, "early_exit": 7.3, "skipdecode": 9.1, "unified": 6.2, "adaskip": 3.1}


def write(runs_dir: Path, *strategies: str, phase: str = "decode", **options) -> Path:
    """Runs of a model that the paper has not, with 8 of 60 sublayers skipped; the last one's folder."""
    for name in strategies:
        cell = Cell("smollm2", phase, name, 0 if name == "full" else 8)
        known = {"loss": LOSSES[name], "num_layers": LAYERS, "num_samples": 16, **options}
        folder = write_run(runs_dir, cell, QUALITY[name], **known)
    return folder


def rewrite(folder: Path, **fields) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **fields}))


def cell_of(results, strategy="adaskip", task="gov_report", phase="decode"):
    return results.cell_of[phase, "smollm2", strategy, 0.0 if strategy == "full" else 8 / 60, task]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    runs_dir = tmp_path_factory.mktemp("runs")
    write(runs_dir, *QUALITY)
    return load_results(runs_dir)


def test_loss_is_the_mean_of_the_records_and_its_rise_is_paired_with_the_full_models(whole):
    ours = cell_of(whole)
    expected = mean_estimate([3.1 - 0.05, 3.1 + 0.05] * 8)
    assert (ours.loss, ours.loss_low, ours.loss_high) == pytest.approx(astuple(expected))
    assert (ours.loss_added, ours.loss_added_low, ours.loss_added_high) == pytest.approx((0.3, 0.3, 0.3))
    assert cell_of(whole, "full").loss_added == 0.0


def test_fidelity_is_100_for_the_full_model_and_less_for_a_skipped_one(whole):
    full, ours = cell_of(whole, "full"), cell_of(whole)
    assert (full.fidelity, full.fidelity_low, full.fidelity_high) == (1.0, 1.0, 1.0)
    assert full.score < 1
    assert ours.fidelity_low < ours.fidelity < ours.fidelity_high < 1


def test_records_without_a_loss_are_read_and_shown_as_unknown(tmp_path):
    write(tmp_path, "full", "adaskip", loss=None)
    results = load_results(tmp_path)
    assert estimate(cell_of(results), "loss") is None
    assert "`n/a`: not in these records." in measures_document(results, "decode")
    assert ",,,,,\n" in measures_csv(results, "decode")


def test_a_record_without_a_reference_has_no_loss_and_leaves_the_others_theirs(tmp_path):
    folder = write(tmp_path, "full", "adaskip")
    path = folder / "gov_report.jsonl"
    path.write_text(re.sub(r'"reference_loss": [\d.]+', '"reference_loss": null', path.read_text(), count=1))
    ours = cell_of(load_results(tmp_path))
    assert (ours.n, ours.loss) == (16, pytest.approx(3.1 + 0.05 / 15))
    assert ours.loss_added == pytest.approx(0.3)


def test_records_that_the_full_run_lacks_are_left_out_and_named_in_one_line(tmp_path):
    write(tmp_path, "full", num_samples=10, expected=16)
    write(tmp_path, "adaskip")
    results = load_results(tmp_path)
    assert [line for line in results.notes if "gov_report" in line] == [
        "smollm2-ADA-DECODE/8-sublayers/gov_report: compared with the full model over 10 of 16 records; "
        "smollm2-FULL-DECODE/0-sublayers lacks the others"
    ]
    samples = results.samples_of["decode", "smollm2", "adaskip", 8 / 60, "gov_report"]
    for column in ("fidelity", "full_score", "full_loss"):
        assert samples[column].notna().sum() == 10
    assert samples["score"].notna().sum() == samples["loss"].notna().sum() == 16


def test_samples_are_paired_by_id_and_not_by_place(tmp_path):
    write(tmp_path, "full", first=3)
    write(tmp_path, "adaskip")
    samples = load_results(tmp_path).samples_of["decode", "smollm2", "adaskip", 8 / 60, "gov_report"]
    assert samples["fidelity"].notna().sum() == 13
    assert (samples["loss"] - samples["full_loss"]).dropna().round(6).unique().tolist() == [0.3]


@pytest.mark.parametrize(
    ("field", "ours", "said"),
    [
        ("max_prompt_tokens", 4096, "max prompt tokens 8192 and not 4096"),
        ("max_new_tokens", {"gov_report": 64, "multi_news": 128}, "max new tokens {'gov_report': 128, 'multi_news'"),
        ("weights_fingerprint", "other", "weights fingerprint 'same' and not 'other'"),
    ],
)
def test_runs_of_other_protocols_are_not_compared(tmp_path, field, ours, said):
    protocol = {"max_prompt_tokens": 8192, "weights_fingerprint": "same"}
    protocol["max_new_tokens"] = {"gov_report": 128, "multi_news": 128}
    rewrite(write(tmp_path, "full"), **protocol)
    rewrite(write(tmp_path, "adaskip"), **{**protocol, field: ours})
    results = load_results(tmp_path)
    (note,) = results.notes
    assert said in note
    known = [
        name for name in ("score", "loss", "fidelity", "retention", "loss_added") if estimate(cell_of(results), name)
    ]
    assert known == ["score", "loss"]


def test_without_the_full_model_there_is_nothing_to_compare_with_and_one_line_says_so(tmp_path):
    write(tmp_path, "adaskip")
    results = load_results(tmp_path)
    assert results.notes == ["no run of the full model smollm2 in phase decode: no comparison"]
    assert "| n/a" in measures_document(results, "decode").split("### Fidelity")[1].split("###")[0]


def test_a_model_that_the_paper_has_not_gets_its_own_rows_and_no_paper_columns(whole):
    assert whole.models == ["smollm2"]
    assert whole.fractions("smollm2") == [8 / 60]
    for text in (scores_document(whole, "decode"), scores_latex(whole, "decode"), measures_latex(whole, "decode")):
        assert "paper" not in text.lower().replace("as in longbench and the paper", "")
        assert "n/p" not in text
    assert "| 13.33 % | AdaSkip " in scores_document(whole, "decode")
    assert "internlm" not in scores_document(whole, "decode")


def _part(text, name):
    return text.split(f"### {name}")[1].split("###")[0].splitlines()


def test_what_is_not_run_yet_is_missing_and_nothing_else(tmp_path):
    write(tmp_path, "full", "adaskip", phase="prefill")
    write(tmp_path, "unified", phase="prefill", num_samples=3, expected=16)
    results = load_results(tmp_path)
    text = measures_document(results, "prefill")
    lines = {line.split("|")[2].strip(): line for line in _part(text, "Loss") if "13.33" in line}
    assert [part.strip() for part in lines["Early Exit"].split("|")[3:-1]] == ["-"] * 6
    assert "6.183*" in lines["Unified Skipping"]
    assert "3.100 [3.075, 3.125]" in lines["AdaSkip"]
    assert "Ours: not run." in measures_document(results, "e2e")
    assert write_tables(results, tmp_path / "tables")
    assert write_plots(results, tmp_path / "plots")


def test_floors_stand_below_the_scores_and_tasks_at_theirs_are_named(tmp_path):
    write_run(tmp_path, Cell("smollm2", "prefill", "full", 0), {"multifieldqa_en": 0.9, "triviaqa": 0.9, "trec": 0.1})
    text = measures_document(load_results(tmp_path), "prefill")
    rows = [
        [part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| floor")
    ]
    assert [row[:4] for row in rows] == [["floor", "empty answer", "0.0", "0.0"], ["floor", "majority class", "-", "-"]]
    assert "At the floor: TREC." in text


def test_a_task_at_its_floor_counts_by_fidelity_and_loss_only(tmp_path):
    for name, quality in {**QUALITY, "full": 0.0}.items():
        cell = Cell("smollm2", "decode", name, 0 if name == "full" else 8)
        write_run(tmp_path, cell, quality, num_layers=LAYERS, loss=LOSSES[name])
    results = load_results(tmp_path)
    assert results.cells.query("phase == 'decode'")["at_floor"].all()
    counted = {measure.name: len(contests(comparisons(results, measure))) for measure in (SCORE, FIDELITY, LOSS)}
    assert counted == {"score": 0, "fidelity": 2, "loss": 2}
    assert (
        "Left out, since their scores are at the floor: smollm2 decode GovReport, smollm2 decode MultiNews."
        in headline(summarise(results))
    )
    said = claims.to_text(results)
    assert "By score AdaSkip cannot be compared yet" in said
    assert "smollm2, decode: At the floor: GovReport, MultiNews." in said


def test_the_claim_is_counted_by_each_measure_and_less_loss_is_better(whole):
    said = claims.to_text(whole)
    for measure in ("score", "fidelity", "loss"):
        assert (
            f"By {measure} AdaSkip is the best of the four strategies in 2 of 2 cells (100 %), tied for the best in 0 "
        )
        assert f"| **{measure}**" in said
    (loss,) = [line for line in said.splitlines() if line.startswith("| loss") and "Early Exit" in line]
    assert [part.strip() for part in loss.split("|")[3:-1]] == ["2", "2", "2", "0", "0", "0"]
    compared = comparisons(whole, LOSS).query("other == 'unified' and task == 'gov_report'")
    (row,) = compared.itertuples()
    assert (row.ours, row.theirs, row.low) == (3.1, 6.2, pytest.approx(3.1))


def test_a_strategy_with_less_loss_beats_adaskip_beyond_chance(tmp_path):
    write(tmp_path, "full", "early_exit", "skipdecode", "unified")
    write_run(tmp_path, Cell("smollm2", "decode", "adaskip", 8), 0.7, num_layers=LAYERS, num_samples=16, loss=7.0)
    found = contests(comparisons(load_results(tmp_path), LOSS))
    assert [*found["outcome"]] == ["beaten", "beaten"]
    assert found["paired_worse"].all()
    assert not found["paired_better"].any()


def test_runs_of_other_samples_are_compared_on_the_common_ones_and_named(tmp_path):
    write(tmp_path, "full", "skipdecode", "unified", "adaskip")
    write(tmp_path, "early_exit", num_samples=3)
    results = load_results(tmp_path)
    of = "the 3 samples of {} that both have, of 3 and 16"
    assert results.notes == [
        f"smollm2-EE-DECODE/8-sublayers: compared with smollm2-ADA-DECODE/8-sublayers on {of.format(task)}"
        for task in ("gov_report", "multi_news")
    ]
    (row,) = comparisons(results, LOSS).query("other == 'early_exit' and task == 'gov_report'").itertuples()
    common = [3.1 - 0.05, 3.1 + 0.05, 3.1 - 0.05]
    assert row.ours == pytest.approx(sum(common) / 3, abs=1e-6)
    assert row.theirs == pytest.approx(row.ours + 7.3 - 3.1)
    assert row.low != row.low  # too few pairs


def test_strategies_of_other_protocols_or_without_a_common_sample_are_not_compared(tmp_path):
    write(tmp_path, "full", "unified", "adaskip")
    rewrite(write(tmp_path, "early_exit"), max_new_tokens={"gov_report": 2, "multi_news": 2})
    rewrite(tmp_path / "smollm2-ADA-DECODE/8-sublayers", max_new_tokens={"gov_report": 128, "multi_news": 128})
    write(tmp_path, "skipdecode", first=16)
    results = load_results(tmp_path)
    assert set(comparisons(results, LOSS)["other"]) == {"unified"}
    (note,) = [line for line in results.notes if "not compared with smollm2-ADA" in line]
    assert note.startswith("smollm2-EE-DECODE/8-sublayers: not compared with smollm2-ADA-DECODE/8-sublayers, which has")
    assert sum("on the 0 samples of" in line for line in results.notes) == 2
    assert not len(contests(comparisons(results, LOSS)))
    write_tables(results, tmp_path / "tables")
    write_plots(results, tmp_path / "plots")


def test_one_sample_is_at_no_floor(tmp_path):
    write(tmp_path, "full", num_samples=1)
    assert not load_results(tmp_path).cells["at_floor"].any()


def withhold(folder: Path) -> None:
    """Take what the data set holds out of a run's records."""
    for path in folder.glob("*.jsonl"):
        lines = [{**json.loads(line), "references": None, "all_classes": None} for line in path.open()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_records_without_their_references_are_shown_by_the_scores_saved_beside_them(tmp_path, monkeypatch):
    folders = [write(tmp_path, name, phase="prefill") for name in ("full", "adaskip")]
    before = load_results(tmp_path)
    for folder in folders:
        withhold(folder)
    after = load_results(tmp_path)
    assert after.cells.equals(before.cells)
    assert after.notes == []
    monkeypatch.setattr(scores, "_floors_fingerprint", lambda: "other code")
    again = load_results(tmp_path)
    assert again.cells.equals(before.cells)
    assert again.notes == [
        f"{label}-sublayers: scores of another version of the metrics; no references to score again"
        for label in ("smollm2-ADA-PREFILL/8", "smollm2-FULL-PREFILL/0")
    ]


@pytest.mark.parametrize("change", ["scores", "predictions"])
def test_records_without_references_are_never_scored_by_other_scores(tmp_path, change):
    folder = write(tmp_path, "adaskip")
    score_run(load_run(folder))
    withhold(folder)
    if change == "scores":
        (folder / "scores.json").unlink()
    else:
        path = folder / "gov_report.jsonl"
        path.write_text(path.read_text().replace('"prediction": "', '"prediction": "x', 1))
    with pytest.raises(ResultsError, match=r"the records have no references, and scores\.json is not of these answers"):
        load_results(tmp_path)
