"""Tables 3 and 4 as LaTeX `table*`s (booktabs, graphicx): ours beside the paper's, and the retention of both."""

from __future__ import annotations

from collections.abc import Iterator

from adaskip.common.intervals import Estimate
from adaskip.studies.tables import labels
from adaskip.studies.tables.entries import Entry, PhaseEntries
from adaskip.studies.tables.markdown import PARTIAL, row_labels
from adaskip.studies.tables.scoreboard import Row

MISSING = "--"
OURS, PAPERS = ("Ours", "Kept"), ("Ours", "Paper", "Kept", "Paper kept")
"""Columns of a task, without the paper's and with them."""


def to_latex(table: PhaseEntries) -> str:
    """One phase's table, a block of rows per model."""
    speeds = _speed_header(table)
    columns = "ll" + "r" * len(_columns(table)) * len(table.tasks) + "r" * len(speeds)
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{_caption(table)}}}",
        rf"\label{{tab:{table.phase}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        *_header(table, speeds),
    ]
    for model in table.board.models:
        lines += [r"\midrule", rf"\multicolumn{{{len(columns)}}}{{l}}{{\textit{{{_escape(model)}}}}} \\"]
        lines += _rows(table, model)
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table*}"]) + "\n"


def _caption(table: PhaseEntries) -> str:
    beside = ", ours beside the paper's" if table.paper.is_published else ""
    return (
        f"{table.paper.source}{beside}. Scores in per cent with 95\\,\\% bootstrap intervals; kept: score / full "
        "model's score, per cent; bold: the best of the four strategies; "
        f"{MISSING}: not run; {labels.UNPUBLISHED}: not published; {PARTIAL}: unfinished run."
    ) + (f" {table.subsets}" if table.subsets else "")


def _columns(table: PhaseEntries) -> tuple[str, ...]:
    return PAPERS if table.paper.is_published else OURS


def _header(table: PhaseEntries, speeds: list[str]) -> list[str]:
    groups = [(_escape(labels.TASKS[task]), len(_columns(table))) for task in table.tasks] + [("Speedup", 1)] * len(
        speeds
    )
    cells, rules, first = ["", ""], "", 3
    for name, width in groups:
        cells.append(rf"\multicolumn{{{width}}}{{c}}{{{name}}}")
        rules += rf"\cmidrule(lr){{{first}-{first + width - 1}}}"
        first += width
    return [_line(cells), rules, _line(["Skipped", "Strategy", *_columns(table) * len(table.tasks), *speeds])]


def _speed_header(table: PhaseEntries) -> list[str]:
    """The paper's alone: the times of our runs are of different moments."""
    return ["Paper"] if table.paper.has_speedup else []


def _rows(table: PhaseEntries, model: str) -> Iterator[str]:
    """A model's rows, a little space before each budget."""
    previous = 0.0
    for row in table.board.rows(table.phase, model):
        space = r"\addlinespace " if row.fraction != previous else ""
        previous = row.fraction
        yield space + _line([*_row_cells(table, row)])


def _row_cells(table: PhaseEntries, row: Row) -> Iterator[str]:
    yield from (_escape(label) for label in row_labels(row))
    for task in table.tasks:
        yield from _task_cells(table, table.cells[row, task])
    paper = table.board.paper.tables[row.phase]
    if paper.has_speedup:
        speedup = paper.speedup(row.model, row.strategy, row.fraction)
        yield labels.UNPUBLISHED if speedup is None else labels.ratio(speedup)


def _task_cells(table: PhaseEntries, entry: Entry) -> Iterator[str]:
    mark = PARTIAL if entry.partial else ""
    cells = {
        "Ours": _estimate(entry.score, mark, bold=table.best(entry)),
        "Paper": _published(entry.paper_score, bold=table.paper_best(entry)),
        "Kept": _estimate(entry.retention, mark),
        "Paper kept": _published(None if entry.paper_retention is None else 100 * entry.paper_retention),
    }
    yield from (cells[name] for name in _columns(table))


def _estimate(estimate: Estimate | None, mark: str = "", *, bold: bool = False) -> str:
    if estimate is None:
        return MISSING
    value = f"{100 * estimate.value:.1f}{mark}"
    spread = labels.interval(estimate).strip()
    return (rf"\textbf{{{value}}}" if bold else value) + (rf" {{\scriptsize {spread}}}" if spread else "")


def _published(value: float | None, *, bold: bool = False) -> str:
    if value is None:
        return labels.UNPUBLISHED
    return rf"\textbf{{{value:.1f}}}" if bold else f"{value:.1f}"


def _line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escape(text: str) -> str:
    return text.replace("_", r"\_").replace(" %", r"\,\%").replace("&", r"\&")
