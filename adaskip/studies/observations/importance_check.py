"""The importance check: skip the most and the least similar whole layers, and compare scores and reference losses.

Its runs are cells like any other and continue when stopped. Their scores and losses are saved in one JSON file, from
which table and figures are made. In the paper a GPT judge scored the answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame

from adaskip.common.configs import load_yaml
from adaskip.common.files import write_text_atomic
from adaskip.common.intervals import Estimate, mean_estimate
from adaskip.common.locks import exclusive
from adaskip.runs.job import resolve
from adaskip.runs.manifest import is_done
from adaskip.runs.runner import run
from adaskip.strategies import FULL, LeastSkip, MostSkip
from adaskip.studies.observations.saved import drawing_order
from adaskip.studies.observations.settings import ObserveConfig, Target
from adaskip.studies.plots.style import FULL_LINE, save, styled
from adaskip.studies.study import Claim, Findings, read_json, read_saved
from adaskip.studies.tables import labels
from adaskip.studies.tables.runs import load_run
from adaskip.studies.tables.scores import score_run

SCORES_FILE = "importance_scores.json"
STRATEGIES = {cls.name: cls for cls in (MostSkip, LeastSkip)}
METRICS = {"qa_f1": "F1", "classification": "accuracy", "rouge": "Rouge-L"}
PROVENANCE = (
    *("checkpoint", "weights_fingerprint", "dtype", "device", "batch_size", "data_fingerprint", "profile_fingerprint"),
    *("max_new_tokens", "versions"),
)
NAME = "importance_check"
FLOOR_LINE = {"color": "#888888", "linewidth": 0.8, "linestyle": ":", "zorder": 1}
MIN_WIDTH = 4.2
"""Width of the legend, in inches."""

Check = dict[str, Any]
"""For each model `num_layers`, `phase`, `sources`, and by task the scores and losses of `full`, and of each strategy by
skipped layers."""


def measure_check(config: ObserveConfig) -> None:
    """Run the check on every model, score it and save the scores.

    Raises:
        ValueError: a run is impossible, or its folder contains another run or is in use.
        RunError: a run failed half-way.
    """
    for model in config.models:
        full = _ensure(config, model, FULL, 0)
        depth = load_run(full).num_layers
        phase, scored = (
            config.defaults["importance_check"]["phase"],
            score_run(load_run(full), data_dir=config.data_dir),
        )
        entry: dict[str, Any] = {"num_layers": depth, "phase": phase, "full": _scores(full)}
        entry["floors"] = {task: each.floors for task, each in scored.tasks.items()}
        for strategy in STRATEGIES:
            layers = [n for n in config.defaults["importance_check"]["layers"] if n < depth]
            folders = {n: _ensure(config, model, strategy, n) for n in layers}
            entry[strategy] = {str(n): _scores(folder) for n, folder in folders.items()}
            manifest = load_run(next(iter(folders.values()), full)).manifest
            entry["sources"] = {name: manifest[name] for name in PROVENANCE if name in manifest}
        path = config.out_dir / SCORES_FILE
        with exclusive(path.with_suffix(".lock"), wait=True):  # another process may save another model
            saved = {**read_json(path), config.label(model): entry}
            text = json.dumps(saved, ensure_ascii=False, allow_nan=False)
            write_text_atomic(path, text + "\n")


def _ensure(config: ObserveConfig, model: str, strategy: str, layers: int) -> Path:
    """The folder of a finished run; the run is made if needed."""
    check = config.defaults["importance_check"]
    cell = config.run_config(
        model,
        phase=check["phase"],
        strategy=strategy,
        tasks=config.tasks or tuple(check["tasks"]),
        skip_full_layer_num=None if strategy == FULL else layers,
        limit=config.limit or check["limit"],
        batch_size=config.batch_size or config.defaults["batch_size"],
        max_new_tokens=config.max_new_tokens,
    )
    job = resolve(cell)
    if not is_done(job):
        run(cell, show_progress=True)
    return job.folder.path


def _scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Metric, each sample's score and, where measured, its reference answer's loss, by task."""
    found = {}
    for task, scored in score_run(load_run(folder)).tasks.items():
        found[task] = {"metric": scored.main.metric, "scores": list(scored.main.by_id.values())}
        losses = [scored.records.by_id[name].get("reference_loss") for name in scored.main.by_id]
        if None not in losses:
            found[task]["losses"] = losses
    return found


def load_check(out_dir: Path) -> Check:
    """What `measure_check` saved, in the order in which models are drawn."""
    check = read_saved(out_dir / SCORES_FILE)
    return {model: check[model] for model in sorted(check, key=drawing_order)}


