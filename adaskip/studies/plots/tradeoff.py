"""Score kept against measured speedup, with the Pareto front: one panel per phase, and one per phase and model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adaskip.studies.plots.style import LOOKS, save, styled
from adaskip.studies.tables import labels
from adaskip.studies.tables.tradeoff import FULL, Point, Tradeoff

FRONT: dict[str, Any] = {"color": "#bdbdbd", "linewidth": 3, "solid_capstyle": "round", "zorder": 0.9}
FULL_MARK: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 8, "linestyle": "none", "zorder": 4}
SMALLEST, STEP = 3.5, 1.5
"""Size of the least budget's marker in points, and how much each further budget adds."""


def plot_tradeoff(tradeoff: Tradeoff, out_dir: Path) -> list[Path]:
    """Write `tradeoff` (means over the models) and `tradeoff_models`, each as .png and .svg."""
    return [
        *_plot(tradeoff, [None], out_dir / "tradeoff"),
        *_plot(tradeoff, tradeoff.models, out_dir / "tradeoff_models"),
    ]


def _plot(tradeoff: Tradeoff, models: Sequence[str | None], stem: Path) -> list[Path]:
    phases = tradeoff.phases
    height = 2.6 if len(models) == 1 else 1.9 * len(models)
    with styled():
        figure = Figure(figsize=(2.5 * len(phases) + 0.5, height + 0.7), layout="constrained")
        axes = figure.subplots(len(models), len(phases), sharex="col", sharey=True, squeeze=False)
        fractions = sorted({point.fraction for point in tradeoff.points if point.strategy != FULL})
        for model, line in zip(models, axes, strict=True):
            for phase, panel in zip(phases, line, strict=True):
                _draw(panel, tradeoff.panel(phase, model), tradeoff.strategies, fractions)
            if model is not None:
                line[-1].annotate(model, (1.03, 0.5), xycoords="axes fraction", rotation=270, va="center", fontsize=9)
        for phase, panel in zip(phases, axes[0], strict=True):
            panel.set_title(labels.PHASES[phase])
        axes[0, 0].set_ylim(-4, max(104, *(panel.dataLim.y1 + 3 for panel in axes.flat)))
        figure.supxlabel("measured speedup over the full model", fontsize=8)
        figure.supylabel("score kept, per cent", fontsize=8)
        handles = _handles(tradeoff.strategies, fractions)
        figure.legend(handles=handles, loc="outside upper center", ncols=(len(handles) + 1) // 2)
        return save(figure, stem)


def _draw(panel: Axes, points: Sequence[Point], strategies: Sequence[str], fractions: Sequence[float]) -> None:
    panel.axvline(1, color="#e5e5e5", linewidth=0.6, zorder=-1)
    panel.grid()
    front = sorted((point for point in points if point.on_front), key=lambda point: point.speedup)
    x, y = _at(front)
    if front:  # what the front dominates reaches down to the axes
        x, y = [min(point.speedup for point in points), *x, x[-1]], [y[0], *y, 0.0]
    panel.step(x, y, where="pre", **FRONT)
    panel.plot(*_at([point for point in points if point.strategy == FULL]), **FULL_MARK)
    for strategy in strategies:
        look = LOOKS[strategy]
        own = sorted((point for point in points if point.strategy == strategy), key=lambda point: point.fraction)
        panel.plot(*_at(own), **{**look.line, "marker": "none", "linewidth": 0.8})
        for point in own:
            low, high = (point.kept.value if end is None else end for end in (point.kept.low, point.kept.high))
            panel.vlines(point.speedup, 100 * low, 100 * high, color=look.color, linewidth=0.6, alpha=0.7, zorder=1)
            size = SMALLEST + STEP * fractions.index(point.fraction)
            edge = "black" if point.on_front else look.color
            mark = {**look.line, "linestyle": "none", "markersize": size, "markeredgecolor": edge}
            panel.plot(*_at([point]), **mark)


def _at(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.speedup for point in points], [100 * point.kept.value for point in points]


def _handles(strategies: Sequence[str], fractions: Sequence[float]) -> list[Line2D]:
    lines = [Line2D([], [], **LOOKS[name].line, label=labels.STRATEGIES[name]) for name in reversed(strategies)]
    sizes = [
        Line2D([], [], color="#999999", marker="o", linestyle="none", markersize=SMALLEST + STEP * i, label=label)
        for i, label in enumerate(f"{labels.budget(fraction)} skipped" for fraction in fractions)
    ]
    full = Line2D([], [], **FULL_MARK, label=labels.STRATEGIES[FULL])
    return [full, *lines, Line2D([], [], **FRONT, label="Pareto front"), *sizes]
