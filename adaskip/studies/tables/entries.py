"""The tables' cells with everything that is shown of them, and the CSV that holds it all."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from functools import cached_property

from adaskip.common.intervals import Estimate
from adaskip.studies.tables.paper import PaperTable
from adaskip.studies.tables.scoreboard import COMPARED, Row, Scoreboard
from adaskip.studies.tables.scores import ScoredTask


@dataclass(frozen=True)
class Entry:
    """One cell, ours beside the paper's. What was not run, or not published, is None."""

    row: Row
    task: str
    metric: str
    scored: ScoredTask | None
    retention: Estimate | None
    paper_score: float | None
    """Per cent, as printed."""
    paper_retention: float | None

    @cached_property
    def score(self) -> Estimate | None:
        return self.scored.main.mean if self.scored else None

    @cached_property
    def rouge_score(self) -> Estimate | None:
        return self.scored.rouge_score.mean if self.scored and self.scored.rouge_score else None

    @property
    def final_score(self) -> float | None:
        """Per cent; None unless the run has come to its end."""
        return None if self.score is None or self.partial else round(100 * self.score.value, 6)

    @property
    def final_retention(self) -> float | None:
        return None if self.retention is None or self.partial else self.retention.value

    @property
    def partial(self) -> bool:
        """Scored, but not over every sample that the run should have."""
        return self.scored is not None and not self.scored.records.complete


@dataclass(frozen=True)
class PhaseEntries:
    """One phase's table."""

    board: Scoreboard
    phase: str

    @property
    def paper(self) -> PaperTable:
        """What the paper has published of it."""
        return self.board.paper.tables[self.phase]

    @property
    def tasks(self) -> list[str]:
        return self.board.tasks(self.phase)

    @cached_property
    def cells(self) -> dict[tuple[Row, str], Entry]:
        return {
            (row, task): self._entry(row, task)
            for model in self.board.models
            for row in self.board.rows(self.phase, model)
            for task in self.tasks
        }

    @cached_property
    def subsets(self) -> str | None:
        """One sentence if any run here is over a random subset of the samples."""
        manifests = [scored.run.manifest for row, scored in self.board.runs.items() if row.phase == self.phase]
        draws = {(each["subset"], each["seed"]) for each in manifests if each.get("subset")}
        if not draws:
            return None
        sizes = " / ".join(f"{size} samples a task (seed {seed})" for size, seed in sorted(draws))
        return (
            f"Scores and intervals are of a random subset of {sizes}, the same for every strategy, not of all samples."
        )

    def group(self, model: str, fraction: float, task: str) -> dict[str, Entry]:
        """The four strategies that compete in one cell of the paper's tables."""
        return {name: self.cells[Row(self.phase, model, name, fraction), task] for name in COMPARED}

    def best(self, entry: Entry) -> bool:
        """Whether no other strategy scores higher; False until all four have run to their end."""
        return _is_best(entry.final_score, [other.final_score for other in self._group_of(entry)])

    def paper_best(self, entry: Entry) -> bool:
        """The same of the paper's numbers."""
        return _is_best(entry.paper_score, [other.paper_score for other in self._group_of(entry)])

    def _group_of(self, entry: Entry) -> list[Entry]:
        """The entries that `entry` competes with, itself among them; none for the full model."""
        if entry.row.strategy not in COMPARED:
            return []
        return list(self.group(entry.row.model, entry.row.fraction, entry.task).values())

    def _entry(self, row: Row, task: str) -> Entry:
        paper = self.paper
        cell = (row.model, row.strategy, row.fraction, task)
        return Entry(
            row=row,
            task=task,
            metric=paper.metrics[task],
            scored=self.board.scored(row, task),
            retention=self.board.retention(row, task),
            paper_score=paper.score(*cell),
            paper_retention=paper.retention(*cell),
        )


def _is_best(value: float | None, group: list[float | None]) -> bool:
    return bool(group) and value is not None and all(other is not None and other <= value for other in group)


def to_csv(table: PhaseEntries) -> str:
    """One line per cell; scores and retention in per cent; empty where not run or not published."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, fieldnames=list(_csv_line(table, next(iter(table.cells.values())))), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(_csv_line(table, entry) for entry in table.cells.values())
    return text.getvalue()


def _csv_line(table: PhaseEntries, entry: Entry) -> dict[str, object]:
    row, run = entry.row, table.board.runs.get(entry.row)
    return {
        "phase": row.phase,
        "model": row.model,
        "strategy": row.strategy,
        "fraction_skipped": row.fraction,
        "skipped_sublayers": run.run.cell.sublayers if run else None,
        "num_sublayers": 2 * run.run.num_layers if run else None,
        "task": entry.task,
        "metric": entry.metric,
        "n": len(entry.scored.main.by_id) if entry.scored else None,
        "n_expected": entry.scored.records.expected if entry.scored else None,
        **_columns("score", entry.score),
        **_columns("rouge_score", entry.rouge_score),
        **_columns("retention", entry.retention),
        "paper_score": entry.paper_score,
        "paper_retention": _rounded(entry.paper_retention, 100),
        "paper_speedup": table.board.paper.tables[row.phase].speedup(row.model, row.strategy, row.fraction),
    }


def _columns(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    value, low, high = (estimate.value, estimate.low, estimate.high) if estimate else (None, None, None)
    return {name: _rounded(value, 100), f"{name}_low": _rounded(low, 100), f"{name}_high": _rounded(high, 100)}


def _rounded(value: float | None, scale: float = 1) -> float | None:
    return None if value is None else round(scale * value, 3)
