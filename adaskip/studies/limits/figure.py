"""Figure: what one attention and one FFN sublayer take at least, by context length, and where the lines cross."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from adaskip.core.plan import SublayerKind
from adaskip.roofline import Ceilings, ModelShape
from adaskip.roofline.work import AttentionImplementation
from adaskip.studies.limits.predictions import STEPS, Step, find_crossover, seconds
from adaskip.studies.plots.style import BLUE, ORANGE, SKY, Look, save, styled

CONTEXTS = tuple(500 * 2**power for power in range(9))
"""500 to 128k positions."""
LINES: dict[tuple[SublayerKind, AttentionImplementation], tuple[str, Look]] = {
    ("ffn", "fused"): ("FFN", Look(ORANGE, "s", ())),
    ("attention", "fused"): ("attention (scores stay on the chip)", Look(BLUE, "o", ())),
    ("attention", "eager"): ("attention (scores through memory)", Look(SKY, "^", (4, 1.5))),
}


def plot_sublayers(shapes: Mapping[str, ModelShape], ceilings: Ceilings, stem: Path) -> list[Path]:
    """Write `stem`.png and `.svg`: a row per phase, a column per model, milliseconds against context on one device."""
    with styled():
        figure = Figure(figsize=(2.4 * len(shapes) + 0.7, 4.9), layout="constrained")
        axes = figure.subplots(len(STEPS), len(shapes), sharex=True, sharey="row", squeeze=False)
        for step, row in zip(STEPS, axes, strict=True):
            for shape, panel in zip(shapes.values(), row, strict=True):
                _draw(panel, shape, step, ceilings)
            label = "prefill: whole prompt" if step == "prefill" else "decode: one token"
            row[-1].annotate(label, (1.03, 0.5), xycoords="axes fraction", rotation=270, va="center", fontsize=9)
        for model, panel in zip(shapes, axes[0], strict=True):
            panel.set_title(model)
        figure.supxlabel("context, tokens", fontsize=8)
        figure.supylabel(f"least time of one sublayer on {ceilings.name}, ms", fontsize=8)
        handles = [Line2D([], [], **look.line, label=label) for label, look in LINES.values()]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        return save(figure, stem)


def _draw(panel: Axes, shape: ModelShape, step: Step, ceilings: Ceilings) -> None:
    """The lines, and a ring where attention overtakes the FFN, with the context beside it."""
    for (kind, attention), (_, look) in LINES.items():
        times = [1000 * seconds(shape, kind, step, context, ceilings, attention) for context in CONTEXTS]
        panel.plot(CONTEXTS, times, **{**look.line, "markersize": 3})
        context = find_crossover(shape, step, ceilings, attention) if kind == "attention" else None
        if context is not None and CONTEXTS[0] <= context <= CONTEXTS[-1]:
            at, fused = (context, 1000 * seconds(shape, "ffn", step, context, ceilings)), attention == "fused"
            panel.plot(*at, marker="o", markersize=8, markerfacecolor="none", markeredgecolor="black", linestyle="none")
            place = {"xytext": (4, -11), "ha": "left"} if fused else {"xytext": (-4, 7), "ha": "right"}
            panel.annotate(f"{context / 1000:.1f}k", at, textcoords="offset points", fontsize=7, **place)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    ticks = CONTEXTS[1::2]
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticklabels([f"{tick // 1000}k" for tick in ticks])
    panel.grid(axis="both")
