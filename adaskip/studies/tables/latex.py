"""The tables as LaTeX `table*`s (booktabs, graphicx): a group of columns per task, a block of rows per model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from adaskip.studies.tables import documents, labels
from adaskip.studies.tables.labels import PARTIAL, UNPUBLISHED
from adaskip.studies.tables.results import Results

MISSING = "--"
BOLD, SPREAD = re.compile(r"\*\*(.+?)\*\*"), re.compile(r" (\[.*\])")
INTERVALS = "95\\,\\% bootstrap intervals"


def scores_latex(results: Results, phase: str) -> str:
    """Scores and retention of one phase, ours beside the paper's."""
    known = bool(results.paper_models)
    source, unpublished = results.paper.tables[phase].source, f" {UNPUBLISHED}: not published;"
    caption = (
        f"{f'{source}, ours beside the paper' + chr(39) + 's' if known else documents.title(phase)}. Scores in per "
        f"cent with {INTERVALS}; kept: score / full model's score, per cent; bold: the best of the four strategies; "
        f"{MISSING}: not run;{unpublished if known else ''} {PARTIAL}: unfinished run."
    )
    columns = ("Ours", "Paper", "Kept", "Paper kept") if known else ("Ours", "Kept")

    def texts(cell: Any) -> list[str]:
        ours, kept = documents.score(cell)[0][1], documents.retention(cell)[0][1]
        paper = labels.published(cell.paper_score, bold=cell.paper_score_best)
        return [ours, paper, kept, labels.published(100 * cell.paper_retention)] if known else [ours, kept]

    return _table(results, phase, caption, phase, columns, texts)


def measures_latex(results: Results, phase: str) -> str:
    """Fidelity, loss of the reference answer, and scores of one phase."""
    caption = (
        f"{documents.title(phase)}. Fidelity: the task's metric against the full model's answer, per cent; loss of the "
        "reference answer, nats per token, and its paired difference to the full model's; score in per cent; "
        f"{INTERVALS}; bold: the best of the four strategies; {MISSING}: not run; {labels.UNKNOWN}: not measured; "
        f"{PARTIAL}: unfinished run."
    )

    def texts(cell: Any) -> list[str]:
        pairs = [*documents.fidelity(cell), *documents.loss(cell), documents.score(cell)[0]]
        return [text for _, text in pairs]

    columns = ("Fidelity", "Loss", "Above full", "Score")
    return _table(results, phase, caption, f"{phase}-measures", columns, texts, speedup=False)


def _table(
    results: Results,
    phase: str,
    caption: str,
    label: str,
    columns: tuple[str, ...],
    texts: Callable[[Any], list[str]],
    *,
    speedup: bool = True,
) -> str:
    """columns: headings of each task; texts: its cells, as in Markdown. speedup: whether to show the paper's speedups.

    Our runs have no speedup, since they were not timed side by side.
    """
    cells, tasks = documents.table_of(results, phase), results.tasks(phase)
    speeds = ["Paper"] * (speedup and bool(cells["has_speedup"].any()))
    groups = [(labels.TASKS[task], len(columns)) for task in tasks] + [("Speedup", 1)] * len(speeds)
    rules, width = "", 2
    for _, more in groups:
        rules, width = rules + rf"\cmidrule(lr){{{width + 1}-{width + more}}}", width + more
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{' '.join(filter(None, (caption, documents.subsets_of(results, phase))))}}}",
        rf"\label{{tab:{label}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{ll{'r' * (width - 2)}}}",
        r"\toprule",
        _line(["", "", *(rf"\multicolumn{{{more}}}{{c}}{{{_escape(name)}}}" for name, more in groups)]),
        rules,
        _line(["Skipped", "Strategy", *columns * len(tasks), *speeds]),
    ]
    for model in results.models:
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\textit{{{_escape(model)}}}}} \\"]
        previous = 0.0
        for (fraction, strategy), group in documents.lines_of(cells[cells["model"] == model]):
            row = [labels.budget(fraction), labels.STRATEGIES[strategy]]
            row += [text for cell in group for text in texts(cell)]
            row += [labels.published(group[0].paper_speedup, digits=2)] * len(speeds)
            space = r"\addlinespace " if fraction != previous else ""  # before a budget
            lines.append(space + _line([_cell(text) for text in row]))
            previous = fraction
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table*}"]) + "\n"


def _cell(text: str) -> str:
    """A cell of a Markdown table as LaTeX."""
    text = MISSING if text == labels.MISSING else BOLD.sub(r"\\textbf{\1}", text)
    return _escape(SPREAD.sub(r" {\\scriptsize \1}", text))


def _line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escape(text: str) -> str:
    return text.replace("_", r"\_").replace(" %", r"\,\%").replace("&", r"\&")
