"""A saved plan as a picture: a row of attentions above a row of FFNs, the skipped ones filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from adaskip.core.plan import KINDS, SkipPlan
from adaskip.studies.plots.style import BLUE, save_as, styled

RUNS = "#ededed"


def plot_plan(name: str | None, path: Path) -> Path:
    """Draw a saved plan into a .png, .svg or .pdf file; returns its path.

    Raises ValueError for another file type, and for a plan that names no model.
    """
    if name is None or (plan := SkipPlan.from_pretrained(name)).origin is None:
        raise ValueError("--plot needs a saved plan that names its model")
    origin = plan.origin
    num_layers, title = origin.num_layers, f"{Path(origin.model).name}, phase {origin.phase}, {len(plan)} skipped"
    with styled():
        figure = Figure(figsize=(1.6 + 0.16 * num_layers, 1.3), layout="constrained")
        panel = figure.subplots()
        skipped = np.array([[layer in getattr(plan, kind) for layer in range(num_layers)] for kind in KINDS])
        colours: Any = np.where(skipped[..., None], np.array(_rgb(BLUE)), np.array(_rgb(RUNS)))
        panel.pcolormesh(np.arange(num_layers + 1), np.arange(3), colours, edgecolors="white", linewidth=0.8)
        panel.set_ylim(2, 0)
        panel.set_yticks([0.5, 1.5], ["attention", "FFN"])
        panel.set_xticks(np.arange(0, num_layers, 4) + 0.5, [str(layer) for layer in range(0, num_layers, 4)])
        panel.set_xlabel("layer")
        panel.set_title(title, loc="left")
        panel.tick_params(length=0)
        for spine in panel.spines.values():
            spine.set_visible(False)
        handles = [Patch(color=RUNS, label="runs"), Patch(color=BLUE, label="skipped")]
        figure.legend(handles=handles, loc="outside right center")
        return save_as(figure, path)


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
