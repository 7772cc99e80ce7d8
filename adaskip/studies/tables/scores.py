"""Scores a run once and keeps every sample's scores beside its records, so that tables and plots never score again.

`scores.json` names what it was made from: the run's answers and references, the full model's answers, and the metrics.
When any has changed it is made anew. Scores are fractions of 1, as the metrics return them; per cent is for printing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from adaskip.benchmarks.scores import BucketScore, TaskScore
from adaskip.common.files import write_text_atomic
from adaskip.common.intervals import Estimate, mean_estimate
from adaskip.strategies.registry import FULL
from adaskip.studies.tables import floors as floors_code
from adaskip.studies.tables.floors import FIRST_SENTENCE, floors, knows_contexts
from adaskip.studies.tables.runs import ResultsError, Run, TaskRecords

SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class SampleScores:
    """One metric over one task's records."""

    metric: str
    as_printed: float | None
    """Their mean: per cent, two decimals, as the benchmark rounds it; None if there are no samples."""
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
    """By a second metric, too, as Google's `rouge_score`; None for a task that has none."""
    buckets: dict[str, BucketScore] | None
    """Of `main`, by buckets of length; None for a set that has none."""
    fidelity: dict[str, float]
    """By record id, against the full model's answer; without those that the full model's run lacks."""
    floors: dict[str, float | None]
    """Of the full model's run, mean scores of trivial answers; else empty."""


@dataclass(frozen=True)
class ScoredRun:
    """full: the full model's run that it is compared with, by the same protocol; None if there is none."""

    run: Run
    full: Run | None
    tasks: dict[str, ScoredTask]
    notes: tuple[str, ...] = ()
    """What could not be compared or made anew, a line each."""


def score_run(run: Run, full: Run | None = None, *, data_dir: str | None = None, fresh: bool = False) -> ScoredRun:
    """Score every task of `run` and write `scores.json` into its folder.

    Args:
        full: the full model's run of the same model and phase, `run` itself if it is that; None if there is none.
        data_dir: the benchmark's data, for floors that need contexts.
        fresh: score again even where the saved scores are of these records by these metrics.

    Raises:
        ResultsError: the records hold no references, and the saved scores are not of these records.
    """
    notes = []
    if full is not None and (other := run.other_protocol(full)):
        notes.append(f"{run.cell.label}: not compared with {full.cell.label}, which has {other}")
        full = None
    path, made_from = run.folder / SCORES_FILE, _made_from(run, full)
    saved = _read_saved(path)
    if any(records.withheld for records in run.tasks.values()):
        notes += _check_withheld(run, saved, made_from)
    elif fresh or not _is_of(saved, made_from) or _lacks_floors(run, saved, data_dir):
        tasks = {name: score_task(run, name, full, data_dir) for name in run.tasks}
        write_text_atomic(path, _as_json(run, tasks, made_from))
        saved = _read_saved(path)
    assert saved is not None, "made or checked above"
    tasks = {name: _from_saved(records, saved["tasks"][name]) for name, records in run.tasks.items()}
    return ScoredRun(run, full, tasks, (*notes, *_lacking(run, full, tasks)))


def score_task(run: Run, task: str, full: Run | None = None, data_dir: str | None = None) -> ScoredTask:
    """Score one task's records as their benchmark does, and against the answers of `full`."""
    records = run.tasks[task]
    made = run.benchmark.evaluate(task, records.records, run.manifest)
    theirs = full.tasks.get(task) if full else None
    answers = {record["id"]: record["prediction"] for record in theirs.records} if theirs else {}
    fidelity = {
        record["id"]: run.benchmark.fidelity(
            task, record["prediction"], answers[record["id"]], **run.benchmark.kept_of(record)
        )
        for record in records.records
        if record["id"] in answers
    }
    return ScoredTask(
        records,
        _by_id(records, made.main),
        made.beside and _by_id(records, made.beside),
        made.buckets,
        fidelity,
        floors(run, task, data_dir) if run.cell.strategy == FULL else {},
    )


