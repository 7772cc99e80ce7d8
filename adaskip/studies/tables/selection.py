"""Strategy calibrated against the best of the other four, model by model: mean scores, and the paired difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaskip.common.intervals import Estimate, mean, mean_of_means_estimate
from adaskip.common.pipe_table import pipe_table
from adaskip.studies.tables import labels
from adaskip.studies.tables.entries import PhaseEntries
from adaskip.studies.tables.scoreboard import COMPARED, Row
from adaskip.studies.tables.scores import ScoredTask

CALIBRATED = "calibrated"


@dataclass(frozen=True)
class Match:
    """One model in one phase at one budget. means: mean score over the phase's tasks, per cent, by strategy."""

    phase: str
    model: str
    fraction: float
    means: dict[str, float]
    best_other: str
    difference: Estimate
    """Calibrated less the best other: mean over the tasks of the mean over the samples that both have."""

    @property
    def verdict(self) -> str:
        """`better than`, `equal to` or `worse than`, by the value."""
        gap = self.difference.value
        return "better than" if gap > 0 else "equal to" if gap == 0 else "worse than"

    @property
    def beyond_chance(self) -> bool:
        """Whether the difference's interval leaves zero out."""
        low, high = self.difference.low, self.difference.high
        return low is not None and high is not None and not low <= 0 <= high


def matches(tables: Sequence[PhaseEntries]) -> list[Match]:
    """Every match whose five strategies have run all tasks to their end, by phase, fraction and model."""
    places = [(t, f, m) for t in tables for f in t.board.fractions for m in t.board.models]
    return [match for place in places if (match := _match(*place)) is not None]


def _match(table: PhaseEntries, fraction: float, model: str) -> Match | None:
    scored = {name: _scored(table, Row(table.phase, model, name, fraction)) for name in (*COMPARED, CALIBRATED)}
    means = {
        name: 100 * mean([mean([*task.main.by_id.values()]) for task in tasks])
        for name, tasks in scored.items()
        if tasks
    }
    if len(means) < len(scored):
        return None
    best = max(COMPARED, key=means.__getitem__)
    pairs = zip(scored[CALIBRATED], scored[best], strict=True)
    difference = mean_of_means_estimate([_differences(ours, theirs) for ours, theirs in pairs])
    return Match(table.phase, model, fraction, means, best, difference)


def _scored(table: PhaseEntries, row: Row) -> list[ScoredTask]:
    """The scores of all tasks of a run; none unless all have come to their end."""
    found = [table.board.scored(row, task) for task in table.tasks]
    whole = [task for task in found if task is not None and task.records.complete]
    return whole if len(whole) == len(found) else []


def _differences(ours: ScoredTask, theirs: ScoredTask) -> list[float]:
    mine, others = ours.main.by_id, theirs.main.by_id
    return [100 * (mine[name] - others[name]) for name in mine if name in others]


def to_text(found: Sequence[Match]) -> str:
    """The document `selection.md`."""
    header = [
        *("Phase", "Skipped", "Model"),
        *(labels.STRATEGIES[name] for name in (*COMPARED, CALIBRATED)),
        *("Difference", "Verdict"),
    ]
    parts = [
        "# Calibrated against the best of the other four",
        sentence(found),
        "Mean score over the phase's tasks, per cent. Difference: calibrated less the best of the other four, the mean "
        "over tasks of paired differences, with its 95 % bootstrap interval over samples, not corrected for the number "
        "of rows.",
        pipe_table(header, [_row(match) for match in found]),
    ]
    return "\n\n".join(parts) + "\n"


def sentence(found: Sequence[Match]) -> str:
    """How often calibrated is at least as good as the best of the other four."""
    verdicts = [match.verdict for match in found]
    beyond = [match.verdict for match in found if match.beyond_chance]
    return (
        f"In {len(found) - verdicts.count('worse than')} of {len(found)} places (model, phase and budget) calibrated "
        f"scores at least as much as the best of Early Exit, SkipDecode, Unified Skipping and AdaSkip: more in "
        f"{verdicts.count('better than')} ({beyond.count('better than')} beyond chance), the same in "
        f"{verdicts.count('equal to')}. It scores less in {verdicts.count('worse than')} "
        f"({beyond.count('worse than')} beyond chance)."
    )


def _row(match: Match) -> list[str]:
    gap = match.difference
    verdict = f"**{match.verdict}**" if match.verdict == "worse than" else match.verdict
    chance = ", beyond chance" if match.beyond_chance else ""
    return [
        *(labels.PHASES[match.phase], labels.budget(match.fraction), match.model),
        *(f"{match.means[name]:.1f}" for name in (*COMPARED, CALIBRATED)),
        f"{gap.value:+.1f}" + ("" if gap.low is None else f" [{gap.low:+.1f}, {gap.high:+.1f}]"),
        f"{verdict} {labels.STRATEGIES[match.best_other]}{chance}",
    ]
