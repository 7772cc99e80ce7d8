"""Quality against sublayers skipped per decode step: the line of offline budgets, and every P and beta beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adaskip.studies.ablation.comparing import Comparison, comparisons
from adaskip.studies.ablation.findings import NAME, Group
from adaskip.studies.plots.style import BLUE, GREEN, ORANGE, PURPLE, SKY, save, styled

COLORS = (SKY, BLUE, GREEN, ORANGE, PURPLE)
"""By P, in order; more than so many begin again."""
MARKERS = ("v", "s", "D", "^", "o")
"""By beta: quantiles rising, the paper's last."""
OFFLINE = {"color": "black", "marker": ".", "linewidth": 0.9, "markersize": 5, "zorder": 1}


def draw(groups: Sequence[Group], out_dir: Path) -> list[Path]:
    """Write `online_ablation.png` and `.svg`, a panel per group of models."""
    with styled():
        figure = Figure(figsize=(3.4 * len(groups) + 1.5, 3.2), layout="constrained")
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        handles: dict[str, Line2D] = {"off": Line2D([], [], **OFFLINE, label="no online learning")}
        for (name, subjects), panel in zip(groups, panels, strict=True):
            percent = subjects[0].measure == "score"
            off, online = comparisons(subjects)
            _draw(panel, off, online, 100 if percent else 1, handles)
            panel.set_title(name)
            panel.set_ylabel("mean score, per cent" if percent else "negative loss, nats")
            panel.grid()
        figure.supxlabel("sublayers skipped per decode step", fontsize=8)
        figure.legend(handles=list(handles.values()), loc="outside right upper")
        return save(figure, out_dir / NAME)


def _draw(panel: Axes, off: list[Comparison], online: list[Comparison], scale: int, handles: dict[str, Line2D]) -> None:
    panel.plot([c.skipped for c in off], [scale * c.quality.value for c in off], **OFFLINE)
    windows = list(dict.fromkeys(c.variant.window for c in online))
    betas = list(dict.fromkeys(c.variant.beta for c in online))
    for c in online:
        color = COLORS[windows.index(c.variant.window) % len(COLORS)]
        marker = MARKERS[betas.index(c.variant.beta) % len(MARKERS)]
        y = scale * c.quality.value
        low, high = (y if end is None else scale * end for end in (c.quality.low, c.quality.high))
        panel.vlines(c.skipped, low, high, color=color, linewidth=0.6, zorder=2)
        panel.plot([c.skipped], [y], color=color, marker=marker, markersize=4.5, linestyle="none", zorder=3)
    for window in windows:
        color = COLORS[windows.index(window) % len(COLORS)]
        handles.setdefault(f"P{window}", Line2D([], [], color=color, linewidth=3, label=f"P = {window}"))
    for beta in betas:
        marker, name = MARKERS[betas.index(beta) % len(MARKERS)], "the paper's" if beta == "paper" else beta[1:]
        label = f"beta: {name}" if beta == "paper" else f"beta: quantile {name}"
        handles.setdefault(beta, Line2D([], [], color="#666666", marker=marker, linestyle="none", label=label))
