"""Score against the share of sublayers skipped: one figure per phase, a row per model, a column per task.

And over all phases what is kept of the full model's score, beside what the paper's models kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adaskip.common.intervals import Estimate, mean_if_whole
from adaskip.studies.plots.style import FULL_LINE, LOOKS, Look, save, styled
from adaskip.studies.tables import labels
from adaskip.studies.tables.entries import PhaseEntries
from adaskip.studies.tables.scoreboard import Row, Scoreboard

LEGEND_COLUMNS = 3
DODGE = 0.35
"""Percentage points of the axis between neighbouring strategies, so that their error bars stand side by side."""


def plot_scores(table: PhaseEntries, out_dir: Path) -> list[Path]:
    """Write `scores_<phase>.png` and `.svg`: lines per strategy with 95 % intervals, the full model as a level line.

    A phase without any run has no figure.
    """
    models = _models_run([table])
    if not models:
        return []
    with styled():
        figure, axes = _panels(len(models), len(table.tasks))
        for model, line in zip(models, axes, strict=True):
            for task, panel in zip(table.tasks, line, strict=True):
                _draw_scores(panel, table, model, task)
        _name(axes, models, [f"{labels.TASKS[task]} ({_metric(table, task)})" for task in table.tasks])
        _share_axes(figure, axes, table.board.fractions, "score, per cent")
        unfinished = [_UNFINISHED_HANDLE] if any(entry.partial for entry in table.cells.values()) else []
        handles = [*_strategy_handles(table.board), *unfinished]
        figure.legend(handles=handles, loc="outside upper center", ncols=LEGEND_COLUMNS)
        return save(figure, out_dir / f"scores_{table.phase}")


def plot_retention(tables: Sequence[PhaseEntries], out_dir: Path) -> list[Path]:
    """Write `retention.png` and `.svg`: retention averaged over a phase's tasks, ours solid and the paper's faint."""
    models = _models_run(tables)
    if not models:
        return []
    with styled():
        figure, axes = _panels(len(models), len(tables))
        for model, line in zip(models, axes, strict=True):
            for table, panel in zip(tables, line, strict=True):
                _draw_retention(panel, table, model)
        _name(axes, models, [labels.PHASES[table.phase] for table in tables])
        _share_axes(figure, axes, tables[0].board.fractions, "score kept, per cent")
        handles = [*_strategy_handles(tables[0].board), _PAPER_HANDLE]
        figure.legend(handles=handles, loc="outside upper center", ncols=LEGEND_COLUMNS)
        return save(figure, out_dir / "retention")


def _models_run(tables: Sequence[PhaseEntries]) -> list[str]:
    """The models that have a score in any of the tables."""
    run = {row.model for table in tables for (row, _), entry in table.cells.items() if entry.score}
    return [model for model in tables[0].board.models if model in run]


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(2.3 * columns + 0.5, 1.75 * rows + 1.0), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)


def _draw_scores(panel: Axes, table: PhaseEntries, model: str, task: str) -> None:
    full = table.cells[Row(table.phase, model, "full", 0.0), task].score
    if full is not None:
        panel.axhline(100 * full.value, **FULL_LINE)
    for strategy in table.board.skipping:
        look = LOOKS[strategy]
        cells = [table.cells[Row(table.phase, model, strategy, fraction), task] for fraction in table.board.fractions]
        points = [
            (_x(table.board, entry.row), entry.score, entry.partial) for entry in cells if entry.score is not None
        ]
        x, scores = [at for at, _, _ in points], [score for _, score, _ in points]
        y = [100 * score.value for score in scores]
        panel.errorbar(x, y, yerr=_reach(scores), **look.line, elinewidth=0.8, capsize=1.5)
        unfinished = [number for number, (_, _, partial) in enumerate(points) if partial]
        panel.plot([x[number] for number in unfinished], [y[number] for number in unfinished], **look.hollow)


def _draw_retention(panel: Axes, table: PhaseEntries, model: str) -> None:
    panel.axhline(100, **FULL_LINE)
    for strategy in table.board.skipping:
        rows = [Row(table.phase, model, strategy, fraction) for fraction in table.board.fractions]
        cells = [[table.cells[row, task] for task in table.tasks] for row in rows]
        ours = [mean_if_whole([entry.final_retention for entry in line]) for line in cells]
        paper = [mean_if_whole([entry.paper_retention for entry in line]) for line in cells]
        for kept, style in ((paper, LOOKS[strategy].faint), (ours, LOOKS[strategy].line)):
            points = [
                (_x(table.board, row), 100 * share) for row, share in zip(rows, kept, strict=True) if share is not None
            ]
            panel.plot([x for x, _ in points], [y for _, y in points], **style)


def _name(axes: np.ndarray, models: Sequence[str], columns: Sequence[str]) -> None:
    """Columns above, models on the right."""
    for panel, column in zip(axes[0], columns, strict=True):
        panel.set_title(column)
    for panel, model in zip(axes[:, -1], models, strict=True):
        panel.annotate(model, (1.03, 0.5), xycoords="axes fraction", rotation=270, va="center", fontsize=9)


def _share_axes(figure: Figure, axes: np.ndarray, fractions: Sequence[float], quantity: str) -> None:
    low, high = 100 * fractions[0], 100 * fractions[-1]
    panel = axes[0, 0]
    panel.set_xticks([100 * fraction for fraction in fractions], [f"{100 * fraction:.4g}" for fraction in fractions])
    panel.set_xlim(low - 4 * DODGE, high + 4 * DODGE)
    top = max(104, *(drawn.dataLim.y1 + 4 for drawn in axes.flat))  # a strategy may keep more than all
    panel.set_ylim(-4, top)
    panel.set_yticks(range(0, int(top), 25))
    for panel in axes.flat:
        panel.grid(axis="y")
    figure.supxlabel("skipped sublayers, per cent", fontsize=8)
    figure.supylabel(quantity, fontsize=8)


def _strategy_handles(board: Scoreboard) -> list[Line2D]:
    lines = [
        Line2D([], [], **LOOKS[strategy].line, label=labels.STRATEGIES[strategy])
        for strategy in reversed(board.skipping)
    ]
    return [Line2D([], [], **FULL_LINE, label=labels.STRATEGIES["full"]), *lines]


_UNFINISHED_HANDLE = Line2D([], [], **Look("#666666", "o", ()).hollow, label="unfinished run")
_PAPER_HANDLE = Line2D(
    [], [], color="#999999", marker="o", markerfacecolor="white", linewidth=0.7, label="the paper's (faint)"
)


def _metric(table: PhaseEntries, task: str) -> str:
    return labels.METRICS[table.paper.metrics[task]]


def _x(board: Scoreboard, row: Row) -> float:
    """Where a row's point stands: its budget, moved aside for its strategy."""
    return 100 * row.fraction + (board.skipping.index(row.strategy) - (len(board.skipping) - 1) / 2) * DODGE


def _reach(scores: Sequence[Estimate]) -> list[list[float]]:
    """The intervals as matplotlib wants them: distances below and above the value."""
    below = [0.0 if score.low is None else 100 * (score.value - score.low) for score in scores]
    above = [0.0 if score.high is None else 100 * (score.high - score.value) for score in scores]
    return [below, above]
