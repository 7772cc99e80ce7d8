"""The trade-off as sentences, tables and JSON, from the points of `tradeoff.find_tradeoffs`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from adaskip.common.pipe_table import pipe_table
from adaskip.strategies.registry import FULL
from adaskip.studies.tables import labels
from adaskip.studies.tables.labels import PARTIAL
from adaskip.studies.tables.results import ROW, estimate
from adaskip.studies.tables.tradeoff import KEPT, Tradeoff

ENDS = {"value": "value", "low": "value_low", "high": "value_high"}
KEEPING = 0.95
"""Minimum share of the score for comparing speedups."""
SPEEDUP = (
    "Speedup: the full model's time / the strategy's as `adaskip bench` measured them side by side; TTFT in "
    "prefill, TPOT in decode, end to end the time of a request with the full model's mean answer length. The mean over "
    "models is geometric for speedups. **Bold**: on the Pareto front (no other point is at least as good in both and "
    "better in one), by the values, regardless of intervals."
)


def fronts(tradeoff: Tradeoff) -> dict[str, dict[str, int]]:
    """For each strategy the numbers of its points, of points on a Pareto front, of panels, of panels on whose front it
    is, and of panels in which it is the fastest that keeps 95 % of the score.
    """
    points = tradeoff.points[tradeoff.points["model"].notna()]
    fastest = [tradeoff.fastest(phase, model, KEEPING) for phase in tradeoff.phases for model in tradeoff.models]
    counts = {}
    for strategy in tradeoff.strategies:
        own = points[points["strategy"] == strategy]
        panels = own.groupby(["phase", "model"])["on_front"].any()
        counts[strategy] = {
            "points": len(own),
            "on_front": int(own["on_front"].sum()),
            "panels": len(panels),
            "panels_on_front": int(panels.sum()),
            "panels_fastest": fastest.count(strategy),
        }
    return counts


def to_json(tradeoff: Tradeoff) -> str:
    """The file `tradeoff.json`, for the score kept."""
    content: dict[str, Any] = {
        "fronts": fronts(tradeoff),
        "sentences": sentences(tradeoff),
        "missing": tradeoff.missing,
        "points": [
            {
                **{name: getattr(point, name) for name in (*ROW, "speedup")},
                "kept": {end: getattr(point, column) for end, column in ENDS.items()},
                "on_front": point.on_front,
            }
            for point in tradeoff.points.astype(object).where(tradeoff.points.notna(), None).itertuples()
        ],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def sentences(tradeoff: Tradeoff) -> list[str]:
    """How often each strategy is on the Pareto front and, for the score kept, the fastest; runs that are not drawn."""
    counts = fronts(tradeoff).items()
    each = [
        f"{labels.STRATEGIES[name]} is on the front with {n['on_front']} of its {n['points']} points, "
        f"on {n['panels_on_front']} of {n['panels']} fronts"
        for name, n in counts
    ]
    num_models, num_phases = len(tradeoff.models), len(tradeoff.phases)
    title = tradeoff.quality.title.partition(",")[0].capitalize()
    where = f"{num_models} {'model' if num_models == 1 else 'models'} x {num_phases} phases"
    lines = [f"{title} against measured speedup, {where}, each with a Pareto front: {'; '.join(each)}."]
    if tradeoff.quality is KEPT:
        fastest = [f"{labels.STRATEGIES[name]} {n['panels_fastest']}" for name, n in counts]
        none = num_models * num_phases - sum(n["panels_fastest"] for _, n in counts)
        lines.append(
            f"Fastest with at least {100 * KEEPING:.0f} % of the score, number of panels out of {num_models} x "
            f"{num_phases}: {', '.join(fastest)}, the full model {none}."
        )
    return [*lines, *_about_runs(tradeoff)] + [
        f"Not drawn, {reason}: {', '.join(runs)}." for reason, runs in tradeoff.missing.items()
    ]


def _about_runs(tradeoff: Tradeoff) -> list[str]:
    """Which runs keep the K/V, and which speedups come from which result, if there are several."""
    points, lines = tradeoff.points[tradeoff.points["strategy"] != FULL], []
    of_models = points[points["model"].notna()]
    if kept := [name for name in tradeoff.strategies if name in set(of_models.loc[of_models["keep_kv"], "strategy"])]:
        lines.append(f"With keep_kv, skipping only while the prompt is read: {_names(kept)}.")
    if of_models.groupby("model")["source"].nunique().max() > 1:
        each = [f"{_names(names.unique())} from {source}" for source, names in of_models.groupby("source")["strategy"]]
        lines.append(
            f"Speedups of {'; '.join(each)}: each over the full model of its own result, so that points of different "
            "results are not compared side by side."
        )
    return lines


def _names(strategies: Iterable[str]) -> str:
    return ", ".join(labels.STRATEGIES[name] for name in strategies)


def to_text(tradeoff: Tradeoff) -> str:
    """The document `tradeoff.md`, for the score kept."""
    parts = ["# Score kept against measured speedup", "![](../plots/tradeoff.png)", *sentences(tradeoff)]
    parts.append(
        "Kept: score / full model's score, the mean over the phase's tasks, per cent with 95 % bootstrap intervals. "
        + SPEEDUP
    )
    for phase in tradeoff.phases:
        parts += [f"## {labels.PHASES[phase]}: speedup, score kept", _table(tradeoff, phase)]
    return "\n\n".join(parts) + "\n"


def measures_text(tradeoffs: Sequence[Tradeoff]) -> str:
    """The document `tradeoff_measures.md`, for fidelity and loss."""
    parts = ["# Fidelity and loss against measured speedup", "![](../plots/tradeoff_measures.png)"]
    parts += [line for tradeoff in tradeoffs for line in sentences(tradeoff)]
    parts.append(
        "Fidelity: the task's metric against the full model's own answer, per cent. Loss: of the reference answer, "
        "nats per token, minus the full model's on the same samples. Both are means over the phase's tasks with 95 % "
        f"bootstrap intervals; `{PARTIAL}` unfinished run, over its samples so far. " + SPEEDUP
    )
    for tradeoff in tradeoffs:
        for phase in tradeoff.phases:
            title = f"## {labels.PHASES[phase]}: speedup, {tradeoff.quality.title}"
            parts += [title, _table(tradeoff, phase)]
    return "\n\n".join(parts) + "\n"


def _table(tradeoff: Tradeoff, phase: str) -> str:
    """A row per strategy and budget, a column per model and one for their mean."""
    places = tradeoff.models if len(tradeoff.models) == 1 else [None, *tradeoff.models]
    panels = [
        {(point.fraction, point.strategy): point for point in tradeoff.panel(phase, model).itertuples()}
        for model in places
    ]
    keys = sorted(
        {key for panel in panels for key in panel if key[1] != FULL},
        key=lambda key: (key[0], tradeoff.strategies.index(key[1])),
    )
    rows = [
        [labels.budget(key[0]), labels.STRATEGIES[key[1]], *(_text(tradeoff, panel.get(key)) for panel in panels)]
        for key in keys
    ]
    return pipe_table(["Skipped", "Strategy", *(model or "mean over models" for model in places)], rows)


def _text(tradeoff: Tradeoff, point: Any) -> str:
    """`**1.21, 99.8** [97.0, 101.2]`"""
    if point is None:
        return labels.MISSING
    found = estimate(point, "value")
    text = labels.percent(found) if tradeoff.quality.scale == 100 else labels.added_nats(found)
    value, space, spread = text.partition(" ")
    value = f"{point.speedup:.2f}, {value}{PARTIAL if point.partial else ''}"
    return (f"**{value}**" if point.on_front else value) + space + spread
