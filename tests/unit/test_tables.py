"""Tables 3 and 4: ours beside the paper's by the fraction skipped; what was not run or published is never a number."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from adaskip.common.configs import load_yaml
from adaskip.runs.cells import Cell
from adaskip.studies.tables.documents import measures_document, scores_document, table_of
from adaskip.studies.tables.latex import measures_latex, scores_latex
from adaskip.studies.tables.paper import load_paper
from adaskip.studies.tables.report import TABLE_NAMES, scores_csv, write_plots, write_tables
from adaskip.studies.tables.results import Results, load_results
from tests.saved_runs import write_run

QUALITY = {"full": 1.0, "early_exit": 0.7, "skipdecode": 0.2, "unified": 0.4, "adaskip": 0.9}


def write_budget(runs_dir: Path, phase: str = "decode", sublayers: int = 4, **quality: float) -> None:
    """The full model and the four strategies at one budget, for llama."""
    for strategy, share in {**QUALITY, **quality}.items():
        cell = Cell("llama", phase, strategy, 0 if strategy == "full" else sublayers)
        if not cell.folder(runs_dir).exists():
            write_run(runs_dir, cell, share, speedup=1.0 if strategy == "full" else 0.25)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """Decode at two budgets, the second without Unified Skipping and with an unfinished Early Exit."""
    runs_dir = tmp_path_factory.mktemp("runs")
    write_budget(runs_dir)
    for strategy in ("skipdecode", "adaskip"):
        write_run(runs_dir, Cell("llama", "decode", strategy, 8), 0.5)
    write_run(runs_dir, Cell("llama", "decode", "early_exit", 8), 0.5, num_samples=5, expected=12)
    return load_results(runs_dir)


@pytest.fixture(scope="module")
def markdown(results) -> str:
    return scores_document(results, "decode")


def cell(results: Results, strategy: str, fraction: float):
    """llama's on GovReport, decode."""
    return results.cell_of["decode", "llama", strategy, fraction, "gov_report"]


def decode_of(runs_dir: Path) -> str:
    return scores_document(load_results(runs_dir), "decode")


def cells_of(markdown: str, skipped: str, strategy: str, part: str = "### Scores") -> list[str]:
    """The cells of llama's row."""
    block = markdown.split("## llama")[1].split("## internlm")[0].split(part)[1].split("###")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
    return next(row[2:] for row in rows if row[:2] == [skipped, strategy])


def test_paper_numbers_are_found_by_fraction():
    tables = load_paper().tables
    assert tables["prefill"].score("llama", "adaskip", 0.125, "trec") == 72.8
    assert tables["decode"].score("internlm", "skipdecode", 0.25, "multi_news") == 9.8
    assert tables["e2e"].score("vicuna", "adaskip", 0.25, "gov_report") == 13.6
    assert tables["prefill"].speedup("internlm", "adaskip", 0.25) == 1.51
    assert tables["e2e"].speedup("llama", "adaskip", 0.25) is None
    assert tables["e2e"].retention("llama", "adaskip", 0.125, "gov_report") == pytest.approx(30.5 / 34.2)


def test_the_paper_prints_no_scores_for_the_middle_budget():
    for table in load_paper().tables.values():
        assert all(table.score("llama", "adaskip", 0.1875, task) is None for task in table.tasks)


def test_the_papers_rows_are_as_long_as_its_columns():
    for table in load_paper().tables.values():
        for models in table.by_fraction.values():
            lengths = {len(numbers) for rows in models.values() for numbers in rows.values()}
            assert lengths == {len(table.tasks) + table.has_speedup}


def test_the_papers_data_file_covers_its_four_tables():
    content = load_yaml("paper")
    assert len(content["offline_hit_rate"]["rows"]) == 6
    assert len(content["online_hit_rate"]["rows"]) == 6
    assert [len(block["by_sublayers"]) for block in content["scores"].values()] == [3, 3, 3]


def test_our_four_of_32_stand_beside_the_papers_eight_of_64(results):
    ours = cell(results, "adaskip", 0.125)
    assert ours.paper_score == 30.9
    assert ours.score > 0


