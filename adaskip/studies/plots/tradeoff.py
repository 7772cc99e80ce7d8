"""Quality against measured speedup with the Pareto front, a panel per phase: score kept, or fidelity and loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adaskip.strategies.registry import FULL
from adaskip.studies.plots.style import LOOKS, Look, save, styled
from adaskip.studies.tables import labels
from adaskip.studies.tables.tradeoff import Tradeoff

FRONT: dict[str, Any] = {"color": "#bdbdbd", "linewidth": 3, "solid_capstyle": "round", "zorder": 0.9}
FULL_MARK: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 8, "linestyle": "none", "zorder": 4}
SMALLEST, STEP = 3.5, 1.5
"""Marker size of the smallest budget in points, and the increase per further budget."""


def plot_kept(tradeoff: Tradeoff, out_dir: Path) -> list[Path]:
    """Write `tradeoff` (means over the models) and `tradeoff_models`, each as .png and .svg."""
    of_models = [(tradeoff, model) for model in tradeoff.models]
    return [*_plot([(tradeoff, None)], out_dir / "tradeoff"), *_plot(of_models, out_dir / "tradeoff_models")]


def plot_measures(tradeoffs: Sequence[Tradeoff], out_dir: Path) -> list[Path]:
    """Write `tradeoff_measures`, a row of panels per quality, means over the models, as .png and .svg."""
    return _plot([(tradeoff, None) for tradeoff in tradeoffs], out_dir / "tradeoff_measures")


def _plot(lines: Sequence[tuple[Tradeoff, str | None]], stem: Path) -> list[Path]:
    """lines: what each row of panels shows, and of which model; None for the mean over all models."""
    first, qualities = lines[0][0], {tradeoff.quality.name: tradeoff.quality for tradeoff, _ in lines}
    phases = [name for name in labels.PHASES if any(name in tradeoff.phases for tradeoff, _ in lines)]
    fractions = sorted({fraction for tradeoff, _ in lines for fraction in tradeoff.fractions})
    height = 2.6 if len(lines) == 1 else 1.9 * len(lines)
    with styled():
        figure = Figure(figsize=(max(2.5 * len(phases), 3.2) + 0.5, height + 0.7), layout="constrained")
        share_y = "row" if len(qualities) > 1 else "all"
        axes = figure.subplots(len(lines), len(phases), sharex="col", sharey=share_y, squeeze=False)
        for (tradeoff, model), panels in zip(lines, axes, strict=True):
            for phase, panel in zip(phases, panels, strict=True):
                _draw(panel, tradeoff, tradeoff.panel(phase, model), fractions)
            if model is not None:
                panels[-1].annotate(model, (1.03, 0.5), xycoords="axes fraction", rotation=270, va="center", fontsize=9)
            if len(qualities) > 1:
                panels[0].set_ylabel(tradeoff.quality.title.replace(", ", "\n"), fontsize=8)
        for phase, panel in zip(phases, axes[0], strict=True):
            panel.set_title(labels.PHASES[phase])
        for quality in qualities.values():
            rows = [panels for (tradeoff, _), panels in zip(lines, axes, strict=True) if tradeoff.quality is quality]
            _set_limits([*np.concatenate(rows)], less_is_better=quality.sign < 0)
        figure.supxlabel("measured speedup over the full model", fontsize=8)
        if len(qualities) == 1:
            figure.supylabel(first.quality.title, fontsize=8)
        partial = any(tradeoff.points["partial"].any() for tradeoff, _ in lines)
        handles = _handles(first.strategies, fractions, partial=partial)
        columns = (len(handles) + 1) // 2 if len(phases) > 1 else 2
        figure.legend(handles=handles, loc="outside upper center", ncols=columns)
        return save(figure, stem)


def _draw(panel: Axes, tradeoff: Tradeoff, points: pd.DataFrame, fractions: Sequence[float]) -> None:
    scale, sign = tradeoff.quality.scale, tradeoff.quality.sign
    panel.axvline(1, color="#e5e5e5", linewidth=0.6, zorder=-1)
    panel.grid()
    front = points[points["on_front"]].sort_values("speedup")
    x, y = [*front["speedup"]], [*(scale * front["value"])]
    if x:  # the dominated area extends to the axes
        worst = 0.0 if sign > 0 else scale * points["value"].max()
        x, y = [points["speedup"].min(), *x, x[-1]], [y[0], *y, worst]
    panel.step(x, y, where="pre", **FRONT)
    full = points[points["strategy"] == FULL]
    panel.plot(full["speedup"], scale * full["value"], **FULL_MARK)
    for strategy in tradeoff.strategies:
        look, own = LOOKS[strategy], points[points["strategy"] == strategy].sort_values("fraction")
        panel.plot(own["speedup"], scale * own["value"], **{**look.line, "marker": "none", "linewidth": 0.8})
        for point in own.fillna({"value_low": own["value"], "value_high": own["value"]}).itertuples():
            ends = (scale * point.value_low, scale * point.value_high)
            panel.vlines(point.speedup, *ends, color=look.color, linewidth=0.6, alpha=0.7, zorder=1)
            size = SMALLEST + STEP * fractions.index(point.fraction)
            edge = "black" if point.on_front else look.color
            mark: dict[str, Any] = {**look.line, "linestyle": "none", "markersize": size, "markeredgecolor": edge}
            hollow: dict[str, Any] = {"markerfacecolor": "white"} if point.partial else {}
            panel.plot([point.speedup], [scale * point.value], **mark, **hollow)


def _set_limits(panels: Sequence[Axes], less_is_better: bool) -> None:
    """Set the limits of the y axis; better is up, also for losses."""
    reach = [panel.dataLim.y1 for panel in panels]
    limits = (1.05 * max(reach), -0.05 * max(reach)) if less_is_better else (-4, max(104, *(y + 3 for y in reach)))
    next(iter(panels)).set_ylim(*limits)


def _handles(strategies: Sequence[str], fractions: Sequence[float], *, partial: bool) -> list[Line2D]:
    lines = [Line2D([], [], **LOOKS[name].line, label=labels.STRATEGIES[name]) for name in reversed(strategies)]
    sizes = [
        Line2D([], [], color="#999999", marker="o", linestyle="none", markersize=SMALLEST + STEP * i, label=label)
        for i, label in enumerate(f"{labels.budget(fraction)} skipped" for fraction in fractions)
    ]
    full = Line2D([], [], **FULL_MARK, label=labels.STRATEGIES[FULL])
    hollow = [Line2D([], [], **Look("#666666", "o", ()).hollow, label="unfinished run")] * partial
    return [full, *lines, Line2D([], [], **FRONT, label="Pareto front"), *sizes, *hollow]
