"""Scores a run and saves the scores of its samples beside the records, so that tables and plots need not score again.

`scores.json` has digests of the answers, the references, the full model's answers and the metrics; when any of them
changes, the run is scored again. Scores are fractions of 1; per cent is only for printing.
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
FORMAT = 2
"""Version of `scores.json`; bump it when the fields change."""


@dataclass(frozen=True)
class SampleScores:
    """The scores of a task's records by one metric."""

    metric: str
    as_printed: float | None
    """The mean in per cent, rounded to two decimals by the benchmark; None if there are no samples."""
    by_id: dict[str, float]
    num_empty: int
    """Number of predictions whose scored text is empty or white space."""
    errors: dict[str, int]
    """Number of samples that score 0 because the metric failed, by reason."""

    @cached_property
    def mean(self) -> Estimate | None:
        """None if there are no samples."""
        return mean_estimate(list(self.by_id.values()))


@dataclass(frozen=True)
class ScoredTask:
    """The scored records of a task in a run."""

    records: TaskRecords
    main: SampleScores
    """By the metric of the task."""
    rouge_score: SampleScores | None
    """By a second metric, e.g. Google's `rouge_score`; None if the task has none."""
    buckets: dict[str, BucketScore] | None
    """`main` by buckets of length; None if the set has none."""
    fidelity: dict[str, float]
    """By record id, against the full model's answer; without records that its run lacks."""
    floors: dict[str, float | None]
    """Mean scores of trivial answers, only in the full model's run; else empty."""


@dataclass(frozen=True)
class ScoredRun:
    """full: the full model's run of the same protocol, for comparison; None if there is none. notes: a line for each
    run that could not be compared or scored again."""

    run: Run
    full: Run | None
    tasks: dict[str, ScoredTask]
    notes: tuple[str, ...]


def score_run(run: Run, full: Run | None = None, *, data_dir: str | None = None, fresh: bool = False) -> ScoredRun:
    """Score every task of `run` and write `scores.json` into its folder.

    Args:
        full: the full model's run of the same model and phase, which may be `run`; None if there is none.
        data_dir: data of the benchmark, for floors that need contexts.
        fresh: score again even if the saved scores are up to date.

    Raises:
        ResultsError: the records have no references, and the saved scores are of other records.
    """
    notes = []
    if full is not None and (other := run.other_protocol(full)):
        notes.append(f"{run.cell.label}: not compared with {full.cell.label}, which has {other}")
        full = None
    path, made_from = run.folder / SCORES_FILE, _made_from(run, full)
    saved = _read_saved(path)
    if any(records.withheld for records in run.tasks.values()):
        notes += _check_withheld(run, saved.get("made_from", {}), made_from)
    elif (
        fresh or not made_from["metrics"] or saved.get("made_from") != made_from or _lacks_floors(run, saved, data_dir)
    ):
        tasks = {name: score_task(run, name, full, data_dir) for name in run.tasks}
        saved = {"run": run.cell.run_name, "sublayers": run.cell.sublayers, "unit": "fraction of 1"}
        saved |= {"made_from": made_from, "tasks": {name: _without_records(task) for name, task in tasks.items()}}
        text = json.dumps(saved, indent=1, ensure_ascii=False, allow_nan=False, default=asdict)
        write_text_atomic(path, text + "\n")
        saved = json.loads(text)
    tasks = {name: _from_saved(records, saved["tasks"][name]) for name, records in run.tasks.items()}
    return ScoredRun(run, full, tasks, (*notes, *_lacking(run, full, tasks)))


def score_task(run: Run, task: str, full: Run | None = None, data_dir: str | None = None) -> ScoredTask:
    """Score the records of a task by their benchmark, and against the answers of `full`."""
    records, benchmark = run.tasks[task], run.benchmark
    made = benchmark.evaluate(task, records.records, run.manifest)
    answers = {r["id"]: r["prediction"] for r in full.tasks[task].records} if full and task in full.tasks else {}
    fidelity = {
        name: benchmark.fidelity(task, record["prediction"], answers[name], **benchmark.kept_of(record))
        for name, record in records.by_id.items()
        if name in answers
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


def _without_records(task: ScoredTask) -> dict[str, Any]:
    return {name: value for name, value in vars(task).items() if name != "records"}


def _from_saved(records: TaskRecords, saved: dict[str, Any]) -> ScoredTask:
    beside, buckets = saved["rouge_score"], saved["buckets"]
    return ScoredTask(
        records,
        SampleScores(**saved["main"]),
        beside and SampleScores(**beside),
        buckets and {name: BucketScore(**bucket) for name, bucket in buckets.items()},
        saved["fidelity"],
        saved["floors"],
    )


def _lacking(run: Run, full: Run | None, tasks: dict[str, ScoredTask]) -> Iterator[str]:
    """Yield a line for each task of which the full model's run lacks records."""
    for name, task in tasks.items():
        if full is not None and len(task.fidelity) < (have := len(task.records.records)):
            yield (
                f"{run.cell.label}/{name}: compared with the full model over {len(task.fidelity)} of {have} "
                f"records; {full.cell.label} lacks the others"
            )


def _made_from(run: Run, full: Run | None) -> dict[str, Any]:
    """What the scores depend on; `metrics` is None if the benchmark has no version, so that runs are always scored."""
    version = run.benchmark.score_version()
    return {
        "format": FORMAT,
        "answers": {name: records.answers_sha256 for name, records in run.tasks.items()},
        "references": {name: records.references_sha256 for name, records in run.tasks.items()},
        "full": full and {name: task.answers_sha256 for name, task in full.tasks.items() if name in run.tasks},
        "metrics": version and f"{_floors_fingerprint()}, {version}",
    }


@cache
def _floors_fingerprint() -> str:
    return hashlib.sha256(inspect.getsource(floors_code).encode()).hexdigest()


def _read_saved(path: Path) -> dict[str, Any]:
    """The saved scores; empty if there are none, or the file is invalid."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return saved if isinstance(saved, dict) else {}


def _check_withheld(run: Run, held: dict[str, Any], made_from: dict[str, Any]) -> list[str]:
    """Check that saved scores are of these answers, since records without references cannot be scored; returns
    notes."""
    if any(held.get(name, "none") != made_from[name] for name in ("format", "answers", "full")):
        raise ResultsError(
            f"{run.folder}: the records have no references, and {SCORES_FILE} is not of these answers; copy the "
            f"{SCORES_FILE} that was made with the references there"
        )
    same = held["metrics"] == made_from["metrics"]
    return [] if same else [f"{run.cell.label}: scores of another version of the metrics; no references to score again"]


def _lacks_floors(run: Run, saved: dict[str, Any], data_dir: str | None) -> bool:
    """Whether a floor is missing that can be computed now."""
    lacks = (FIRST_SENTENCE not in task["floors"] for task in saved["tasks"].values() if task["main"]["by_id"])
    return run.cell.strategy == FULL and any(lacks) and knows_contexts(run, data_dir)