def test_retention_is_over_the_full_models_samples(results):
    ours, full = cell(results, "adaskip", 0.125), cell(results, "full", 0.0)
    assert ours.retention == pytest.approx(ours.score / full.score)
    assert ours.retention_low < ours.retention < ours.retention_high


def test_retention_of_an_unfinished_run_compares_the_shared_samples_only(results):
    ours, full = (
        results.samples_of["decode", "llama", *row, "gov_report"]["score"]
        for row in (("early_exit", 0.25), ("full", 0.0))
    )
    assert (len(ours), len(full)) == (5, 12)
    assert cell(results, "early_exit", 0.25).retention == pytest.approx(ours.mean() / full[ours.index].mean())


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_times_of_runs_make_no_speedup(tmp_path, phase):
    """Runs that were four times as slow: of another moment or another machine, no score table tells."""
    tables = []
    for name, speedup in (("slow", 0.25), ("equal", 1.0)):
        for strategy in ("full", "adaskip"):
            cell = Cell("llama", phase, strategy, 4 * (strategy != "full"))
            write_run(tmp_path / name, cell, 1.0, speedup=speedup if strategy == "adaskip" else 1.0)
        results = load_results(tmp_path / name)
        tables.append([make(results, phase) for make in (scores_document, scores_csv, scores_latex)])
    assert tables[0] == tables[1]
    assert "0.25" not in tables[0][0].split("### Scores")[1].split("###")[0]


def test_the_papers_speedups_stand_in_the_tables(results, markdown):
    assert cells_of(markdown, "12.5 %", "AdaSkip")[-1] == "1.15"
    assert "paper's speedup" in markdown
    assert r"\multicolumn{1}{c}{Speedup}" in scores_latex(results, "decode")
    (line,) = [
        line
        for line in csv.DictReader(io.StringIO(scores_csv(results, "decode")))
        if (line["model"], line["strategy"], line["fraction_skipped"], line["task"])
        == ("llama", "adaskip", "0.125", "gov_report")
    ]
    assert line["paper_speedup"] == "1.15"


def test_a_missing_cell_is_a_dash_and_never_zero(markdown):
    assert cells_of(markdown, "25 %", "Unified Skipping") == ["-", "12.0", "-", "-", "8.7", "-", "1.26"]
    assert cells_of(markdown, "25 %", "Unified Skipping", "### Retention")[0] == "-"
    assert cells_of(markdown, "18.75 %", "AdaSkip") == ["-", "n/p", "-", "-", "n/p", "-", "n/p"]


def test_a_run_without_any_sample_is_missing_too(tmp_path):
    write_budget(tmp_path)
    folder = Cell("llama", "decode", "adaskip", 4).folder(tmp_path)
    (folder / "gov_report.jsonl").write_text("")
    shown = cells_of(decode_of(tmp_path), "12.5 %", "AdaSkip")
    assert shown[0] == "-"
    assert shown[3] != "-"


def test_a_strategy_that_scores_nothing_is_zero_and_not_missing(tmp_path):
    write_budget(tmp_path, skipdecode=0.0)
    assert cells_of(decode_of(tmp_path), "12.5 %", "SkipDecode")[0] == "0.0 [0.0, 0.0]"


def test_an_unfinished_run_is_marked(markdown):
    assert "*" in cells_of(markdown, "25 %", "Early Exit")[0]
    assert "*" in cells_of(markdown, "25 %", "Early Exit", "### Retention")[0]


def test_the_best_of_four_is_bold_in_ours_and_in_the_papers(markdown):
    assert cells_of(markdown, "12.5 %", "AdaSkip")[0].startswith("**")
    assert cells_of(markdown, "12.5 %", "AdaSkip")[1] == "**30.9**"
    assert not cells_of(markdown, "12.5 %", "Early Exit")[0].startswith("**")


def best_of(results: Results, fraction: float, column: str = "score_best") -> list[str]:
    cells = table_of(results, "decode").query("model == 'llama' and fraction == @fraction and task == 'gov_report'")
    return [*cells.loc[cells[column], "strategy"]]


def test_nothing_is_best_until_all_four_have_run(results):
    assert best_of(results, 0.25) == []


