"""The trade-off in words and as a table; every number in them comes from `tradeoff.find_tradeoff`."""

from __future__ import annotations

import json
from typing import Any

from adaskip.common.pipe_table import pipe_table
from adaskip.studies.tables import labels
from adaskip.studies.tables.tradeoff import FULL, Point, Tradeoff

KEEPING = 0.95
"""Share of the score below which a speedup is of little use."""


def fronts(tradeoff: Tradeoff) -> dict[str, dict[str, int]]:
    """By strategy, model by model: its points and those on a front; panels, those whose front it is on, and those in
    which it is the fastest to keep 95 % of the score.
    """
    counts = {}
    places = [(phase, model) for phase in tradeoff.phases for model in tradeoff.models]
    panels = [tradeoff.panel(*place) for place in places]
    fastest = [best.strategy for place in places if (best := tradeoff.fastest(*place, KEEPING)) is not None]
    for strategy in tradeoff.strategies:
        own = [[point for point in panel if point.strategy == strategy] for panel in panels]
        counts[strategy] = {
            "points": sum(map(len, own)),
            "on_front": sum(point.on_front for panel in own for point in panel),
            "panels": sum(bool(panel) for panel in own),
            "panels_on_front": sum(any(point.on_front for point in panel) for panel in own),
            "panels_fastest": fastest.count(strategy),
        }
    return counts


def to_json(tradeoff: Tradeoff) -> str:
    content: dict[str, Any] = {
        "fronts": fronts(tradeoff),
        "sentences": sentences(tradeoff),
        "missing": tradeoff.missing,
        "points": [point.as_dict() for point in tradeoff.points],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def sentences(tradeoff: Tradeoff) -> list[str]:
    """How often each strategy is on the Pareto front and how often the fastest; and what is not drawn."""
    counts = fronts(tradeoff).items()
    each = [
        f"{labels.STRATEGIES[name]} is on the front with {n['on_front']} of its {n['points']} points, "
        f"on {n['panels_on_front']} of {n['panels']} fronts"
        for name, n in counts
    ]
    where = f"{len(tradeoff.models)} models x {len(tradeoff.phases)} phases"
    fastest = [f"{labels.STRATEGIES[name]} {n['panels_fastest']}" for name, n in counts]
    none = len(tradeoff.models) * len(tradeoff.phases) - sum(n["panels_fastest"] for _, n in counts)
    lines = [
        f"Score kept against measured speedup, {where}, a Pareto front each: {'; '.join(each)}.",
        f"Of what keeps at least {100 * KEEPING:.0f} % of the score, the fastest is (times in {len(tradeoff.models)} x "
        f"{len(tradeoff.phases)}): {', '.join(fastest)}, the full model {none}.",
    ]
    return lines + [f"Not drawn, {reason}: {', '.join(runs)}." for reason, runs in tradeoff.missing.items()]


def to_text(tradeoff: Tradeoff) -> str:
    """The document `tradeoff.md`."""
    parts = ["# Score kept against measured speedup", "![](../plots/tradeoff.png)", *sentences(tradeoff)]
    parts.append(
        "Kept: score / full model's score, the mean over the phase's tasks, per cent with 95 % bootstrap intervals. "
        "Speedup: the full model's time / the strategy's as `adaskip bench` measured them side by side; TTFT in "
        "prefill, TPOT in decode, end to end the time of a request with the full model's mean answer. The mean over "
        "models is geometric for speedups. **Bold**: on the Pareto front, no other point being as good in both and "
        "better in one; by the values, whatever their intervals."
    )
    for phase in tradeoff.phases:
        places = [None, *tradeoff.models]
        header = ["Skipped", "Strategy", *(model or "mean over models" for model in places)]
        panels = [{(p.fraction, p.strategy): p for p in tradeoff.panel(phase, model)} for model in places]
        keys = sorted(
            {key for panel in panels for key in panel if key[1] != FULL},
            key=lambda key: (key[0], tradeoff.strategies.index(key[1])),
        )
        rows = [
            [
                labels.budget(fraction),
                labels.STRATEGIES[name],
                *(_text(panel.get((fraction, name))) for panel in panels),
            ]
            for fraction, name in keys
        ]
        parts += [f"## {labels.PHASES[phase]}: speedup, score kept", pipe_table(header, rows)]
    return "\n\n".join(parts) + "\n"


def _text(point: Point | None) -> str:
    """`**1.21, 99.8** [97.0, 101.2]`"""
    if point is None:
        return labels.MISSING
    value = f"{point.speedup:.2f}, {100 * point.kept.value:.1f}"
    return (f"**{value}**" if point.on_front else value) + labels.interval(point.kept)