@dataclass(frozen=True)
class Curve:
    """One model on one task: scores of the full model, of trivial answers, and of each strategy by skipped layers.

    added: loss of the reference answer of each strategy minus the full model's, nats per token; empty if not measured.
    """

    model: str
    task: str
    metric: str
    full: Estimate
    floors: dict[str, float]
    by_layers: dict[str, dict[int, Estimate]]
    added: dict[str, dict[int, Estimate]]

    @property
    def has_loss(self) -> bool:
        return any(self.added.values())

    @property
    def layers(self) -> list[int]:
        return sorted(self.by_layers[MostSkip.name])


def read_curves(check: Check) -> list[Curve]:
    """Mean scores with intervals, fractions of 1."""
    curves = []
    for model, entry in check.items():
        for task, full in entry["full"].items():
            by_layers = {
                name: {int(n): _estimate(scores[task]["scores"]) for n, scores in entry[name].items()}
                for name in STRATEGIES
            }
            floors = {name: x for name, x in entry.get("floors", {}).get(task, {}).items() if x is not None}
            losses = {name: entry[name] if "losses" in full else {} for name in STRATEGIES}
            added = {
                name: {
                    int(n): _estimate(np.subtract(each[task]["losses"], full["losses"])) for n, each in found.items()
                }
                for name, found in losses.items()
            }
            curves.append(Curve(model, task, full["metric"], _estimate(full["scores"]), floors, by_layers, added))
    return curves


def _estimate(values: Iterable[float]) -> Estimate:
    estimate = mean_estimate([*map(float, values)])
    assert estimate is not None, "a finished run has at least one sample"
    return estimate


def find(check: Check) -> Findings:
    """Test whether the similarity of whole layers tells which can be skipped."""
    curves, paper = read_curves(check), load_yaml("paper")["importance_check"]
    published = "; ".join(
        f"{cls.label} {', '.join(f'{score} at {n}' for n, score in paper[name].items())}"
        for name, cls in STRATEGIES.items()
    )
    phases = ", ".join(dict.fromkeys(labels.PHASES[entry["phase"]] for entry in check.values()))
    columns = ["Model", "Task", "Layers skipped", *(cls.label for cls in STRATEGIES.values())]
    if with_loss := any(curve.has_loss for curve in curves):
        columns += [f"{cls.label}: loss above full" for cls in STRATEGIES.values()]
    rows = []
    for curve in curves:
        task = f"{Target(curve.task, 'prefill').label} ({METRICS.get(curve.metric, curve.metric)})"
        scores = {0: [curve.full] * 2, **{n: [curve.by_layers[name][n] for name in STRATEGIES] for n in curve.layers}}
        added = {n: [curve.added[name].get(n) for name in STRATEGIES] if with_loss else [] for n in scores}
        rows += [
            [curve.model, task, str(n), *map(labels.percent, both), *map(labels.added_nats, added[n])]
            for n, both in scores.items()
        ]
        no_loss = [labels.MISSING] * 2 if with_loss else []
        rows += [
            [curve.model, task, name, *[f"{100 * score:.1f}"] * 2, *no_loss] for name, score in curve.floors.items()
        ]
    return Findings(
        name=NAME,
        title="Importance check: skipping the most and the least similar whole layers",
        notes=[
            f"Scored by each task's own metric, per cent with 95 % bootstrap intervals; skipped {phases}. The paper "
            f"had a GPT judge score the answers, by layers skipped: {published}.",
            *["Loss above full: of the reference answer, mean paired difference, nats per token."] * with_loss,
        ],
        claims=_claims(curves),
        table=DataFrame(rows, columns=columns),
        numbers=[
            {
                **{"model": curve.model, "task": curve.task, "metric": curve.metric, "full": curve.full.as_dict()},
                **({"floors": curve.floors} if curve.floors else {}),
                **_told(curve.by_layers),
                **({"loss_added": _told(curve.added)} if curve.has_loss else {}),
            }
            for curve in curves
        ],
        sources={model: entry["sources"] for model, entry in check.items()},
    )


def _told(by_layers: dict[str, dict[int, Estimate]]) -> dict[str, dict[int, Any]]:
    return {name: {n: estimate.as_dict() for n, estimate in found.items()} for name, found in by_layers.items()}


