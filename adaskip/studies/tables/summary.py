"""The paper's claim, counted: in how many cells AdaSkip is the best of the four strategies, ours and the paper's.

And how often the online window fired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adaskip.common.intervals import Estimate, mean, mean_estimate, mean_if_whole
from adaskip.studies.tables.entries import Entry, PhaseEntries
from adaskip.studies.tables.scoreboard import Row, Scoreboard

OURS = "adaskip"
ONLINE_PHASES = ("decode", "e2e")


@dataclass(frozen=True)
class Contest:
    """One cell: the four strategies on one task of one model in one phase at one budget."""

    phase: str
    model: str
    fraction: float
    task: str
    scores: dict[str, float]
    """By strategy, per cent."""
    interval_above: bool = False
    """AdaSkip's interval lies above each of the others'."""
    paired_better: bool = False
    """Against each of the others, the interval of the paired difference lies above zero."""
    paired_worse: bool = False
    """Against at least one of the others, it lies below zero."""

    @property
    def outcome(self) -> str:
        """`best`, `tied` (none above, one level) or `beaten`."""
        top = max(score for name, score in self.scores.items() if name != OURS)
        return "best" if self.scores[OURS] > top else "tied" if self.scores[OURS] == top else "beaten"


def summarise(tables: Sequence[PhaseEntries]) -> dict[str, Any]:
    """Every number of the summary, as plain data."""
    ours, paper = _contests(tables, _our_contest), _contests(tables, _paper_contest)
    return {
        "cells": sum(1 for _ in _groups(tables)),
        "ours": tally(ours),
        "paper": tally(paper),
        "mean_retention": mean_retention(tables),
        "online": online_learning(tables[0].board),
        "contests": [{**asdict(contest), "outcome": contest.outcome} for contest in ours],
    }


def tally(contests: Sequence[Contest]) -> dict[str, Any]:
    """Outcomes over all contests, then by phase, by fraction and by model."""
    counts: dict[str, Any] = _count(contests)
    for axis in ("phase", "fraction", "model"):
        values = dict.fromkeys(getattr(contest, axis) for contest in contests)
        counts[f"by_{axis}"] = {
            str(value): _count([contest for contest in contests if getattr(contest, axis) == value]) for value in values
        }
    return counts


def mean_retention(tables: Sequence[PhaseEntries]) -> list[dict[str, Any]]:
    """Per phase, fraction and strategy the mean over models and tasks, ours and the paper's; None if any cell lacks."""
    lines = []
    for table in tables:
        for fraction in table.board.fractions:
            for strategy in table.board.skipping:
                entries = [
                    entry
                    for (row, _), entry in table.cells.items()
                    if (row.strategy, row.fraction) == (strategy, fraction)
                    and row.model in (table.board.paper.models or table.board.models)
                ]
                ours = [entry.final_retention for entry in entries]
                paper = [entry.paper_retention for entry in entries]
                line = {"phase": table.phase, "fraction": fraction, "strategy": strategy, "cells": len(entries)}
                lines.append({**line, "ours": mean_if_whole(ours), "paper": mean_if_whole(paper)})
    return lines


def online_learning(board: Scoreboard) -> dict[str, Any]:
    """How often AdaSkip's online window added FFN sublayers, and how many, over its decode and end-to-end runs."""
    lines, everything = [], []
    for phase in ONLINE_PHASES:
        for model in board.models:
            for fraction in board.fractions:
                scored = board.runs.get(Row(phase, model, OURS, fraction))
                if scored is None:
                    continue
                added = [len(r["online_ffns"]) for task in scored.tasks.values() for r in task.records.records]
                everything += added
                lines.append({"phase": phase, "model": model, "fraction": fraction, **_fired(added)})
    return {**_fired(everything), "runs": lines}


def _fired(added: Sequence[int]) -> dict[str, Any]:
    fired = [count for count in added if count > 0]
    return {
        "requests": len(added),
        "fired": len(fired),
        "mean_added": mean(added) if added else None,
        "mean_added_when_fired": mean(fired) if fired else None,
        "most_added": max(added, default=None),
    }


def _count(contests: Sequence[Contest]) -> dict[str, int]:
    outcomes = [contest.outcome for contest in contests]
    return {
        "compared": len(contests),
        **{outcome: outcomes.count(outcome) for outcome in ("best", "tied", "beaten")},
        "interval_above": sum(contest.interval_above for contest in contests),
        "paired_better": sum(contest.paired_better for contest in contests),
        "paired_worse": sum(contest.paired_worse for contest in contests),
    }


def _groups(tables: Sequence[PhaseEntries]) -> Iterator[dict[str, Entry]]:
    """The competing strategies, for every cell of the tables."""
    for table in tables:
        for model in table.board.models:
            for fraction in table.board.fractions:
                for task in table.tasks:
                    yield table.group(model, fraction, task)


def _contests(tables: Sequence[PhaseEntries], make: Callable[[dict[str, Entry]], Contest | None]) -> list[Contest]:
    return [contest for group in _groups(tables) if (contest := make(group)) is not None]


def _our_contest(group: dict[str, Entry]) -> Contest | None:
    """None unless all four strategies have run to their end."""
    scores = {name: entry.final_score for name, entry in group.items() if entry.final_score is not None}
    if len(scores) < len(group):
        return None
    ours, others = group[OURS], [entry for name, entry in group.items() if name != OURS]
    differences = [_difference(ours, other) for other in others]
    return Contest(
        *_place(ours),
        scores=scores,
        interval_above=all(_lies_above(ours.score, other.score) for other in others),
        paired_better=all(low is not None and low > 0 for low, _ in differences),
        paired_worse=any(high is not None and high < 0 for _, high in differences),
    )


def _paper_contest(group: dict[str, Entry]) -> Contest | None:
    scores = {name: entry.paper_score for name, entry in group.items() if entry.paper_score is not None}
    return Contest(*_place(group[OURS]), scores=scores) if len(scores) == len(group) else None


def _lies_above(ours: Estimate | None, other: Estimate | None) -> bool:
    if ours is None or other is None or ours.low is None or other.high is None:
        return False
    return ours.low > other.high


def _place(entry: Entry) -> tuple[str, str, float, str]:
    return entry.row.phase, entry.row.model, entry.row.fraction, entry.task


def _difference(ours: Entry, other: Entry) -> tuple[float | None, float | None]:
    """The interval of the mean difference over the samples that both have."""
    assert ours.scored, "only cells that were run compete"
    assert other.scored, "only cells that were run compete"
    mine, theirs = ours.scored.main.by_id, other.scored.main.by_id
    estimate = mean_estimate([mine[name] - theirs[name] for name in mine if name in theirs])
    return (estimate.low, estimate.high) if estimate else (None, None)
