"""Score against the share of sublayers skipped: one figure per phase, a row per model, a column per task.

Also retention over all phases: the share of the full model's score that is kept, beside the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adaskip.common.intervals import mean_if_whole
from adaskip.strategies.registry import FULL
from adaskip.studies.plots.style import FULL_LINE, LOOKS, Look, save, styled
from adaskip.studies.tables import labels
from adaskip.studies.tables.results import PLACE, Results

LEGEND_COLUMNS = 3
DODGE = 0.35
"""Offset between neighbouring strategies in percentage points, so that their error bars do not overlap."""


def plot_scores(results: Results, phase: str, out_dir: Path) -> list[Path]:
    """Write `scores_<phase>.png` and `.svg`: a line per strategy with 95 % intervals, and one for the full model.

    A phase without any run has no figure.
    """
    cells = results.cells[results.cells["phase"] == phase]
    models, tasks = _models_run(cells), results.tasks(phase)
    if not models:
        return []
    with styled():
        figure, axes = _panels(len(models), len(tasks))
        for model, line in zip(models, axes, strict=True):
            for task, panel in zip(tasks, line, strict=True):
                _draw_scores(panel, results, cells[(cells["model"] == model) & (cells["task"] == task)])
        metrics = dict(zip(cells["task"], cells["metric"], strict=True))
        named = {task: labels.METRICS[metrics[task]] for task in tasks}
        _name(axes, models, [f"{labels.TASKS[task]} ({named[task]})" for task in tasks])
        _share_axes(figure, axes, results.fractions(), "score, per cent")
        unfinished = [_UNFINISHED_HANDLE] * bool((cells["score"].notna() & ~cells["final"]).any())
        handles = [*_strategy_handles(results), *unfinished]
        figure.legend(handles=handles, loc="outside upper center", ncols=LEGEND_COLUMNS)
        return save(figure, out_dir / f"scores_{phase}")


def plot_retention(results: Results, out_dir: Path) -> list[Path]:
    """Write `retention.png` and `.svg`: retention averaged over a phase's tasks, ours solid and the paper's faint."""
    cells, phases = results.cells, results.phases
    models = _models_run(cells)
    if not models:
        return []
    kept = cells[PLACE].assign(
        strategy=cells["strategy"], ours=cells["retention"].where(cells["final"]), paper=cells["paper_retention"]
    )
    means = kept.groupby(["phase", "model", "strategy", "fraction"], sort=False)[["ours", "paper"]].agg(_mean_if_whole)
    with styled():
        figure, axes = _panels(len(models), len(phases))
        for model, line in zip(models, axes, strict=True):
            for phase, panel in zip(phases, line, strict=True):
                _draw_retention(panel, results, means.loc[phase, model])
        _name(axes, models, [labels.PHASES[phase] for phase in phases])
        _share_axes(figure, axes, results.fractions(), "score kept, per cent")
        handles = [*_strategy_handles(results), *([_PAPER_HANDLE] if results.paper_models else [])]
        figure.legend(handles=handles, loc="outside upper center", ncols=LEGEND_COLUMNS)
        return save(figure, out_dir / "retention")


def _models_run(cells: pd.DataFrame) -> list[str]:
    """The models that have a score."""
    return [*cells.loc[cells["score"].notna(), "model"].unique()]


def _mean_if_whole(values: pd.Series) -> float:
    """The mean; NaN if any value is missing."""
    return math.nan if values.isna().any() else mean_if_whole([*values]) or 0.0


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(2.3 * columns + 0.5, 1.75 * rows + 1.0), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)


def _draw_scores(panel: Axes, results: Results, cells: pd.DataFrame) -> None:
    run = cells[cells["score"].notna()]
    for score in run.loc[run["strategy"] == FULL, "score"]:
        panel.axhline(100 * score, **FULL_LINE)
    for strategy in results.skipping:
        look, own = LOOKS[strategy], run[run["strategy"] == strategy]
        x, y = _x(results, strategy, own["fraction"]), 100 * own["score"]
        reach = [100 * (own["score"] - own["score_low"]).fillna(0), 100 * (own["score_high"] - own["score"]).fillna(0)]
        panel.errorbar(x, y, yerr=reach, **look.line, elinewidth=0.8, capsize=1.5)
        panel.plot(x[~own["final"]], y[~own["final"]], **look.hollow)


def _draw_retention(panel: Axes, results: Results, means: pd.DataFrame) -> None:
    """means: of one phase and model, by strategy and fraction."""
    panel.axhline(100, **FULL_LINE)
    for strategy in results.skipping:
        for name, style in (("paper", LOOKS[strategy].faint), ("ours", LOOKS[strategy].line)):
            kept = means.loc[strategy, name].dropna()
            panel.plot(_x(results, strategy, kept.index.to_series()), 100 * kept, **style)


def _name(axes: np.ndarray, models: Sequence[str], columns: Sequence[str]) -> None:
    """Write the names of columns above, of models at the right."""
    for panel, column in zip(axes[0], columns, strict=True):
        panel.set_title(column)
    for panel, model in zip(axes[:, -1], models, strict=True):
        panel.annotate(model, (1.03, 0.5), xycoords="axes fraction", rotation=270, va="center", fontsize=9)


def _share_axes(figure: Figure, axes: np.ndarray, fractions: Sequence[float], quantity: str) -> None:
    low, high = 100 * fractions[0], 100 * fractions[-1]
    panel = axes[0, 0]
    panel.set_xticks([100 * fraction for fraction in fractions], [f"{100 * fraction:.4g}" for fraction in fractions])
    panel.set_xlim(low - 4 * DODGE, high + 4 * DODGE)
    top = max(104, *(drawn.dataLim.y1 + 4 for drawn in axes.flat))  # a strategy may score more than the full model
    panel.set_ylim(-4, top)
    panel.set_yticks(range(0, int(top), 25))
    for panel in axes.flat:
        panel.grid(axis="y")
    figure.supxlabel("skipped sublayers, per cent", fontsize=8)
    figure.supylabel(quantity, fontsize=8)


def _strategy_handles(results: Results) -> list[Line2D]:
    lines = [
        Line2D([], [], **LOOKS[strategy].line, label=labels.STRATEGIES[strategy])
        for strategy in reversed(results.skipping)
    ]
    return [Line2D([], [], **FULL_LINE, label=labels.STRATEGIES[FULL]), *lines]


_UNFINISHED_HANDLE = Line2D([], [], **Look("#666666", "o", ()).hollow, label="unfinished run")
_PAPER_HANDLE = Line2D(
    [], [], color="#999999", marker="o", markerfacecolor="white", linewidth=0.7, label="the paper's (faint)"
)


def _x(results: Results, strategy: str, fractions: pd.Series) -> pd.Series:
    """Positions of points: at their budget, with an offset for their strategy."""
    return 100 * fractions + (results.skipping.index(strategy) - (len(results.skipping) - 1) / 2) * DODGE