def _claims(curves: list[Curve]) -> list[Claim]:
    """Of the two at one layer: what share of the full model's score is kept; where that is 0, nothing can be said."""
    most, least = MostSkip.name, LeastSkip.name
    gaps = [c.by_layers[most][n].value - c.by_layers[least][n].value for c in curves for n in c.layers]
    told = (
        f"On average MostSkip scores {100 * sum(gaps) / len(gaps):.1f} points more."
        if gaps
        else "No layer can be skipped."
    )
    text = "Skipping the most similar layers scores at least what skipping the least similar ones does"
    claims = [Claim(text, sum(gap >= 0 for gap in gaps), len(gaps), told)]
    if losses := [(c.added[most][n].value, c.added[least][n].value) for c in curves if c.has_loss for n in c.layers]:
        text = "Skipping the most similar layers adds less loss than skipping the least similar ones"
        told = "On average {:.2f} and {:.2f} nats per token above the full model.".format(*np.mean(losses, axis=0))
        claims.append(Claim(text, sum(of_most < of_least for of_most, of_least in losses), len(losses), told))
    texts: dict[str, tuple[str, Callable[[float], bool]]] = {
        most: ("Skipping the one most similar layer keeps at least 80 % of the score", lambda kept: kept >= 0.8),
        least: ("Skipping the one least similar layer costs at least half of the score", lambda kept: kept <= 0.5),
    }
    for name, (text, holds) in texts.items():
        scored = [c for c in curves if c.full.value > 0 and c.layers]
        kept = [c.by_layers[name][c.layers[0]].value / c.full.value for c in scored]
        told = "The full model scores nothing."
        if kept:
            ends = f"from {100 * min(kept):.0f} to {100 * max(kept):.0f} %"
            told = f"Kept on average {100 * sum(kept) / len(kept):.0f} %, {ends}."
        claims.append(Claim(text, sum(map(holds, kept)), len(kept), told))
    if floored := [c for c in curves if c.floors]:
        above = [(c.full.value if c.full.low is None else c.full.low) > max(c.floors.values()) for c in floored]
        lost = ", ".join(
            f"{c.model} on {Target(c.task, 'prefill').label}" for c in floored if not above[floored.index(c)]
        )
        told = f"Scores at their floor, which say little of skipping: {lost or 'none'}."
        text = f"The full model scores beyond chance more than trivial answers ({', '.join(floored[0].floors)})"
        claims.append(Claim(text, sum(above), len(above), told))
    return claims


def draw(check: Check, out_dir: Path) -> list[Path]:
    """`importance_check`: a panel per model and task, score and where measured loss against layers skipped."""
    curves = {(curve.task, curve.model): curve for curve in read_curves(check)}
    tasks, models = (list(dict.fromkeys(key[i] for key in curves)) for i in (0, 1))
    rows = [(task, _draw_score) for task in tasks]
    if with_loss := any(curve.has_loss for curve in curves.values()):
        rows += [(task, _draw_loss) for task in tasks]
    with styled():
        size = max(MIN_WIDTH, 2.3 * len(models) + 0.6), 1.75 * len(rows) + 0.8
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(rows), len(models), sharex=True, sharey="row" if with_loss else True, squeeze=False)
        for (row, (task, draw_panel)), (column, model) in product(enumerate(rows), enumerate(models)):
            if (task, model) in curves:
                draw_panel(axes[row, column], curves[task, model])
        for model, panel in zip(models, axes[0], strict=True):
            panel.set_title(model)
        for (task, _), panel in zip(rows, axes[:, -1], strict=True):
            label = Target(task, "prefill").label
            panel.annotate(label, (1.03, 0.5), xycoords="axes fraction", rotation=270, va="center", fontsize=9)
        figure.supxlabel("whole layers skipped", fontsize=8)
        if with_loss:
            for (_, draw_panel), panel in zip(rows, axes[:, 0], strict=True):
                panel.set_ylabel("score, per cent" if draw_panel is _draw_score else "loss above full", fontsize=8)
        else:
            figure.supylabel("score, per cent", fontsize=8)
        lines = [Line2D([], [], **cls.look.line, label=cls.label) for cls in STRATEGIES.values()]
        handles = [Line2D([], [], **FULL_LINE, label=labels.STRATEGIES[FULL]), *lines]
        if any(curve.floors for curve in curves.values()):
            handles.append(Line2D([], [], **FLOOR_LINE, label="best trivial answer"))
        columns = len(handles) if len(models) > 1 else 2
        figure.legend(handles=handles, loc="outside upper center", ncols=columns)
        return save(figure, out_dir / NAME)


def _draw_score(panel: Axes, curve: Curve) -> None:
    panel.axhline(100 * curve.full.value, **FULL_LINE)
    if curve.floors:
        panel.axhline(100 * max(curve.floors.values()), **FLOOR_LINE)
    _draw_curves(panel, curve.layers, curve.by_layers, 100)
    panel.set_ylim(-4, 104)


def _draw_loss(panel: Axes, curve: Curve) -> None:
    panel.axhline(0, **FULL_LINE)
    if curve.has_loss:
        _draw_curves(panel, curve.layers, curve.added, 1)


def _draw_curves(panel: Axes, layers: list[int], by_layers: dict[str, dict[int, Estimate]], scale: float) -> None:
    for name, cls in STRATEGIES.items():
        found = [by_layers[name][n] for n in layers]
        values = [scale * estimate.value for estimate in found]
        reach = [
            [scale * (e.value - (e.value if e.low is None else e.low)) for e in found],
            [scale * ((e.value if e.high is None else e.high) - e.value) for e in found],
        ]
        panel.errorbar(layers, values, yerr=reach, **cls.look.line, elinewidth=0.8, capsize=1.5)
    panel.set_xticks(layers)
    panel.grid(axis="y")
