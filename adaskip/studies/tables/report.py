"""Saved runs in, everything a reader sees out: scores beside the runs, tables, figures and the summary.

The same runs give the same bytes, so a report can be made again at any time.
"""

from __future__ import annotations

import json
from pathlib import Path

from adaskip.common.files import write_text_atomic
from adaskip.studies.plots.score_curves import plot_retention, plot_scores
from adaskip.studies.plots.skip_maps import plot_skip_map
from adaskip.studies.plots.tradeoff import plot_tradeoff
from adaskip.studies.tables import selection, tradeoff_text
from adaskip.studies.tables.entries import PhaseEntries, to_csv
from adaskip.studies.tables.latex import to_latex
from adaskip.studies.tables.markdown import to_markdown
from adaskip.studies.tables.scoreboard import Scoreboard, load_scoreboard
from adaskip.studies.tables.summary import summarise
from adaskip.studies.tables.summary_text import headline, to_text
from adaskip.studies.tables.tradeoff import Tradeoff

TABLE_NAMES = {"prefill": "table3_prefill", "decode": "table3_decode", "e2e": "table4_e2e"}
"""The paper's; of other benchmarks a table is called by its phase."""


def write_report(runs_dir: str | Path, out_dir: str | Path, *, jobs: int = 1, progress: bool = False) -> list[Path]:
    """Score every run below `runs_dir` and write tables, summary and figures into `out_dir`/tables and `out_dir`/plots.

    Args:
        jobs: processes that score; more than one need a caller that guards `__main__`.
        progress: draw a progress bar if standard error is a terminal.

    Returns:
        What was written there.

    Raises:
        ValueError: there are no runs, or a manifest cannot be read.
    """
    tables = load_tables(runs_dir, jobs=jobs, progress=progress)
    return [*write_tables(tables, Path(out_dir) / "tables"), *write_plots(tables, Path(out_dir) / "plots")]


def load_tables(runs_dir: str | Path, *, jobs: int = 1, progress: bool = False) -> list[PhaseEntries]:
    """Every phase's table of the runs below `runs_dir`."""
    board: Scoreboard = load_scoreboard(runs_dir, jobs=jobs, progress=progress)
    return [PhaseEntries(board, phase) for phase in board.paper.tables]


def write_tables(tables: list[PhaseEntries], out_dir: Path) -> list[Path]:
    """Tables 3 and 4 as Markdown, CSV and LaTeX, the summary as Markdown and JSON, and calibrated's matches."""
    written = []
    for table in tables:
        name = TABLE_NAMES[table.phase] if table.paper.is_published else f"table_{table.phase}"
        for suffix, render in (("md", to_markdown), ("csv", to_csv), ("tex", to_latex)):
            written.append(write_text_atomic(out_dir / f"{name}.{suffix}", render(table)))
    summary = summarise(tables)
    written.append(write_text_atomic(out_dir / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n"))
    written.append(write_text_atomic(out_dir / "summary.md", to_text(summary)))
    if found := selection.matches(tables):
        written.append(write_text_atomic(out_dir / "selection.md", selection.to_text(found)))
    return written


def write_plots(tables: list[PhaseEntries], out_dir: Path) -> list[Path]:
    """Scores against the budget per phase, retention over all phases, and a skip map per model."""
    board = tables[0].board
    written = [path for table in tables for path in plot_scores(table, out_dir)]
    written += plot_retention(tables, out_dir)
    return written + [path for model in board.models for path in plot_skip_map(board, model, out_dir)]


def write_tradeoff(tradeoff: Tradeoff, out_dir: Path) -> list[Path]:
    """Score kept against measured speedup: Markdown and JSON into `out_dir`/tables, figures into `out_dir`/plots."""
    texts = {"json": tradeoff_text.to_json(tradeoff), "md": tradeoff_text.to_text(tradeoff)}
    written = [write_text_atomic(out_dir / "tables" / f"tradeoff.{kind}", text) for kind, text in texts.items()]
    return written + plot_tradeoff(tradeoff, out_dir / "plots")


def headline_of(tables: list[PhaseEntries]) -> list[str]:
    """The summary's answers in plain sentences."""
    return headline(summarise(tables))
