"""All scored runs as two tidy frames: `samples`, a row per record, and `cells`, a row per cell of the paper's tables.

A budget is the fraction of skipped sublayers, so that 4 of 32 are compared with 8 of the paper's 64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from adaskip.benchmarks.protocol import Benchmark
from adaskip.common.intervals import Estimate, mean_estimate, ratio_estimate
from adaskip.strategies.names import GRID_STRATEGIES, PAPER_STRATEGIES, SHORT_NAMES
from adaskip.strategies.registry import FULL
from adaskip.studies.tables.paper import load_paper
from adaskip.studies.tables.runs import load_runs
from adaskip.studies.tables.scores import ScoredRun, score_run

OURS = "adaskip"
COMPARED = PAPER_STRATEGIES[1:]
"""The four strategies that the paper compares."""
PAPER_FRACTIONS = (0.125, 0.1875, 0.25)
"""The paper's budgets (it has scores for the first and the last), always shown for its models."""
ROW = ["phase", "model", "strategy", "fraction"]
"""Columns that identify a row of the tables."""
PLACE = ["phase", "model", "fraction", "task"]
"""Columns that identify a cell, in which strategies are compared."""
MEASURED = ("score", "rouge_score", "fidelity", "loss")
SAMPLE = ("task", "id", *MEASURED, "new_tokens", "added_online", "compared")
COUNTS = ("skipped_sublayers", "num_sublayers", "n", "n_expected")
RUNS_PER_PROCESS = 8
"""Least number of runs for each scoring process, which takes some seconds to start."""
PAPERS = ("paper_score", "paper_retention", "paper_speedup")
ESTIMATES = (*MEASURED, "loss_added", "retention")
Row = tuple[str, str, str, float]
"""Phase, model, strategy, fraction."""


@dataclass(frozen=True)
class Measure:
    """A measure of answers, in the column `name`. scale: for printing, 100 for per cent. sign: -1 if lower is
    better."""

    name: str
    scale: float
    sign: int


SCORE, FIDELITY, LOSS = MEASURES = Measure("score", 100, 1), Measure("fidelity", 100, 1), Measure("loss", 1, -1)


