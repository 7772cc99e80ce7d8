"""Tables 3 and 4 as Markdown: per model the scores, ours beside the paper's, and what is kept of the full model's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from adaskip.common.intervals import RESAMPLES
from adaskip.common.pipe_table import pipe_table
from adaskip.studies.tables import labels
from adaskip.studies.tables.entries import Entry, PhaseEntries
from adaskip.studies.tables.paper import Paper
from adaskip.studies.tables.scoreboard import Row, Scoreboard

PARTIAL = "*"


def to_markdown(table: PhaseEntries) -> str:
    """One phase's table as a Markdown document."""
    title = table.paper.source + (": ours beside the paper's" if table.paper.is_published else "")
    parts = [f"# {title}", *notes(table)]
    for model in table.board.models:
        parts += [f"## {model}", describe_model(table.board, table.phase, model), "### Scores"]
        parts += [
            pipe_table(_score_header(table), _score_lines(table, model)),
            "### Retention: score / full model's score",
        ]
        parts += [pipe_table(_retention_header(table), _retention_lines(table, model))]
    return "\n\n".join(parts) + "\n"


def notes(table: PhaseEntries) -> list[str]:
    """What a reader must know to read the numbers."""
    paper = f"Paper: {table.board.paper.source}. Where models and data differ from the paper's, compare retention, not "
    lines = [
        f"Scores are per cent with 95 % bootstrap intervals in brackets ({RESAMPLES} resamples of the samples, "
        "paired with the full model's for retention)." + (f" {paper}scores." if table.paper.is_published else ""),
        f"`{labels.MISSING}` not run; `{labels.UNPUBLISHED}` not published; `{PARTIAL}` unfinished run, scored over "
        "the samples it has; **bold** the best of the four strategies.",
        "No speedup of ours stands here: the times of runs are of different moments. `adaskip bench` times the full "
        "model and every strategy side by side, and `eval/tradeoff.py` shows its speedups beside scores.",
    ]
    if table.subsets:
        lines.insert(1, table.subsets)
    if any(entry.rouge_score for entry in table.cells.values()):
        lines.append(
            "Rouge-L is by `rouge` 1.0.1, as LongBench and the paper have it; `rouge_score` is Google's rougeL of the "
            "same outputs."
        )
    return lines


def describe_model(board: Scoreboard, phase: str, model: str) -> str:
    """What was run here under this model's name, what the paper ran, and the budgets of both."""
    return " ".join(part for part in (_ours(board, phase, model), _papers(board.paper, phase, model)) if part)


def _ours(board: Scoreboard, phase: str, model: str) -> str:
    runs = [scored.run for row, scored in board.runs.items() if (row.phase, row.model) == (phase, model)]
    if not runs:
        return "Ours: not run."
    manifests = [run.manifest for run in runs]
    name = _listed(
        f"the {run.benchmark.name}'s small model" if run.benchmark.models else f"`{run.manifest['checkpoint']}`"
        for run in runs
    )
    made = _listed(f"{each['dtype']} on {each['device']}" for each in manifests)
    samples = _listed(str(number) for each in manifests for number in each["tasks"].values())
    budgets = _listed(str(number) for number in sorted(run.cell.sublayers for run in runs) if number)
    depth = _listed(str(2 * run.num_layers) for run in runs)
    return f"Ours: {name}, {budgets or 'none'} of {depth} sublayers skipped; {made}, {samples} samples a task."


def _papers(paper: Paper, phase: str, model: str) -> str:
    if model not in paper.models:
        return ""
    fractions = sorted(fraction for fraction in paper.tables[phase].by_fraction if fraction)
    budgets = _listed(f"{fraction * paper.num_sublayers:.0f}" for fraction in fractions)
    return f"The paper: {paper.models[model]}, {budgets} of {paper.num_sublayers}."


def _listed(values: Iterable[str]) -> str:
    """`4 / 6 / 8`, each value once."""
    return " / ".join(dict.fromkeys(values))


def _score_header(table: PhaseEntries) -> list[str]:
    header = ["Skipped", "Strategy"]
    for task in table.tasks:
        entry = next(entry for (_, name), entry in table.cells.items() if name == task)
        header += [f"{labels.TASKS[task]} {labels.METRICS[entry.metric]}", *_if_published(table, "paper")]
        header += ["rouge_score"] if _is_rouge(entry) else []
    return [*header, *(["paper's speedup"] if _has_speedup(table) else [])]


def _score_lines(table: PhaseEntries, model: str) -> Iterator[list[str]]:
    for row in table.board.rows(table.phase, model):
        line = row_labels(row)
        for task in table.tasks:
            entry = table.cells[row, task]
            line += [score_text(table, entry), *_if_published(table, paper_text(table, entry))]
            line += [labels.percent(entry.rouge_score)] if _is_rouge(entry) else []
        yield line + ([paper_speedup(table, row)] if _has_speedup(table) else [])


def _retention_header(table: PhaseEntries) -> list[str]:
    return [
        "Skipped",
        "Strategy",
        *(text for task in table.tasks for text in (labels.TASKS[task], *_if_published(table, "paper"))),
    ]


def _retention_lines(table: PhaseEntries, model: str) -> Iterator[list[str]]:
    for row in table.board.rows(table.phase, model):
        if row.strategy == "full":
            continue
        line = row_labels(row)
        for task in table.tasks:
            entry = table.cells[row, task]
            paper = entry.paper_retention
            line.append(labels.percent(entry.retention) + (PARTIAL if entry.partial and entry.retention else ""))
            line += _if_published(table, labels.UNPUBLISHED if paper is None else f"{100 * paper:.1f}")
        yield line


def row_labels(row: Row) -> list[str]:
    return [labels.budget(row.fraction), labels.STRATEGIES[row.strategy]]


def score_text(table: PhaseEntries, entry: Entry) -> str:
    """`**88.1** [84.2, 91.0]`"""
    if entry.score is None:
        return labels.MISSING
    value = f"{100 * entry.score.value:.1f}" + (PARTIAL if entry.partial else "")
    return (f"**{value}**" if table.best(entry) else value) + labels.interval(entry.score)


def paper_text(table: PhaseEntries, entry: Entry) -> str:
    if entry.paper_score is None:
        return labels.UNPUBLISHED
    return f"**{entry.paper_score:.1f}**" if table.paper_best(entry) else f"{entry.paper_score:.1f}"


def paper_speedup(table: PhaseEntries, row: Row) -> str:
    value = table.board.paper.tables[row.phase].speedup(row.model, row.strategy, row.fraction)
    return labels.UNPUBLISHED if value is None else labels.ratio(value)


def _has_speedup(table: PhaseEntries) -> bool:
    return table.paper.has_speedup


def _if_published(table: PhaseEntries, text: str) -> list[str]:
    """A column of the paper's, where it has published anything."""
    return [text] if table.paper.is_published else []


def _is_rouge(entry: Entry) -> bool:
    return entry.metric == "rouge_l"
