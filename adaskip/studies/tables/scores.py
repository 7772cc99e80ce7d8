"""Scores a run once and keeps every sample's score beside its records, so that tables and plots never score again.

`scores.json` names the records and the metrics it was made from; when either has changed it is made anew. Scores are
fractions of 1, as the metrics return them; per cent is for printing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adaskip.benchmarks.scores import BucketScore, TaskScore
from adaskip.common.files import write_text_atomic
from adaskip.common.intervals import Estimate, mean_estimate
from adaskip.studies.tables.runs import Run, TaskRecords

SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class SampleScores:
    """One metric over one task's records."""

    metric: str
    as_printed: float | None
    """Their mean: per cent, two decimals, rounded as LongBench's eval.py does; None if there are no samples."""
    by_id: dict[str, float]
    num_empty: int
    """Predictions of which nothing but white space was scored."""
    errors: dict[str, int]
    """Samples that score 0 because the metric failed on them, by reason."""

    @cached_property
    def mean(self) -> Estimate | None:
        """None if there are no samples."""
        return mean_estimate(list(self.by_id.values()))


@dataclass(frozen=True)
class ScoredTask:
    """One task's records in one run, scored."""

    records: TaskRecords
    main: SampleScores
    """By the task's own metric."""
    rouge_score: SampleScores | None
    """By a second metric, too, of LongBench Google's `rouge_score`; None for a task that has none."""
    buckets: dict[str, BucketScore] | None
    """Of `main`, by buckets of length; None for a set that has none."""


@dataclass(frozen=True)
class ScoredRun:
    run: Run
    tasks: dict[str, ScoredTask]


def score_run(run: Run, *, fresh: bool = False) -> ScoredRun:
    """Score every task of `run` and write `scores.json` into its folder.

    Args:
        fresh: score again even where the saved scores are of these records by these metrics.
    """
    path, made_from = run.folder / SCORES_FILE, _made_from(run)
    saved = None if fresh else _read_saved(path, made_from)
    if saved is not None:
        return ScoredRun(run, {name: _from_saved(records, saved[name]) for name, records in run.tasks.items()})
    tasks = {name: _score_task(run, records) for name, records in run.tasks.items()}
    scored = ScoredRun(run, tasks)
    write_text_atomic(path, _as_json(scored, made_from))
    return scored


def _score_task(run: Run, records: TaskRecords) -> ScoredTask:
    made = run.benchmark.evaluate(records.task, records.records, run.manifest)
    return ScoredTask(records, _by_id(records, made.main), made.beside and _by_id(records, made.beside), made.buckets)


def _by_id(records: TaskRecords, score: TaskScore) -> SampleScores:
    by_id = dict(zip(records.by_id, score.per_sample, strict=True))
    return SampleScores(score.metric, score.score, by_id, score.num_empty, dict(score.errors))


def _made_from(run: Run) -> dict[str, Any]:
    """What the scores depend on: the records' bytes and the metrics' code."""
    records = {name: records.sha256 for name, records in run.tasks.items()}
    return {"records": records, "metrics": run.benchmark.score_version()}


def _read_saved(path: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The saved tasks; None where there are none of these records by these metrics, or nobody knows whether."""
    if made_from["metrics"] is None:
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return saved["tasks"] if isinstance(saved, dict) and saved.get("made_from") == made_from else None


def _from_saved(records: TaskRecords, saved: dict[str, Any]) -> ScoredTask:
    main, beside = (
        SampleScores(part["metric"], part["as_printed"], part["by_id"], part["num_empty"], part["errors"])
        if part
        else None
        for part in (saved["main"], saved["rouge_score"])
    )
    assert main is not None, "every scored task has a score by its own metric"
    buckets = saved["buckets"] and {name: BucketScore(**bucket) for name, bucket in saved["buckets"].items()}
    return ScoredTask(records, main, beside, buckets)


def _as_json(scored: ScoredRun, made_from: dict[str, Any]) -> str:
    content = {
        "run": scored.run.cell.run_name,
        "sublayers": scored.run.cell.sublayers,
        "unit": "fraction of 1",
        "made_from": made_from,
        "tasks": {name: _task_as_dict(task) for name, task in scored.tasks.items()},
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _task_as_dict(task: ScoredTask) -> dict[str, Any]:
    return {
        "n": len(task.records.records),
        "expected": task.records.expected,
        "complete": task.records.complete,
        "problems": task.records.problems,
        "main": _scores_as_dict(task.main),
        "rouge_score": _scores_as_dict(task.rouge_score) if task.rouge_score else None,
        "buckets": task.buckets and {name: asdict(bucket) for name, bucket in task.buckets.items()},
    }


def _scores_as_dict(scores: SampleScores) -> dict[str, Any]:
    return {
        "metric": scores.metric,
        "as_printed": scores.as_printed,
        "mean": asdict(scores.mean) if scores.mean else None,
        "num_empty": scores.num_empty,
        "errors": scores.errors,
        "by_id": scores.by_id,
    }