def test_equal_scores_are_both_best(tmp_path):
    write_budget(tmp_path, early_exit=0.9)
    assert best_of(load_results(tmp_path), 0.125) == ["early_exit", "adaskip"]


def test_the_full_model_competes_with_nobody(results):
    assert best_of(results, 0.0) == best_of(results, 0.0, "paper_score_best") == []


def test_csv_holds_every_cell_and_leaves_the_unknown_empty(results):
    lines = list(csv.DictReader(io.StringIO(scores_csv(results, "decode"))))
    assert len(lines) == 3 * 16 * 2
    found = {(line["model"], line["strategy"], line["fraction_skipped"], line["task"]): line for line in lines}
    ours = found["llama", "adaskip", "0.125", "gov_report"]
    assert (ours["n"], ours["skipped_sublayers"], ours["num_sublayers"], ours["paper_score"]) == (
        "12",
        "4",
        "32",
        "30.9",
    )
    assert float(ours["score_low"]) <= float(ours["score"]) <= float(ours["score_high"])
    missing = found["vicuna", "adaskip", "0.1875", "gov_report"]
    assert {name for name, value in missing.items() if value} == {
        "phase", "model", "strategy", "fraction_skipped", "task", "metric"
    }  # fmt: skip


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
@pytest.mark.parametrize("make", [scores_latex, measures_latex])
def test_every_latex_row_has_all_columns(results, phase, make):
    text = make(results, phase)
    columns = len(text.split(r"\begin{tabular}{")[1].split("}")[0])
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and r"\multicolumn" not in line]
    assert len(rows) == 1 + 3 * 16
    assert {line.count("&") + 1 for line in rows} == {columns}
    assert text.count("{") == text.count("}")


def test_a_budget_of_our_own_gets_its_rows(tmp_path):
    write_budget(tmp_path, sublayers=2)
    assert load_results(tmp_path).fractions("llama") == [0.0625, 0.125, 0.1875, 0.25]
    assert cells_of(decode_of(tmp_path), "6.25 %", "AdaSkip")[0].startswith("**")


def test_options_of_strategies_are_said_in_the_tables_of_their_phase(tmp_path):
    folder = write_run(tmp_path, Cell("llama", "prefill", "adaskip", 4), 0.9)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"strategy_options": {"keep_kv": True}}))
    results = load_results(tmp_path)
    for make in (scores_document, measures_document):
        assert "Options of strategies: AdaSkip with keep_kv=True." in make(results, "prefill")
        assert "Options of strategies" not in make(results, "e2e")


@pytest.mark.slow
def test_a_subset_is_said_in_every_table_that_shows_its_intervals(tmp_path):
    folder = write_run(tmp_path, Cell("llama", "prefill", "adaskip", 4), 0.9)
    results = load_results(tmp_path)
    assert "subset" not in scores_document(results, "prefill") + scores_latex(results, "prefill")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"subset": 12, "seed": 3}))
    results = load_results(tmp_path)
    for text in (make(results, "prefill") for make in (scores_document, scores_latex, measures_document)):
        assert "Scores and intervals are over a random subset of 12 samples a task (seed 3)" in text
    assert "subset" not in scores_document(results, "e2e")


def write_all(folder: Path) -> list[Path]:
    results = load_results(folder / "runs")
    return [*write_tables(results, folder / "out/tables"), *write_plots(results, folder / "out/plots")]


def test_a_report_made_again_has_the_same_bytes(tmp_path):
    write_budget(tmp_path / "runs", "e2e")
    written = write_all(tmp_path)
    first = {path: path.read_bytes() for path in written}
    assert {path.name for path in written if path.parent.name == "tables"} == {
        *(
            f"{name}.{kind}"
            for name in (*TABLE_NAMES.values(), "measures_prefill", "measures_decode", "measures_e2e")
            for kind in ("md", "csv", "tex")
        ),
        *("claims.md", "claims.csv"),
        "summary.md",
        "summary.json",
    }
    assert write_all(tmp_path) == written
    assert {path: path.read_bytes() for path in written} == first
    json.loads((tmp_path / "out/tables/summary.json").read_text(), parse_constant=pytest.fail)
