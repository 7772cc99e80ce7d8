"""Saved runs in, everything a reader sees out: scores beside the runs, tables, figures and the summary.

The same runs give the same bytes, so a report can be made again at any time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from adaskip.common.files import write_text_atomic
from adaskip.studies.plots.score_curves import plot_retention, plot_scores
from adaskip.studies.plots.skip_maps import plot_skip_map
from adaskip.studies.plots.tradeoff import plot_kept, plot_measures
from adaskip.studies.tables import claims, selection, tradeoff_text
from adaskip.studies.tables.documents import measures_document, scores_document
from adaskip.studies.tables.latex import measures_latex, scores_latex
from adaskip.studies.tables.results import Results, load_results
from adaskip.studies.tables.summary import summarise
from adaskip.studies.tables.summary_text import headline, to_text
from adaskip.studies.tables.tradeoff import KEPT, Tradeoff

TABLE_NAMES = {"prefill": "table3_prefill", "decode": "table3_decode", "e2e": "table4_e2e"}
COUNTS = [
    "phase",
    "model",
    "strategy",
    "fraction",
    "skipped_sublayers",
    "num_sublayers",
    "task",
    "metric",
    "n",
    "n_expected",
]


def write_report(runs_dir: str | Path, out_dir: str | Path, *, jobs: int = 1, progress: bool = False) -> list[Path]:
    """Score every run below `runs_dir` and write tables, summary and figures into `out_dir`/tables and `out_dir`/plots.

    The arguments are those of `load_results`. Returns what was written.
    """
    results = load_results(runs_dir, jobs=jobs, progress=progress)
    return [*write_tables(results, Path(out_dir) / "tables"), *write_plots(results, Path(out_dir) / "plots")]


def write_tables(results: Results, out_dir: Path) -> list[Path]:
    """Tables 3 and 4, and those of fidelity and loss, as Markdown, CSV and LaTeX; the summary as Markdown and JSON; the
    claim by every measure; and calibrated's matches, if there are any."""
    texts = {}
    for phase, name in TABLE_NAMES.items():
        texts[f"{name}.md"] = scores_document(results, phase)
        texts[f"{name}.csv"] = scores_csv(results, phase)
        texts[f"{name}.tex"] = scores_latex(results, phase)
    for phase in TABLE_NAMES:
        texts[f"measures_{phase}.md"] = measures_document(results, phase)
        texts[f"measures_{phase}.csv"] = measures_csv(results, phase)
        texts[f"measures_{phase}.tex"] = measures_latex(results, phase)
    summary = summarise(results)
    texts["summary.json"] = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    texts["summary.md"] = to_text(summary)
    texts["claims.md"] = claims.to_text(results)
    texts["claims.csv"] = claims.all_comparisons(results).round(6).to_csv(index=False, lineterminator="\n")
    if len(found := selection.matches(results)):
        texts["selection.md"] = selection.to_text(found)
    return [write_text_atomic(out_dir / name, text) for name, text in texts.items()]


def write_plots(results: Results, out_dir: Path) -> list[Path]:
    """Scores against the budget per phase, retention over all phases, and a skip map per model."""
    written = [path for phase in results.paper.tables for path in plot_scores(results, phase, out_dir)]
    written += plot_retention(results, out_dir)
    return written + [path for model in results.models for path in plot_skip_map(results, model, out_dir)]


def write_tradeoffs(tradeoffs: Sequence[Tradeoff], out_dir: Path) -> list[Path]:
    """Quality against measured speedup: Markdown and JSON into `out_dir`/tables, figures into `out_dir`/plots."""
    kept, measures = ([each for each in tradeoffs if (each.quality is KEPT) == wanted] for wanted in (True, False))
    texts = {}
    for tradeoff in kept:
        texts |= {"tradeoff.json": tradeoff_text.to_json(tradeoff), "tradeoff.md": tradeoff_text.to_text(tradeoff)}
    if measures:
        texts["tradeoff_measures.md"] = tradeoff_text.measures_text(measures)
    written = [write_text_atomic(out_dir / "tables" / name, text) for name, text in texts.items()]
    written += [path for tradeoff in kept for path in plot_kept(tradeoff, out_dir / "plots")]
    return written + (plot_measures(measures, out_dir / "plots") if measures else [])


def headline_of(results: Results) -> list[str]:
    """The summary's answers in plain sentences."""
    return headline(summarise(results))


def scores_csv(results: Results, phase: str) -> str:
    return _csv(results, phase, SCORE_COLUMNS)


def measures_csv(results: Results, phase: str) -> str:
    return _csv(results, phase, MEASURE_COLUMNS)


def _csv(results: Results, phase: str, columns: dict[str, float]) -> str:
    """One line per cell; empty where not run, not measured or not published. columns: with the factor of each."""
    cells = results.cells[results.cells["phase"] == phase]
    numbers = {name: cells[name].mul(scale).map(lambda x: round(x, 3)) for name, scale in columns.items()}
    table = pd.DataFrame({**{name: cells[name] for name in COUNTS}, **numbers})
    return table.rename(columns={"fraction": "fraction_skipped"}).to_csv(index=False, lineterminator="\n")


def _with_ends(*names: str) -> list[str]:
    return [name + end for name in names for end in ("", "_low", "_high")]


SCORE_COLUMNS = {
    **dict.fromkeys(_with_ends("score", "rouge_score", "retention"), 100),
    **{"paper_score": 1, "paper_retention": 100, "paper_speedup": 1},
}
MEASURE_COLUMNS = {
    **dict.fromkeys(_with_ends("score", "fidelity"), 100),
    "floor": 100,
    **dict.fromkeys(_with_ends("loss", "loss_added"), 1),
}