def _by_id(records: TaskRecords, score: TaskScore) -> SampleScores:
    by_id = dict(zip(records.by_id, score.per_sample, strict=True))
    return SampleScores(score.metric, score.score, by_id, score.num_empty, dict(score.errors))


def _lacking(run: Run, full: Run | None, tasks: dict[str, ScoredTask]) -> Iterator[str]:
    """A line for each task of which the full model's run lacks records."""
    for name, task in tasks.items():
        if full is not None and len(task.fidelity) < (have := len(task.records.records)):
            yield (
                f"{run.cell.label}/{name}: compared with the full model over {len(task.fidelity)} of {have} "
                f"records; {full.cell.label} lacks the others"
            )


def _made_from(run: Run, full: Run | None) -> dict[str, Any]:
    """What the scores depend on; `metrics` is None where that is not known."""
    version = run.benchmark.score_version()
    return {
        "answers": {name: records.answers_sha256 for name, records in run.tasks.items()},
        "references": {name: records.references_sha256 for name, records in run.tasks.items()},
        "full": full and {name: task.answers_sha256 for name, task in full.tasks.items() if name in run.tasks},
        "metrics": version and f"{_floors_fingerprint()}, {version}",
    }


@cache
def _floors_fingerprint() -> str:
    return hashlib.sha256(inspect.getsource(floors_code).encode()).hexdigest()


def _read_saved(path: Path) -> dict[str, Any] | None:
    """The saved scores; None where there are none, or torn ones."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return saved if isinstance(saved, dict) and isinstance(saved.get("made_from"), dict) else None


def _is_of(saved: dict[str, Any] | None, made_from: dict[str, Any]) -> bool:
    return saved is not None and saved["made_from"] == made_from and made_from["metrics"] is not None


def _check_withheld(run: Run, saved: dict[str, Any] | None, made_from: dict[str, Any]) -> list[str]:
    """Records without references cannot be scored: only scores of these very answers will do."""
    held = saved["made_from"] if saved else {}
    for name in ("answers", "full"):
        if held.get(name) != made_from[name]:
            raise ResultsError(
                f"{run.folder}: the records hold no references, and {SCORES_FILE} is not of these answers; "
                f"put the {SCORES_FILE} there that was made with the references"
            )
    if held["metrics"] != made_from["metrics"]:
        return [f"{run.cell.label}: scores of another version of the metrics; its records hold no references"]
    return []


def _lacks_floors(run: Run, saved: dict[str, Any], data_dir: str | None) -> bool:
    """Whether a floor is missing that can be computed now."""
    if run.cell.strategy != FULL or not knows_contexts(run, data_dir):
        return False
    return any(FIRST_SENTENCE not in task["floors"] for task in saved["tasks"].values() if task["n"])


def _from_saved(records: TaskRecords, saved: dict[str, Any]) -> ScoredTask:
    main, beside = (
        SampleScores(part["metric"], part["as_printed"], part["by_id"], part["num_empty"], part["errors"])
        if part
        else None
        for part in (saved["main"], saved["rouge_score"])
    )
    assert main is not None, "every scored task has a score by its own metric"
    buckets = saved["buckets"] and {name: BucketScore(**bucket) for name, bucket in saved["buckets"].items()}
    return ScoredTask(records, main, beside, buckets, saved["fidelity"], saved["floors"])


def _as_json(run: Run, tasks: dict[str, ScoredTask], made_from: dict[str, Any]) -> str:
    content = {
        "run": run.cell.run_name,
        "sublayers": run.cell.sublayers,
        "unit": "fraction of 1",
        "made_from": made_from,
        "tasks": {name: _task_as_dict(task) for name, task in tasks.items()},
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
        "fidelity": task.fidelity,
        "floors": task.floors,
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