class Results:
    """Scored runs beside the paper's numbers. runs: by phase, model, strategy and fraction."""

    def __init__(self, runs: Iterable[ScoredRun]):
        self.runs = {
            (scored.run.cell.phase, scored.run.cell.model, scored.run.cell.strategy, scored.run.fraction): scored
            for scored in runs
        }
        self.paper = load_paper(publishes=not self.runs or any(benchmark.in_paper for benchmark in self.benchmarks))

    @property
    def benchmarks(self) -> list[Benchmark]:
        """The benchmarks that were run."""
        return [*{scored.run.benchmark.name: scored.run.benchmark for scored in self.runs.values()}.values()]

    @cached_property
    def notes(self) -> list[str]:
        """A line for each run that cannot be compared."""
        alone = {row[:2] for row in self.runs} - {row[:2] for row in self.runs if row[2] == FULL}
        lines = [f"no run of the full model {model} in phase {phase}: no comparison" for phase, model in sorted(alone)]
        lines += [line for scored in self.runs.values() for line in scored.notes]
        return lines + [line for pair in self._pairs() for line in self._differences(*pair)]

    def _pairs(self) -> Iterator[tuple[Row, Row]]:
        """AdaSkip's and each other run of a model, phase and budget."""
        for row in self.runs:
            ours = (*row[:2], OURS, row[3])
            if row != ours and ours in self.runs:
                yield row, ours

    def _differences(self, row: Row, ours: Row) -> Iterator[str]:
        """Why two runs are not compared, or only on some of their samples."""
        label, other = (self.runs[each].run.cell.label for each in (row, ours))
        if different := self.other_protocol(row, ours):
            yield f"{label}: not compared with {other}, which has {different}"
            return
        for task in [task for task in self.runs[row].tasks if task in self.runs[ours].tasks]:
            both = [self.runs[each].tasks[task].records for each in (row, ours)]
            mine, theirs = ({*records.by_id} for records in both)
            if mine != theirs and all(records.complete for records in both):
                yield (
                    f"{label}: compared with {other} on the {len(mine & theirs)} samples of {task} that both have, of "
                    f"{len(mine)} and {len(theirs)}"
                )

    def other_protocol(self, row: Row, other: Row) -> str | None:
        """The protocol field in which two runs differ, with both values; None if they can be compared."""
        return self.runs[row].run.other_protocol(self.runs[other].run)

    @cached_property
    def models(self) -> list[str]:
        """The paper's models if any of them was run, then all others that were run."""
        run = list(dict.fromkeys(model for _, model, _, _ in self.runs))
        papers = list(self.paper.models) if set(run) & set(self.paper.models) else []
        return list(dict.fromkeys([*papers, *run]))

    @property
    def paper_models(self) -> list[str]:
        """The models that the paper has."""
        return [model for model in self.models if model in self.paper.models]

    @cached_property
    def skipping(self) -> tuple[str, ...]:
        """The strategies in the tables: those of the grid, and all others that were run."""
        run = {strategy for _, _, strategy, _ in self.runs} - set(GRID_STRATEGIES)
        return (*GRID_STRATEGIES[1:], *(name for name in SHORT_NAMES if name in run))

    def fractions(self, model: str | None = None) -> list[float]:
        """The budgets of a model, or of all, smallest first: those that were run and, for its models, the paper's."""
        models = self.models if model is None else [model]
        run = {fraction for _, name, strategy, fraction in self.runs if name in models and strategy != FULL}
        return sorted(run | (set(PAPER_FRACTIONS) if set(models) & set(self.paper.models) else set()))

    def tasks(self, phase: str) -> list[str]:
        """The tasks in the table of a phase: the paper's and all others that were run; without a run of the paper's
        models only those that were run."""
        run = dict.fromkeys(
            task for (where, *_), scored in self.runs.items() if where == phase for task in scored.tasks
        )
        papers = self.paper.tables[phase].tasks
        shown = papers if self.paper_models or not run else [task for task in papers if task in run]
        return [*shown, *(task for task in run if task not in papers)]

    @cached_property
    def phases(self) -> list[str]:
        """The phases with tables: all, or those that were run of a benchmark that the paper does not have."""
        return [phase for phase in self.paper.tables if self.tasks(phase)]

    def rows(self, phase: str, model: str) -> Iterator[Row]:
        """The full model, then every strategy at every budget."""
        yield phase, model, FULL, 0.0
        for fraction in self.fractions(model):
            for strategy in self.skipping:
                yield phase, model, strategy, fraction

    @cached_property
    def samples(self) -> pd.DataFrame:
        """A row per record: scores and fidelity as fractions of 1, loss in nats per token, NaN if unknown.

        `full_score` and `full_loss` are those of the full model on the same sample, NaN if its run cannot be compared;
        `loss_added` is the loss minus the full model's.
        """
        lines = [line for row, scored in self.runs.items() for line in _sample_lines(row, scored)]
        samples = pd.DataFrame(lines, columns=[*ROW, *SAMPLE]).astype(dict.fromkeys(MEASURED, float))
        full = samples.loc[samples["strategy"] == FULL, ["phase", "model", "task", "id", "score", "loss"]]
        full = full.rename(columns={"score": "full_score", "loss": "full_loss"})
        samples = samples.merge(full, how="left", on=["phase", "model", "task", "id"])
        samples.loc[~samples.pop("compared").astype(bool), ["full_score", "full_loss"]] = math.nan
        return samples.assign(loss_added=samples["loss"] - samples["full_loss"])

    @cached_property
    def samples_of(self) -> dict[tuple, pd.DataFrame]:
        """`samples` by phase, model, strategy, fraction and task, indexed by id."""
        return dict(iter(self.samples.set_index("id").groupby([*ROW, "task"], sort=False)))

    @cached_property
    def floors(self) -> pd.DataFrame:
        """A row per trivial answer (`baseline`) to a task, with its mean `score`, NaN if unknown."""
        lines = [
            (phase, model, task, baseline, score)
            for (phase, model, _, _), scored in self.runs.items()
            for task, scores in scored.tasks.items()
            for baseline, score in scores.floors.items()
        ]
        return pd.DataFrame(lines, columns=["phase", "model", "task", "baseline", "score"]).astype({"score": float})

    @cached_property
    def cells(self) -> pd.DataFrame:
        """A row per cell in the order of the tables, run or not: estimates with `_low` and `_high`, and the paper's
        numbers.

        Our scores, retention and fidelity are fractions of 1, the paper's scores per cent, as printed. `floor` is the
        best score of a trivial answer; `at_floor`: the full model's interval, if it has one, includes it. `final`: the
        run is finished.
        """
        cells = pd.DataFrame(
            self._cell(row, task, self.samples_of.get((*row, task)))
            for phase in self.paper.tables
            for model in self.models
            for row in self.rows(phase, model)
            for task in self.tasks(phase)
        ).astype(dict.fromkeys(COUNTS, "Int64") | dict.fromkeys(PAPERS, float))
        place = ["phase", "model", "task"]
        floor = self.floors.groupby(place)["score"].max().rename("floor")
        full_low = cells[cells["strategy"] == FULL].set_index(place)["score_low"].rename("full_low")
        cells = cells.join(floor, on=place).join(full_low, on=place)
        full_low = cells.pop("full_low")
        cells["at_floor"] = cells["floor"].notna() & full_low.notna() & ~(full_low > cells["floor"])
        return cells

    @cached_property
    def cell_of(self) -> dict[tuple, Any]:
        """The rows of `cells` by phase, model, strategy, fraction and task."""
        return {(*(getattr(cell, name) for name in ROW), cell.task): cell for cell in self.cells.itertuples()}

    def _cell(self, row: Row, task: str, samples: pd.DataFrame | None) -> dict[str, Any]:
        phase, model, strategy, fraction = row
        paper, scored = self.paper.tables[phase], self.runs.get(row)
        found = scored.tasks[task] if scored and samples is not None else None
        place = (model, strategy, fraction, task)
        return {
            **dict(zip(ROW, row, strict=True)),
            "skipped_sublayers": scored.run.cell.sublayers if scored else None,
            "num_sublayers": 2 * scored.run.num_layers if scored else None,
            "task": task,
            "metric": self.metric(phase, task),
            "n": len(found.records.records) if found else None,
            "n_expected": found.records.expected if found else None,
            "final": found is not None and found.records.complete,
            **_estimates(samples),
            "paper_score": paper.score(*place),
            "paper_retention": paper.retention(*place),
            "paper_speedup": paper.speedup(model, strategy, fraction),
        }

    def metric(self, phase: str, task: str) -> str:
        """The paper's name of a task's metric; ours if it has no such task."""
        ours = (scored.tasks[task].main.metric for scored in self.runs.values() if task in scored.tasks)
        return self.paper.tables[phase].metrics.get(task) or next(ours)


