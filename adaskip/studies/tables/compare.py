"""AdaSkip compared with every other strategy by cell and measure, over the samples that both have.

Runs of different protocols, or without a common sample, are not compared (`Results.notes` names them).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pandas as pd

from adaskip.common.intervals import Estimate, mean_estimate
from adaskip.studies.tables.paper import Paper
from adaskip.studies.tables.results import COMPARED, MEASURES, OURS, PLACE, SCORE, Measure, Results, estimate

OTHERS = tuple(name for name in COMPARED if name != OURS)
BETTER, TIED, WORSE = "better", "tied", "worse"
OUTCOMES = {BETTER: "best", TIED: "tied", WORSE: "beaten"}
"""The outcome against all others, by the worst verdict."""
FEWEST_PAIRS = 8
"""With fewer pairs a difference has no interval and is not called significant: bootstrap intervals of few samples are
too narrow. Where the true difference is 0, 50 % of them exclude it with 2 normal pairs, 12 % with 8, 7 % with 30."""
CHANCE = ("interval_above", "paired_better", "paired_worse")


@lru_cache(maxsize=len(MEASURES))
def comparisons(results: Results, measure: Measure) -> pd.DataFrame:
    """A row for each cell and other strategy, if both runs are finished and can be compared: over their common samples
    the means `ours` and `theirs`, and the interval `low` to `high` of the paired difference, positive if AdaSkip is
    better; per cent or nats, as printed. The interval is NaN for fewer than `FEWEST_PAIRS`.

    `verdict` compares the means; `interval_above`: AdaSkip's interval is better than the other's. Scores at their floor
    are left out. The frames of the last results are kept, since several documents use them.
    """
    cells = results.cells[results.cells["final"] & results.cells[measure.name].notna()]
    if measure is SCORE:
        cells = cells[~cells["at_floor"]]
    rows = []
    for place, group in cells.groupby(PLACE, sort=False):
        by_strategy = {cell.strategy: cell for cell in group.itertuples()}
        if (ours := by_strategy.pop(OURS, None)) is not None:
            found = {name: _compare(results, measure, ours, cell) for name, cell in by_strategy.items()}
            rows += [(*place, name, *values) for name, values in found.items() if values is not None]
    columns = [*PLACE, *("other", "ours", "theirs", "low", "high", "verdict", "interval_above")]
    return pd.DataFrame(rows, columns=columns).astype({"interval_above": bool, "low": float, "high": float})


def _compare(results: Results, measure: Measure, ours: Any, other: Any) -> tuple[Any, ...] | None:
    """ours, other: cells. None if they cannot be compared."""
    rows = [(cell.phase, cell.model, cell.strategy, cell.fraction) for cell in (ours, other)]
    if results.other_protocol(*rows):
        return None
    values = [results.samples_of[*row, ours.task][measure.name].dropna() for row in rows]
    mine, theirs = (each[each.index.isin(values[0].index.intersection(values[1].index))] for each in values)
    if mine.empty:
        return None
    gaps = [*(measure.sign * measure.scale * (mine - theirs.reindex(mine.index)))]
    difference = mean_estimate(gaps) if len(gaps) >= FEWEST_PAIRS else None
    low, high = (difference.low, difference.high) if difference else (None, None)
    cells = zip((ours, other), values, (mine, theirs), strict=True)
    estimates = [_estimate(cell, measure, every, common) for cell, every, common in cells]
    means = [round(measure.scale * each.value, 6) for each in estimates]
    (our_low, our_high), (their_low, their_high) = ((each.low, each.high) for each in estimates)
    worst, best = (our_low, their_high) if measure.sign > 0 else (our_high, their_low)
    above = worst is not None and best is not None and measure.sign * (worst - best) > 0
    return (*means, low, high, _verdict(measure.sign * (means[0] - means[1])), above)


def _estimate(cell: Any, measure: Measure, values: pd.Series, common: pd.Series) -> Estimate:
    """The mean over the `common` samples: that of the cell if these are all of its values."""
    found = estimate(cell, measure.name) if len(values) == len(common) else mean_estimate([*common])
    assert found is not None, "there is a common sample"
    return found


def _verdict(gap: float) -> str:
    return BETTER if gap > 0 else WORSE if gap < 0 else TIED


def contests(compared: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell in which the runs of all of the paper's strategies are finished.

    `outcome`: AdaSkip is `best`, `tied` (none is better and one is equal) or `beaten`; `interval_above`: its interval
    is better than all others; `paired_better`: it is significantly better than each other; `paired_worse`: it is
    significantly worse than one. compared: from `comparisons`.
    """
    rows = []
    for place, group in compared[compared["other"].isin(OTHERS)].groupby(PLACE, sort=False):
        if len(group) == len(OTHERS):
            scores = {**dict(zip(group["other"], group["theirs"], strict=True)), OURS: group["ours"].iloc[0]}
            chance = (group["interval_above"].all(), (group["low"] > 0).all(), (group["high"] < 0).any())
            rows.append((*place, scores, *chance, OUTCOMES[max(group["verdict"], key=list(OUTCOMES).index)]))
    return pd.DataFrame(rows, columns=[*PLACE, "scores", *CHANCE, "outcome"])


def paper_contests(paper: Paper) -> pd.DataFrame:
    """The same for the paper's tables, which have no intervals."""
    rows = []
    for phase, table in paper.tables.items():
        for model in paper.models:
            for fraction in filter(None, table.by_fraction):
                for column, task in enumerate(table.tasks):
                    scores = {name: table.by_fraction[fraction][model][name][column] for name in COMPARED}
                    gap = scores[OURS] - max(scores[name] for name in OTHERS)
                    rows.append((phase, model, fraction, task, scores, False, False, False, OUTCOMES[_verdict(gap)]))
    return pd.DataFrame(rows, columns=[*PLACE, "scores", *CHANCE, "outcome"])


def tally(found: pd.DataFrame) -> dict[str, Any]:
    """Outcomes over all contests, then by phase, by fraction and by model."""
    axes = ("phase", "fraction", "model")
    by = {axis: {str(value): _count(part) for value, part in found.groupby(axis, sort=False)} for axis in axes}
    return {**_count(found), **{f"by_{axis}": counts for axis, counts in by.items()}}


def _count(found: pd.DataFrame) -> dict[str, int]:
    outcomes = {outcome: int((found["outcome"] == outcome).sum()) for outcome in OUTCOMES.values()}
    return {"compared": len(found), **outcomes, **{name: int(found[name].sum()) for name in CHANCE}}


def claim(counts: dict[str, Any]) -> str:
    """`is the best of the four strategies in 40 of 42 cells (95 %), tied for the best in 1 and beaten in 1.`"""
    if not counts["compared"]:
        return "cannot be compared yet: no cell has finished runs of all four strategies."
    share = f"{100 * counts['best'] / counts['compared']:.0f} %"
    return (
        f"is the best of the four strategies in {counts['best']} of {counts['compared']} cells ({share}), "
        f"tied for the best in {counts['tied']} and beaten in {counts['beaten']}."
    )


def beyond_chance(counts: dict[str, Any]) -> str:
    """The second sentence of the claim; empty if nothing was compared."""
    if not counts["compared"]:
        return ""
    return (
        f" It is significantly better than every other strategy (paired bootstrap) in {counts['paired_better']} "
        f"cells, and significantly worse than one in {counts['paired_worse']}."
    )
