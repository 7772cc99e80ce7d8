"""AdaSkip against each other strategy, cell by cell and measure by measure, over the samples that both have."""

from __future__ import annotations

from typing import Any

import pandas as pd

from adaskip.common.intervals import mean_estimate
from adaskip.studies.tables.results import COMPARED, PLACE, SCORE, Measure, Results

OURS = "adaskip"
OTHERS = tuple(name for name in COMPARED if name != OURS)
BETTER, TIED, WORSE = "better", "tied", "worse"
OUTCOMES = {BETTER: "best", TIED: "tied", WORSE: "beaten"}
"""Against all others, by the worst of the verdicts."""


def comparisons(results: Results, measure: Measure) -> pd.DataFrame:
    """A row for each cell and other strategy, both run to their end: the means `ours` and `theirs`, and the interval
    `low` to `high` of the paired difference, positive where AdaSkip is better.

    `verdict` compares the means; `interval_above`: AdaSkip's own interval is better than the other's. Cells at their
    floor do not count by score.
    """
    cells = results.cells[results.cells["final"] & results.cells[measure.name].notna()]
    if measure is SCORE:
        cells = cells[~cells["at_floor"]]
    rows = []
    for place, group in cells.groupby(PLACE, sort=False):
        by_strategy = {cell.strategy: cell for cell in group.itertuples()}
        if (ours := by_strategy.pop(OURS, None)) is not None:
            rows += [
                (*place, other.strategy, *_compare(results, measure, ours, other)) for other in by_strategy.values()
            ]
    columns = [*PLACE, *("other", "ours", "theirs", "low", "high", "verdict", "interval_above")]
    return pd.DataFrame(rows, columns=columns).astype({"interval_above": bool, "low": float, "high": float})


def _compare(results: Results, measure: Measure, ours: Any, other: Any) -> tuple[Any, ...]:
    """ours, other: cells."""
    means = [round(measure.scale * getattr(cell, measure.name), 6) for cell in (ours, other)]
    mine, theirs = (
        results.samples_of[cell.phase, cell.model, cell.strategy, cell.fraction, cell.task][measure.name]
        for cell in (ours, other)
    )
    difference = mean_estimate([*(measure.sign * (mine - theirs.reindex(mine.index))).dropna()])
    low, high = (difference.low, difference.high) if difference else (None, None)
    best_end, worst_end = ("_high", "_low") if measure.sign > 0 else ("_low", "_high")
    above = measure.sign * (getattr(ours, measure.name + worst_end) - getattr(other, measure.name + best_end)) > 0
    gap = measure.sign * (means[0] - means[1])
    return (*means, low, high, BETTER if gap > 0 else WORSE if gap < 0 else TIED, above)


def contests(compared: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell in which all of the paper's strategies have run to their end.

    `outcome`: AdaSkip is `best`, `tied` (none is better and one as good) or `beaten`; `interval_above`: its interval is
    better than each other's; `paired_better`: the paired difference to each is positive beyond chance; `paired_worse`:
    to one of them it is negative beyond chance. compared: of `comparisons`.
    """
    rows = []
    for place, group in compared[compared["other"].isin(OTHERS)].groupby(PLACE, sort=False):
        if len(group) == len(OTHERS):
            scores = {**dict(zip(group["other"], group["theirs"], strict=True)), OURS: group["ours"].iloc[0]}
            beyond = ((group["low"] > 0).all(), (group["high"] < 0).any())
            least = max(group["verdict"], key=list(OUTCOMES).index)
            rows.append((*place, scores, group["interval_above"].all(), *beyond, OUTCOMES[least]))
    return pd.DataFrame(rows, columns=[*PLACE, "scores", "interval_above", "paired_better", "paired_worse", "outcome"])
