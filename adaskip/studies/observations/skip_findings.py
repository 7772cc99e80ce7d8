"""What the importance check found: a claim, a table and a figure of saved scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adaskip.common.configs import load_yaml
from adaskip.common.intervals import Estimate, mean_estimate
from adaskip.strategies import LeastSkip, MostSkip
from adaskip.studies.observations.findings import Claim, Findings, Table
from adaskip.studies.observations.labels import METRICS, task_label
from adaskip.studies.plots.style import FULL_LINE, save, styled
from adaskip.studies.tables import labels

STRATEGIES = {cls.name: cls.label for cls in (MostSkip, LeastSkip)}
LOOKS = {cls.name: cls.look for cls in (MostSkip, LeastSkip)}
NAME = "importance_check"
MIN_WIDTH = 4.2
"""Inches that the legend needs."""


@dataclass(frozen=True)
class Curve:
    """One model on one task: the full model's score, and each strategy's by whole layers skipped."""

    model: str
    task: str
    metric: str
    full: Estimate
    by_layers: dict[str, dict[int, Estimate]]

    @property
    def layers(self) -> list[int]:
        return sorted(self.by_layers["most_skip"])


def read_curves(check: dict[str, Any]) -> list[Curve]:
    """Mean scores with intervals of what `skip_check` saved; fractions of 1."""
    curves = []
    for model, entry in check.items():
        for task, full in entry["full"].items():
            by_layers = {
                name: {int(n): _estimate(scores[task]["scores"]) for n, scores in entry[name].items()}
                for name in STRATEGIES
            }
            curves.append(Curve(model, task, full["metric"], _estimate(full["scores"]), by_layers))
    return curves


def _estimate(scores: Sequence[float]) -> Estimate:
    estimate = mean_estimate(scores)
    assert estimate is not None, "a finished run has at least one sample"
    return estimate


def find(check: dict[str, Any]) -> Findings:
    """Test that whole-layer similarity says what can be spared."""
    curves = read_curves(check)
    paper = load_yaml("paper")["importance_check"]
    published = "; ".join(
        f"{STRATEGIES[name]} {', '.join(f'{score} at {n}' for n, score in paper[name].items())}" for name in STRATEGIES
    )
    phases = ", ".join(dict.fromkeys(labels.PHASES[entry["phase"]] for entry in check.values()))
    return Findings(
        name=NAME,
        title="Importance check: skipping the most and the least similar whole layers",
        notes=[
            f"Scored by each task's own metric, per cent with 95 % bootstrap intervals; skipped {phases}. The paper "
            f"had a GPT judge score the answers, by layers skipped: {published}."
        ],
        claims=[_most_is_better(curves), _most_is_gentle(curves), _least_is_ruin(curves)],
        table=_table(curves),
        numbers=[_as_dict(curve) for curve in curves],
        sources={model: entry["sources"] for model, entry in check.items()},
    )


def _most_is_better(curves: list[Curve]) -> Claim:
    gaps = [
        curve.by_layers["most_skip"][n].value - curve.by_layers["least_skip"][n].value
        for curve in curves
        for n in curve.layers
    ]
    mean = (
        f"On average MostSkip scores {100 * sum(gaps) / len(gaps):.1f} points more."
        if gaps
        else "No layer can be skipped."
    )
    return Claim(
        "Skipping the most similar layers scores at least what skipping the least similar ones does",
        *(sum(gap >= 0 for gap in gaps), len(gaps), mean),
    )


def _most_is_gentle(curves: list[Curve]) -> Claim:
    kept = _kept(curves, "most_skip")
    return Claim(
        "Skipping the one most similar layer keeps at least 80 % of the score",
        sum(k >= 0.8 for k in kept),
        len(kept),
        _shares(kept),
    )


def _least_is_ruin(curves: list[Curve]) -> Claim:
    kept = _kept(curves, "least_skip")
    return Claim(
        "Skipping the one least similar layer costs at least half of the score",
        sum(k <= 0.5 for k in kept),
        len(kept),
        _shares(kept),
    )


def _kept(curves: list[Curve], name: str) -> list[float]:
    """Share of the full model's score at the least budget; curves whose full model scores nothing say nothing."""
    scored = [curve for curve in curves if curve.full.value > 0 and curve.layers]
    return [curve.by_layers[name][curve.layers[0]].value / curve.full.value for curve in scored]


def _shares(kept: list[float]) -> str:
    if not kept:
        return "The full model scores nothing."
    return (
        f"Kept on average {100 * sum(kept) / len(kept):.0f} %, from {100 * min(kept):.0f} to {100 * max(kept):.0f} %."
    )


def _table(curves: list[Curve]) -> Table:
    rows = []
    for curve in curves:
        named = (curve.model, f"{task_label(curve.task)} ({METRICS.get(curve.metric, curve.metric)})")
        rows.append([*named, "0", labels.percent(curve.full), labels.percent(curve.full)])
        for n in curve.layers:
            rows.append([*named, str(n), *(labels.percent(curve.by_layers[name][n]) for name in STRATEGIES)])
    return Table(["Model", "Task", "Layers skipped", *STRATEGIES.values()], rows)


def _as_dict(curve: Curve) -> dict[str, Any]:
    return {
        **{"model": curve.model, "task": curve.task, "metric": curve.metric, "full": curve.full.as_dict()},
        **{name: {n: estimate.as_dict() for n, estimate in found.items()} for name, found in curve.by_layers.items()},
    }


def draw(check: dict[str, Any], out_dir: Path) -> list[Path]:
    """`importance_check`: a panel per model and task, score against layers skipped."""
    curves = {(curve.task, curve.model): curve for curve in read_curves(check)}
    tasks, models = (list(dict.fromkeys(key[i] for key in curves)) for i in (0, 1))
    with styled():
        figure = Figure(
            figsize=(max(MIN_WIDTH, 2.3 * len(models) + 0.6), 1.75 * len(tasks) + 0.8), layout="constrained"
        )
        axes = figure.subplots(len(tasks), len(models), sharex=True, sharey=True, squeeze=False)
        for (row, task), (column, model) in product(enumerate(tasks), enumerate(models)):
            if (task, model) in curves:
                _draw_curve(axes[row, column], curves[task, model])
        for model, panel in zip(models, axes[0], strict=True):
            panel.set_title(model)
        for task, panel in zip(tasks, axes[:, -1], strict=True):
            panel.annotate(
                task_label(task), (1.03, 0.5), xycoords="axes fraction", rotation=270, va="center", fontsize=9
            )
        figure.supxlabel("whole layers skipped", fontsize=8)
        figure.supylabel("score, per cent", fontsize=8)
        lines = [Line2D([], [], **LOOKS[name].line, label=label) for name, label in STRATEGIES.items()]
        handles = [Line2D([], [], **FULL_LINE, label=labels.STRATEGIES["full"]), *lines]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        return save(figure, out_dir / NAME)


def _draw_curve(panel: Axes, curve: Curve) -> None:
    panel.axhline(100 * curve.full.value, **FULL_LINE)
    for name, look in LOOKS.items():
        found = [curve.by_layers[name][n] for n in curve.layers]
        values = [100 * estimate.value for estimate in found]
        reach = [
            [100 * (e.value - (e.value if e.low is None else e.low)) for e in found],
            [100 * ((e.value if e.high is None else e.high) - e.value) for e in found],
        ]
        panel.errorbar(curve.layers, values, yerr=reach, **look.line, elinewidth=0.8, capsize=1.5)
    panel.set_xticks(curve.layers)
    panel.set_ylim(-4, 104)
    panel.grid(axis="y")
