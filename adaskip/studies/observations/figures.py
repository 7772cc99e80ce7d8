"""Similarity over layers: a panel per model, lines for the means and bands for the spread over samples.

Most layers are between 0.9 and 1, the first one far below, so the axis is logarithmic in the distance to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from adaskip.studies.observations.saved import Measured, Saved
from adaskip.studies.observations.settings import KINDS, Target
from adaskip.studies.plots.style import BLUE, GREEN, ORANGE, PURPLE, SKY, Look, save, styled

BAND = (10, 90)
"""Percentiles of the samples at the edges of the band."""
NEAREST = 1e-5
"""Distance to 1 at which the axis ends."""
MIN_WIDTH = 5.6
"""Width of the legend, in inches."""
TICKS = (-0.5, 0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)
TASK_LOOKS = (
    Look(BLUE, "o", ()),
    Look(ORANGE, "s", (4, 1.5)),
    Look(GREEN, "^", (1, 1)),
    Look(PURPLE, "D", (4, 1.5, 1, 1.5)),
    Look(SKY, "v", (6, 2)),
)
KIND_LOOKS = {
    ("attention", "prefill"): Look(BLUE, "o", ()),
    ("ffn", "prefill"): Look(ORANGE, "s", ()),
    ("attention", "decode"): Look(SKY, "^", (4, 1.5)),
    ("ffn", "decode"): Look(PURPLE, "D", (4, 1.5)),
}


@dataclass(frozen=True)
class Series:
    """A line and its band in the panel of each model."""

    label: str
    look: Look
    target: Target
    unit: str


def draw_layers(saved: Saved, targets: Sequence[Target], out_dir: Path) -> list[Path]:
    """`ob1`: whole layers, a line per dataset."""
    series = [Series(t.label, TASK_LOOKS[i % len(TASK_LOOKS)], t, "layer") for i, t in enumerate(targets)]
    return _draw(saved, {"": series}, "IO similarity of the layer", out_dir / "ob1")


def draw_kinds(saved: Saved, targets: Sequence[Target], out_dir: Path) -> list[Path]:
    """`ob2`: attention and FFN, a row per dataset."""
    rows = {
        t.label: [Series(label, KIND_LOOKS[kind, "prefill"], t, kind) for kind, label in KINDS.items()] for t in targets
    }
    return _draw(saved, rows, "IO similarity of the sublayer", out_dir / "ob2")


def draw_phases(saved: Saved, targets: Sequence[Target], out_dir: Path) -> list[Path]:
    """`ob3`: attention and FFN in prefill and in decode, a row per dataset."""
    rows: dict[str, list[Series]] = {}
    for t in targets:
        looks = {f"{label}, {t.phase}": (KIND_LOOKS[kind, t.phase], t, kind) for kind, label in KINDS.items()}
        rows.setdefault(t.label, []).extend(Series(label, *rest) for label, rest in looks.items())
    return _draw(saved, rows, "IO similarity of the sublayer", out_dir / "ob3")


def _draw(saved: Saved, rows: Mapping[str, Sequence[Series]], quantity: str, stem: Path) -> list[Path]:
    """A row of panels for each of `rows`, a column for each model."""
    with styled():
        size = max(MIN_WIDTH, 2.5 * len(saved) + 0.6), 1.9 * len(rows) + 0.7
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(rows), len(saved), sharey=True, squeeze=False)
        for (row, drawn), line in zip(rows.items(), axes, strict=True):
            for parts, panel in zip(saved.values(), line, strict=True):
                for series in drawn:
                    _draw_series(panel, series, parts[series.target])
                panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            line[-1].annotate(row, (1.03, 0.5), xycoords="axes fraction", rotation=270, va="center", fontsize=9)
        for model, panel in zip(saved, axes[0], strict=True):
            panel.set_title(model)
        _scale(axes)
        figure.supxlabel("decoder layer", fontsize=8)
        figure.supylabel(f"{quantity}\n(logarithmic distance to 1)", fontsize=8)
        first = next(iter(rows.values()))
        handles = [Line2D([], [], **_line(series.look), label=series.label) for series in first]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)))
        return save(figure, stem)


def _draw_series(panel: Axes, series: Series, measured: Measured) -> None:
    samples = measured.similarity(series.unit)
    layers = np.arange(samples.shape[1])
    low, high = np.percentile(samples, BAND, axis=0)
    panel.fill_between(layers, low, high, color=series.look.color, alpha=0.22, linewidth=0, zorder=1)
    panel.plot(layers, measured.profile(series.unit), **_line(series.look))


def _scale(axes: np.ndarray) -> None:
    """Set the shared axis from the lowest to the highest drawn value."""
    low = min(panel.dataLim.y0 for panel in axes.flat)
    high = min(max(panel.dataLim.y1 for panel in axes.flat), 1 - NEAREST)
    margin = 0.03 * (_forward(high) - _forward(low))
    panel = axes.flat[0]
    panel.set_yscale("function", functions=(_forward, _backward))
    panel.set_ylim(_backward(_forward(low) - margin), _backward(_forward(high) + margin))
    wanted = [TICKS, MaxNLocator(5).tick_values(low, high)]  # the latter for a range that the former hardly divides
    ticks = max(([tick for tick in ticks if low <= tick <= high] for ticks in wanted), key=len)
    panel.set_yticks(ticks, [f"{tick:.12g}" for tick in ticks])
    for panel in axes.flat:
        panel.grid(axis="y")


def _forward(similarity: Any) -> Any:
    return -np.log10(np.maximum(1 - np.asarray(similarity), NEAREST / 10))


def _backward(position: Any) -> Any:
    return 1 - 10.0 ** -np.asarray(position)


def _line(look: Look) -> dict[str, Any]:
    return {**look.line, "markersize": 2.8, "linewidth": 1.0}
