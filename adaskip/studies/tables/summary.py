"""The paper's claim, counted: in how many cells AdaSkip is the best of the four strategies, ours and the paper's.

And how often the online window fired.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from adaskip.common.intervals import mean, mean_if_whole
from adaskip.studies.tables.compare import OTHERS, OURS, OUTCOMES, comparisons, contests
from adaskip.studies.tables.paper import Paper
from adaskip.studies.tables.results import COMPARED, PLACE, SCORE, Results

CHANCE = ("interval_above", "paired_better", "paired_worse")
ONLINE_PHASES = ("decode", "e2e")


def summarise(results: Results) -> dict[str, Any]:
    """Every number of the summary, as plain data."""
    ours = contests(comparisons(results, SCORE))
    cells = results.cells
    at_floor = cells.loc[cells["at_floor"], ["phase", "model", "task"]].drop_duplicates()
    return {
        "cells": len(cells[cells["strategy"] == OURS]),
        "ours": tally(ours),
        "paper": tally(_paper_contests(results.paper)),
        "mean_retention": _mean_retention(results),
        "online": _online_learning(results),
        "contests": ours.to_dict("records"),
        **({"at_floor": at_floor.to_dict("records")} if len(at_floor) else {}),
    }


def tally(compared: pd.DataFrame) -> dict[str, Any]:
    """Outcomes over all contests, then by phase, by fraction and by model."""
    axes = ("phase", "fraction", "model")
    by = {axis: {str(value): _count(part) for value, part in compared.groupby(axis, sort=False)} for axis in axes}
    return {**_count(compared), **{f"by_{axis}": counts for axis, counts in by.items()}}


def _count(compared: pd.DataFrame) -> dict[str, int]:
    outcomes = {outcome: int((compared["outcome"] == outcome).sum()) for outcome in OUTCOMES.values()}
    return {"compared": len(compared), **outcomes, **{name: int(compared[name].sum()) for name in CHANCE}}


def _paper_contests(paper: Paper) -> pd.DataFrame:
    """The contests of the paper's tables, which print no intervals."""
    rows = []
    for phase, table in paper.tables.items():
        for model in paper.models:
            for fraction in filter(None, table.by_fraction):
                for task in table.tasks:
                    scores = {name: table.score(model, name, fraction, task) for name in COMPARED}
                    top = max(scores[name] for name in OTHERS)
                    gap = scores[OURS] - top
                    outcome = "best" if gap > 0 else "beaten" if gap < 0 else "tied"
                    rows.append((phase, model, fraction, task, scores, False, False, False, outcome))
    return pd.DataFrame(rows, columns=[*PLACE, "scores", *CHANCE, "outcome"])


def _mean_retention(results: Results) -> list[dict[str, Any]]:
    """Per phase, fraction and strategy the mean over models (of the paper's, those) and tasks, ours and the paper's.

    None if any cell lacks; tasks at their floor do not count.
    """
    cells = results.cells[results.cells["model"].isin(results.paper_models or results.models)]
    cells = cells[~cells["at_floor"]]
    lines = []
    for phase in results.paper.tables:
        for fraction in results.fractions():
            for strategy in results.skipping:
                place = (cells["phase"] == phase) & (cells["fraction"] == fraction) & (cells["strategy"] == strategy)
                found = cells[place]
                whole = {
                    "ours": found["retention"].where(found["final"]),
                    "paper": found["paper_retention"],
                }
                means = {name: mean_if_whole([None if x != x else x for x in each]) for name, each in whole.items()}
                lines.append({"phase": phase, "fraction": fraction, "strategy": strategy, "cells": len(found), **means})
    return lines


def _online_learning(results: Results) -> dict[str, Any]:
    """How often AdaSkip's online window added FFN sublayers, and how many, over its decode and end-to-end runs."""
    samples = results.samples[(results.samples["strategy"] == OURS) & results.samples["phase"].isin(ONLINE_PHASES)]
    added = {place: [*group] for place, group in samples.groupby(["phase", "model", "fraction"])["added_online"]}
    lines = [
        {"phase": phase, "model": model, "fraction": fraction, **_fired(added[phase, model, fraction])}
        for phase in ONLINE_PHASES
        for model in results.models
        for fraction in results.fractions(model)
        if (phase, model, fraction) in added
    ]
    return {**_fired([*samples["added_online"]]), "runs": lines}


def _fired(added: Sequence[int]) -> dict[str, Any]:
    fired = [count for count in added if count > 0]
    return {
        "requests": len(added),
        "fired": len(fired),
        "mean_added": mean(added) if added else None,
        "mean_added_when_fired": mean(fired) if fired else None,
        "most_added": max(added, default=None),
    }
