"""Every scored run, found as the paper's tables arrange them: by phase, model, strategy, fraction skipped and task.

Ours and the paper's meet here: a budget is the fraction of the sublayers skipped, so that 4 of 32 stand beside 8 of 64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from adaskip.common.intervals import Estimate, ratio_estimate
from adaskip.core.plan import PHASES
from adaskip.strategies.names import GRID_STRATEGIES, PAPER_STRATEGIES, SHORT_NAMES
from adaskip.studies.tables.paper import Paper, load_paper, unpublished
from adaskip.studies.tables.runs import load_runs
from adaskip.studies.tables.scores import ScoredRun, ScoredTask, score_run

COMPARED = PAPER_STRATEGIES[1:]
"""The four strategies that the paper compares."""
PAPER_FRACTIONS = (0.125, 0.1875, 0.25)
"""The paper's budgets (it prints scores for the first and the last): always shown, run or not."""


@dataclass(frozen=True)
class Row:
    """One row of the tables."""

    phase: str
    model: str
    strategy: str
    fraction: float

    @property
    def full(self) -> Row:
        """The full model's row, which this one is measured against."""
        return replace(self, strategy="full", fraction=0.0)


class Scoreboard:
    """Scored runs beside the paper's numbers."""

    def __init__(self, runs: Iterable[ScoredRun]):
        self.runs = {
            Row(scored.run.cell.phase, scored.run.cell.model, scored.run.cell.strategy, scored.run.fraction): scored
            for scored in runs
        }
        self.paper = self._papers()

    def _papers(self) -> Paper:
        """The paper's tables; if all runs are of a benchmark that it does not speak of, empty ones of their tasks."""
        benchmarks = {scored.run.benchmark.name: scored.run.benchmark for scored in self.runs.values()}
        if not benchmarks or any(benchmark.in_paper for benchmark in benchmarks.values()):
            return load_paper()
        metrics: dict[str, dict[str, str]] = {}
        for row, scored in self.runs.items():
            metrics.setdefault(row.phase, {}).update({name: task.main.metric for name, task in scored.tasks.items()})
        ordered = {phase: metrics[phase] for phase in PHASES if phase in metrics}
        return unpublished(" and ".join(benchmarks), ordered)

    @cached_property
    def models(self) -> list[str]:
        """The paper's models, then any other that was run."""
        return list(dict.fromkeys([*self.paper.models, *(row.model for row in self.runs)]))

    @cached_property
    def skipping(self) -> tuple[str, ...]:
        """The strategies with rows in the tables: those of the grid, run or not, and every other one that was run."""
        run = {row.strategy for row in self.runs} - {"full", *GRID_STRATEGIES}
        return (*GRID_STRATEGIES[1:], *(name for name in SHORT_NAMES if name in run))

    @cached_property
    def fractions(self) -> list[float]:
        """The paper's budgets and every other one that was run, smallest first."""
        return sorted({*PAPER_FRACTIONS, *(row.fraction for row in self.runs if row.strategy in self.skipping)})

    def tasks(self, phase: str) -> list[str]:
        """The columns of the phase's table."""
        return self.paper.tables[phase].tasks

    def rows(self, phase: str, model: str) -> Iterator[Row]:
        """The full model, then every strategy at every budget."""
        yield Row(phase, model, "full", 0.0)
        for fraction in self.fractions:
            for strategy in self.skipping:
                yield Row(phase, model, strategy, fraction)

    def scored(self, row: Row, task: str) -> ScoredTask | None:
        """One cell's scores; None where it was not run or has no sample yet."""
        run = self.runs.get(row)
        found = run.tasks.get(task) if run else None
        return found if found is not None and found.main.by_id else None

    def retention(self, row: Row, task: str) -> Estimate | None:
        """Score / full model's score over the samples that both have; None where either is missing."""
        ours, full = self.scored(row, task), self.scored(row.full, task)
        if ours is None or full is None:
            return None
        pairs = [(score, full.main.by_id[name]) for name, score in ours.main.by_id.items() if name in full.main.by_id]
        return ratio_estimate([mine for mine, _ in pairs], [theirs for _, theirs in pairs])


def load_scoreboard(runs_dir: str | Path, *, jobs: int = 1, progress: bool = False) -> Scoreboard:
    """Read every run below `runs_dir`, scoring those whose scores are not saved yet.

    Args:
        jobs: processes that score; more than one need a caller that guards `__main__`.
        progress: draw a progress bar if standard error is a terminal.
    """
    runs = load_runs(runs_dir)
    bar = partial(tqdm, total=len(runs), desc="scoring", unit="run", disable=None if progress else True, leave=False)
    if jobs == 1 or len(runs) == 1:
        return Scoreboard(bar(map(score_run, runs)))
    with ProcessPoolExecutor(min(jobs, len(runs)), mp_context=get_context("spawn")) as pool:
        return Scoreboard(bar(pool.map(score_run, runs)))
