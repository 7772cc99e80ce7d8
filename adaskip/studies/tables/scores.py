"""Scores a run once and keeps every sample's score beside its records, so that tables and plots never score again.

`scores.json` names the records and the metrics it was made from; when either has changed it is made anew. Scores are
fractions of 1, as the metrics return them; per cent is for printing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adaskip.benchmarks import metrics, scoring
from adaskip.benchmarks.scoring import BucketScore
from adaskip.common.files import write_text_atomic
from adaskip.common.intervals import Estimate, mean_estimate
from adaskip.studies.tables.runs import Run, TaskRecords

SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class SampleScores:
    """One metric over one task's records."""

    metric: str
    as_printed: float | None
    """Their mean as LongBench's eval.py prints it: per cent, two decimals; None if there are no samples."""
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
    """By the task's own metric, LongBench's."""
    rouge_score: SampleScores | None
    """By Google's `rouge_score` too; None for a task that is not scored by Rouge-L."""
    buckets: dict[str, BucketScore] | None
    """Of `main`, by LongBench-E's buckets of length; None for a set that is not LongBench-E's."""


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
    tasks = {name: score_task(records, run.is_extended(name)) for name, records in run.tasks.items()}
    scored = ScoredRun(run, tasks)
    write_text_atomic(path, _as_json(scored, made_from))
    return scored


def score_task(records: TaskRecords, is_extended: bool = False) -> ScoredTask:
    """Score one task's records by its own metric, and by `rouge_score` too where that is Rouge-L.

    is_extended: they are of a LongBench-E set, whose buckets are scored, too.
    """
    main = _score(records, None)
    return ScoredTask(
        records,
        main,
        _score(records, beside) if (beside := scoring.STANDARD_ROUGE.get(main.metric)) else None,
        _score_buckets(records, main) if is_extended else None,
    )


def _score_buckets(records: TaskRecords, main: SampleScores) -> dict[str, BucketScore]:
    if any("length" not in record for record in records.records):
        raise scoring.MetricError(f"a record of {records.task} has no 'length', so that it belongs to no bucket")
    return scoring.score_buckets(list(main.by_id.values()), [record["length"] for record in records.records])


def _score(records: TaskRecords, metric: str | None) -> SampleScores:
    score = scoring.score_samples(records.task, records.records, metric)
    by_id = dict(zip(records.by_id, score.per_sample, strict=True))
    return SampleScores(score.metric, score.score, by_id, score.num_empty, dict(score.errors))


def _made_from(run: Run) -> dict[str, Any]:
    """What the scores depend on: the records' bytes and the metrics' code."""
    return {"records": {name: records.sha256 for name, records in run.tasks.items()}, "metrics": _metrics_fingerprint()}


@cache
def _metrics_fingerprint() -> str:
    code = "".join(inspect.getsource(module) for module in (scoring, metrics))
    versions = [f"{package} {version(package)}" for package in ("rouge", "rouge_score")]
    return f"{hashlib.sha256(code.encode()).hexdigest()}, {', '.join(versions)}"


def _read_saved(path: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The saved tasks; None where there are none of these records by these metrics."""
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
