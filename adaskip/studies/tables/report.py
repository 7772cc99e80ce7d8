"""Writes tables, figures and the summary of scored runs. The same runs give the same bytes."""

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
from adaskip.studies.tables.results import Results
from adaskip.studies.tables.summary import headline, summarise, to_text
from adaskip.studies.tables.tradeoff import KEPT, Tradeoff

TABLE_NAMES = {"prefill": "table3_prefill", "decode": "table3_decode", "e2e": "table4_e2e"}
"""File names of the paper's tables; for other benchmarks `scores_<phase>`."""
CELL = [
    *("phase", "model", "strategy", "fraction", "skipped_sublayers", "num_sublayers", "task", "metric"),
    *("n", "n_expected"),
]


def write_tables(results: Results, out_dir: Path) -> list[Path]:
    """Write Tables 3 and 4, and tables of fidelity and loss, as Markdown, CSV and LaTeX; the summary as Markdown and
    JSON; the claim by every measure; and the comparison of calibrated, if it was run."""
    texts = {}
    for phase in results.phases:
        name = TABLE_NAMES[phase] if results.paper.models else f"scores_{phase}"
        texts[f"{name}.md"] = scores_document(results, phase)
        texts[f"{name}.csv"] = scores_csv(results, phase)
        texts[f"{name}.tex"] = scores_latex(results, phase)
        texts[f"measures_{phase}.md"] = measures_document(results, phase)
        texts[f"measures_{phase}.csv"] = measures_csv(results, phase)
        texts[f"measures_{phase}.tex"] = measures_latex(results, phase)
    summary = summarise(results)
    texts["summary.json"] = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    texts["summary.md"] = to_text(summary)
    texts["claims.md"] = claims.to_text(results)
    texts["claims.csv"] = _as_csv(claims.all_comparisons(results).round(6))
    if len(found := selection.matches(results)):
        texts["selection.md"] = selection.to_text(found)
    return [write_text_atomic(out_dir / name, text) for name, text in texts.items()]


def scores_csv(results: Results, phase: str) -> str:
    """Our scores and the paper's, one row per cell."""
    ours = dict.fromkeys(_with_ends("score", "rouge_score", "retention"), 100)
    return _cells_csv(results, phase, {**ours, "paper_score": 1, "paper_retention": 100, "paper_speedup": 1})


def measures_csv(results: Results, phase: str) -> str:
    """Score and its floor, fidelity and loss, one row per cell."""
    scores = dict.fromkeys([*_with_ends("score"), "floor", *_with_ends("fidelity")], 100)
    return _cells_csv(results, phase, {**scores, **dict.fromkeys(_with_ends("loss", "loss_added"), 1)})


def _cells_csv(results: Results, phase: str, columns: dict[str, float]) -> str:
    """Empty if not run, not measured or not published. columns: name -> factor, 100 for per cent."""
    cells = results.cells[results.cells["phase"] == phase]
    numbers = {name: cells[name].mul(scale).map(lambda x: round(x, 3)) for name, scale in columns.items()}
    return _as_csv(pd.DataFrame({**cells[CELL], **numbers}).rename(columns={"fraction": "fraction_skipped"}))


def _with_ends(*names: str) -> list[str]:
    return [name + end for name in names for end in ("", "_low", "_high")]


def _as_csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, lineterminator="\n")


def write_plots(results: Results, out_dir: Path) -> list[Path]:
    """Draw scores against the budget for each phase, retention over all phases, and a skip map for each model."""
    written = [path for phase in results.phases for path in plot_scores(results, phase, out_dir)]
    written += plot_retention(results, out_dir)
    return written + [path for model in results.models for path in plot_skip_map(results, model, out_dir)]


def write_tradeoffs(tradeoffs: Sequence[Tradeoff], out_dir: Path) -> list[Path]:
    """Write quality against measured speedup: Markdown and JSON into `out_dir`/tables, figures into `out_dir`/plots."""
    texts, figures = {}, []
    for kept in (each for each in tradeoffs if each.quality is KEPT):
        texts |= {"tradeoff.json": tradeoff_text.to_json(kept), "tradeoff.md": tradeoff_text.to_text(kept)}
        figures += plot_kept(kept, out_dir / "plots")
    if measures := [each for each in tradeoffs if each.quality is not KEPT]:
        texts["tradeoff_measures.md"] = tradeoff_text.measures_text(measures)
        figures += plot_measures(measures, out_dir / "plots")
    return [*(write_text_atomic(out_dir / "tables" / name, text) for name, text in texts.items()), *figures]


def headline_of(results: Results) -> list[str]:
    """The main sentences of the summary."""
    return headline(summarise(results))
