"""Which sublayers were skipped, as a map of the layers: one figure per model, a column per phase, a strip per budget.

Drawn from the plans in the records, so it shows what was skipped, not what was configured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from adaskip.studies.plots.style import BLUE, GREEN, ORANGE, SKY, save, styled
from adaskip.studies.tables import labels
from adaskip.studies.tables.results import Results
from adaskip.studies.tables.runs import Run

RUNS_COLOR = "#ededed"
FAINTEST = 0.25
"""Strength of the colour of a sublayer that few requests skipped."""
GAP = 0.6
"""Space between strips in heights of a cell; twice that between strategies."""
KINDS = ("attention", "ffn")
CATEGORIES = {
    "prefill and decode": BLUE,
    "prefill only": SKY,
    "decode only": ORANGE,
    "decode, added online": GREEN,
}
ONLINE = "decode, added online"
Strip = tuple[float, str, float]
"""Upper edge, strategy, fraction."""
PLUS: dict[str, Any] = {"color": "black", "marker": "+", "markersize": 3, "markeredgewidth": 0.7, "linestyle": "none"}
"""Marks sublayers added online, so that they are visible without colour."""


@dataclass(frozen=True)
class SkipShares:
    """For each sublayer, the share of requests that skipped it: arrays [2, L], attention above FFN."""

    prefill: np.ndarray
    decode: np.ndarray
    """In the last decode step, without sublayers added online."""
    online: np.ndarray

    def category(self, kind: int, layer: int) -> tuple[str, float] | None:
        """Category of a sublayer and its share; None if it always ran."""
        prefill, decode, online = (float(part[kind, layer]) for part in (self.prefill, self.decode, self.online))
        if prefill and decode:
            return "prefill and decode", max(prefill, decode)
        if prefill or decode:
            return ("prefill only", prefill) if prefill else ("decode only", decode)
        return (ONLINE, online) if online else None


def skip_shares(run: Run) -> SkipShares | None:
    """The shares over all records of a run; None if it has none."""
    records = [record for task in run.tasks.values() for record in task.records]
    if not records:
        return None
    prefill, decode, online = (np.zeros((len(KINDS), run.num_layers)) for _ in range(3))
    for record in records:
        for kind, name in enumerate(KINDS):
            added = record["online_ffns"] if name == "ffn" else []
            prefill[kind, record["plan"]["prefill"][name]] += 1
            decode[kind, [layer for layer in record["plan"]["decode"][name] if layer not in added]] += 1
            online[kind, added] += 1
    return SkipShares(prefill / len(records), decode / len(records), online / len(records))


def plot_skip_map(results: Results, model: str, out_dir: Path) -> list[Path]:
    """Write `skip_map_<model>.png` and `.svg`."""
    depth = max((scored.run.num_layers for (_, name, *_), scored in results.runs.items() if name == model), default=0)
    strips = list(_strips(results, model))
    if depth == 0 or not strips:
        return []
    phases = list(results.paper.tables)
    with styled():
        figure = Figure(
            figsize=(1.4 + len(phases) * (1.3 + 0.05 * depth), 0.8 + 0.33 * len(strips)), layout="constrained"
        )
        panels = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
        for phase, panel in zip(phases, panels, strict=True):
            for top, strategy, fraction in strips:
                scored = results.runs.get((phase, model, strategy, fraction))
                _draw(panel, top, skip_shares(scored.run) if scored else None, depth)
            _share_axis(panel, depth)
            panel.set_title(labels.PHASES[phase])
        _name_strips(panels[0], strips)
        figure.supxlabel(
            "layer (in each strip: attention above, FFN below; decode as of a request's last token)", fontsize=8
        )
        handles: list[Any] = [_handle(name) for name in ("runs", *CATEGORIES)]
        title = f"{model}: skipped in (paler: by fewer requests)"
        figure.legend(handles, ["runs", *CATEGORIES], title=title, loc="outside upper center", ncols=len(handles))
        return save(figure, out_dir / f"skip_map_{model}")


def _draw(panel: Axes, top: float, shares: SkipShares | None, depth: int) -> None:
    """One strip, its upper edge at `top`."""
    if shares is None:
        panel.text(depth / 2, top + 1, "not run", ha="center", va="center", color="#777777", fontsize=7)
        return
    layers = range(shares.prefill.shape[1])
    found = [[shares.category(kind, layer) for layer in layers] for kind in range(len(KINDS))]
    colors = np.array([[_color(category) for category in line] for line in found])
    panel.pcolormesh(np.arange(len(layers) + 1), top + np.arange(3), colors, edgecolors="white", linewidth=0.6)
    added = [layer + 0.5 for layer, what in zip(layers, found[1], strict=True) if what and what[0] == ONLINE]
    panel.plot(added, [top + 1.5] * len(added), **PLUS)


def _share_axis(panel: Axes, depth: int) -> None:
    panel.set_xlim(0, depth)
    panel.set_xticks(np.arange(0, depth, 4) + 0.5, [str(layer) for layer in range(0, depth, 4)])
    panel.tick_params(length=0)
    for side in ("left", "bottom"):
        panel.spines[side].set_visible(False)


def _handle(name: str) -> Patch | tuple[Patch, Line2D]:
    patch = Patch(color=CATEGORIES.get(name, RUNS_COLOR))
    return (patch, Line2D([], [], **PLUS)) if name == ONLINE else patch


def _color(category: tuple[str, float] | None) -> tuple[float, ...]:
    if category is None:
        return to_rgb(RUNS_COLOR)
    name, share = category
    strength = FAINTEST + (1 - FAINTEST) * share
    return tuple(strength * full + (1 - strength) for full in to_rgb(CATEGORIES[name]))


def _strips(results: Results, model: str) -> Iterator[Strip]:
    """The strips, those of the last strategy first."""
    top = 0.0
    for strategy in reversed(results.skipping):
        for fraction in results.fractions(model):
            yield top, strategy, fraction
            top += len(KINDS) + GAP
        top += GAP


def _name_strips(panel: Axes, strips: Sequence[Strip]) -> None:
    panel.set_ylim(strips[-1][0] + len(KINDS), 0)
    panel.set_yticks([top + 1 for top, _, _ in strips], [labels.budget(fraction) for _, _, fraction in strips])
    for strategy in dict.fromkeys(strategy for _, strategy, _ in reversed(strips)):
        middles = [top + 1 for top, name, _ in strips if name == strategy]
        panel.annotate(
            labels.STRATEGIES[strategy].replace(" ", "\n"),
            (0, sum(middles) / len(middles)),
            xycoords=("axes fraction", "data"),
            xytext=(-50, 0),
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="center",
            fontsize=9,
        )
