"""The tables as LaTeX `table*`s (booktabs, graphicx): a group of columns per task, a block of rows per model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from adaskip.studies.tables import labels
from adaskip.studies.tables.documents import PARTIAL, subsets_of, table_of
from adaskip.studies.tables.results import Results, estimate

MISSING = "--"
OURS, PAPERS = ("Ours", "Kept"), ("Ours", "Paper", "Kept", "Paper kept")
MEASURES = ("Fidelity", "Loss", "Above full", "Score")


def scores_latex(results: Results, phase: str) -> str:
    """Scores and retention of one phase, ours beside the paper's."""
    paper, known = results.paper.tables[phase], bool(results.paper_models)
    caption = (
        f"{paper.source + ', ours beside the paper' + chr(39) + 's' if known else labels.PHASES[phase].capitalize()}. "
        "Scores in per cent with 95\\,\\% bootstrap intervals; kept: score / full model's score, per cent; bold: the "
        f"best of the four strategies; {MISSING}: not run; "
        f"{f'{labels.UNPUBLISHED}: not published; ' if known else ''}{PARTIAL}: unfinished run."
    )
    speeds = ["Paper"] if known and paper.has_speedup else []
    return _table(results, phase, caption, phase, PAPERS if known else OURS, _papers if known else _ours, speeds)


def measures_latex(results: Results, phase: str) -> str:
    """Fidelity, loss of the reference answer, and scores of one phase."""
    caption = (
        f"{labels.PHASES[phase].capitalize()}. Fidelity: the task's metric against the full model's answer, per cent; "
        "loss of the reference answer, nats per token, and its paired difference to the full model's; score in per "
        f"cent; 95\\,\\% bootstrap intervals; bold: the best of the four strategies; {MISSING}: not run or not "
        f"measured; {PARTIAL}: unfinished run."
    )
    return _table(results, phase, caption, f"{phase}-measures", MEASURES, _measures, [])


def _table(
    results: Results,
    phase: str,
    caption: str,
    label: str,
    columns: tuple[str, ...],
    texts: Callable[[Any], list[str]],
    speeds: list[str],
) -> str:
    """columns: of each task; texts: their cells. speeds: a last column of the paper's speedups, if any.

    No speedup of ours: the times of our runs are of different moments.
    """
    cells, tasks = table_of(results, phase), results.tasks(phase)
    heads, rules, first = ["", ""], "", 3
    for name, width in [(labels.task(task), len(columns)) for task in tasks] + [("Speedup", 1)] * len(speeds):
        heads.append(rf"\multicolumn{{{width}}}{{c}}{{{_escape(name)}}}")
        rules += rf"\cmidrule(lr){{{first}-{first + width - 1}}}"
        first += width
    width = 2 + len(columns) * len(tasks) + len(speeds)
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{' '.join(filter(None, (caption, subsets_of(results, phase))))}}}",
        rf"\label{{tab:{label}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{ll{'r' * (width - 2)}}}",
        r"\toprule",
        *(_line(heads), rules, _line(["Skipped", "Strategy", *columns * len(tasks), *speeds])),
    ]
    for model in results.models:
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\textit{{{_escape(model)}}}}} \\"]
        previous = 0.0
        own = cells[cells["model"] == model]
        for (fraction, strategy), group in own.groupby(["fraction", "strategy"], sort=False):
            row = [_escape(labels.budget(fraction)), _escape(labels.STRATEGIES[strategy])]
            row += [text for cell in group.itertuples() for text in texts(cell)]
            row += [_number(group["paper_speedup"].iloc[0], digits=2)] * len(speeds)
            lines.append((r"\addlinespace " if fraction != previous else "") + _line(row))  # space before a budget
            previous = fraction
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table*}"]) + "\n"


def _ours(cell: Any) -> list[str]:
    mark = PARTIAL if cell.partial else ""
    return [_estimate(cell, "score", mark, bold=cell.score_best), _estimate(cell, "retention", mark)]


def _papers(cell: Any) -> list[str]:
    score, kept = _ours(cell)
    paper = _number(cell.paper_score, bold=cell.paper_score_best)
    return [score, paper, kept, _number(100 * cell.paper_retention)]


def _measures(cell: Any) -> list[str]:
    mark = PARTIAL if cell.partial else ""
    return [
        _estimate(cell, "fidelity", mark, bold=cell.fidelity_best),
        _estimate(cell, "loss", mark, bold=cell.loss_best, scale=1, digits=3),
        _estimate(cell, "loss_added", scale=1, digits=3),
        _estimate(cell, "score", mark, bold=cell.score_best),
    ]


def _estimate(cell: Any, name: str, mark: str = "", *, bold: bool = False, scale: float = 100, digits: int = 1) -> str:
    found = estimate(cell, name)
    if found is None:
        return MISSING
    value = f"{scale * found.value:.{digits}f}{mark}"
    spread = "" if found.low is None else f"[{scale * found.low:.{digits}f}, {scale * found.high:.{digits}f}]"
    return (rf"\textbf{{{value}}}" if bold else value) + (rf" {{\scriptsize {spread}}}" if spread else "")


def _number(value: float, *, bold: bool = False, digits: int = 1) -> str:
    """One of the paper's."""
    if math.isnan(value):
        return labels.UNPUBLISHED
    return rf"\textbf{{{value:.{digits}f}}}" if bold else f"{value:.{digits}f}"


def _line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escape(text: str) -> str:
    return text.replace("_", r"\_").replace(" %", r"\,\%").replace("&", r"\&")