def _sample_lines(row: Row, scored: ScoredRun) -> Iterator[tuple[Any, ...]]:
    """The values of `ROW` and `SAMPLE` of each record."""
    for task, scores in scored.tasks.items():
        rouge = scores.rouge_score.by_id if scores.rouge_score else {}
        for name, record in scores.records.by_id.items():
            measured = (
                scores.main.by_id[name],
                rouge.get(name),
                scores.fidelity.get(name),
                record.get("reference_loss"),
            )
            counts = (record.get("new_tokens"), len(record.get("online_ffns", ())))
            yield *row, task, name, *measured, *counts, scored.full is not None


def _estimates(samples: pd.DataFrame | None) -> dict[str, float]:
    """Value, low and high of each estimate; NaN if unknown."""
    found: dict[str, Estimate | None] = dict.fromkeys(ESTIMATES)
    if samples is not None:
        found = {name: mean_estimate([*samples[name].dropna()]) for name in (*MEASURED, "loss_added")}
        paired = samples[samples["full_score"].notna()]
        found["retention"] = ratio_estimate([*paired["score"]], [*paired["full_score"]])
    return {
        name + end: math.nan if (value := getattr(estimate, part, None)) is None else value
        for name, estimate in found.items()
        for end, part in (("", "value"), ("_low", "low"), ("_high", "high"))
    }


def estimate(cell: Any, name: str) -> Estimate | None:
    """An estimate of a cell, a row of `Results.cells` from `itertuples`; None if unknown."""
    value, low, high = (getattr(cell, name + end) for end in ("", "_low", "_high"))
    return None if math.isnan(value) else Estimate(value, *(None if math.isnan(end) else end for end in (low, high)))


def load_results(
    runs_dir: str | Path, *, jobs: int = 1, progress: bool = False, data_dir: str | None = None
) -> Results:
    """Read all runs in `runs_dir`; runs without saved scores are scored.

    Args:
        jobs: largest number of scoring processes; more than one need a caller that guards `__main__`.
        progress: draw a progress bar if standard error is a terminal.
        data_dir: data of the benchmark, for floors that need contexts.

    Raises:
        ValueError: there are no runs, or a manifest cannot be read.
    """
    runs = load_runs(runs_dir)
    full = {(run.cell.model, run.cell.phase): run for run in runs if run.cell.strategy == FULL}
    fulls = [full.get((run.cell.model, run.cell.phase)) for run in runs]
    score = partial(score_run, data_dir=data_dir)
    bar = partial(tqdm, total=len(runs), desc="scoring", unit="run", disable=None if progress else True, leave=False)
    jobs = min(jobs, len(runs) // RUNS_PER_PROCESS)
    if jobs < 2:
        return Results(bar(map(score, runs, fulls)))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return Results(bar(pool.map(score, runs, fulls)))
