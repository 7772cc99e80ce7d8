"""Scores of samples and sets of samples, equal to LongBench's `eval.py` to the last digit, and what it keeps silent.

The original scores 0 where a metric fails, gives NaN for an empty bucket and never says that predictions were empty.
Here those are counted (`TaskScore.errors`, `num_empty`) and an empty set has no score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adaskip.benchmarks.longbench import get_task
from adaskip.benchmarks.metrics import METRICS, STANDARD_ROUGE, Metric, MetricError, ScoredZero

__all__ = [
    "BUCKETS",
    "METRICS",
    "STANDARD_ROUGE",
    "BucketScore",
    "MetricError",
    "SampleScore",
    "TaskScore",
    "sample_score",
    "score_buckets",
    "score_sample",
    "score_samples",
]

BUCKETS: dict[str, tuple[float, float]] = {"0-4k": (0, 4000), "4-8k": (4000, 8000), "8k+": (8000, float("inf"))}
"""LongBench-E's buckets of `length` in words: lower bound in, upper bound out."""


@dataclass(frozen=True)
class SampleScore:
    """One sample: the best score over its references, in [0, 1], and what went wrong on the way."""

    score: float
    is_empty: bool
    """Nothing but white space was scored."""
    error: str | None
    """Why a reference scored 0 by an exception; None if all were computed."""


@dataclass(frozen=True)
class TaskScore:
    """A set of samples: the score LongBench's eval.py prints, and what it does not print."""

    task: str
    metric: str
    score: float | None
    """Mean x 100, rounded to two decimals; None (never NaN) if there are no samples."""
    per_sample: tuple[float, ...]
    """In [0, 1], in the order of the records."""
    num_empty: int
    errors: Mapping[str, int] = field(default_factory=dict)
    """Samples on which the original scores 0 by an exception, by reason."""

    @property
    def n(self) -> int:
        return len(self.per_sample)

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())

    def __str__(self) -> str:
        if self.score is None:
            return f"{self.task}: no samples"
        notes = [f"{self.num_empty} empty"] * bool(self.num_empty) + [f"{n} x {why}" for why, n in self.errors.items()]
        return f"{self.task}: {self.score:.2f} (n={self.n}{''.join(f', {note}' for note in notes)})"


@dataclass(frozen=True)
class BucketScore:
    """LongBench-E's number for the samples of one bucket: mean x 100, two decimals; None (never NaN) if it is empty."""

    n: int
    score: float | None


def sample_score(
    task: str,
    prediction: str,
    references: Sequence[str],
    all_classes: Sequence[str] | None = None,
    metric: str | None = None,
) -> SampleScore:
    """Score one prediction against the best of its references.

    Args:
        task: a LongBench task; it fixes the metric and whether only the prediction's first line counts.
        all_classes: the record's class names; the classification tasks need them.
        metric: another key of `METRICS` than the task's own.

    Raises:
        MetricError: unknown metric, no references, or a record the metric cannot work on.
    """
    spec = get_task(task)
    compute = _metric(metric or spec.metric)
    if not references:
        raise MetricError(f"a sample of {task} has no references")
    scored = prediction.lstrip("\n").split("\n")[0] if spec.first_line_only else prediction
    best, error = 0.0, None
    for reference in references:
        try:
            best = max(best, compute(scored, reference, all_classes))
        except ScoredZero as failure:
            error = str(failure)
    return SampleScore(best, not scored.strip(), error)


def score_sample(
    task: str, prediction: str, references: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """LongBench's score of one prediction, in [0, 1]: the maximum over its references."""
    return sample_score(task, prediction, references, all_classes).score


def score_samples(task: str, records: Iterable[Mapping[str, Any]], metric: str | None = None) -> TaskScore:
    """Score a run's records (`prediction`, `references`, `all_classes`) as LongBench's eval.py scores a plain set.

    The paper's one bucket (`length > 4000`) is this, on records that are long enough.
    """
    samples = _score_all(task, records, metric)
    total = 0.0
    for sample in samples:  # not sum(): from Python 3.12 on it compensates rounding, and the original does not
        total += sample.score
    mean = round(100 * total / len(samples), 2) if samples else None
    return _summary(task, metric, samples, mean)


def score_buckets(per_sample: Sequence[float], lengths: Sequence[int]) -> dict[str, BucketScore]:
    """The scores of LongBench-E's three buckets, as eval.py prints them with `--e`.

    Args:
        per_sample: of `TaskScore`.
        lengths: each sample's `length` in words.
    """
    buckets = {}
    for name, (low, high) in BUCKETS.items():
        scores = [score for score, length in zip(per_sample, lengths, strict=True) if low <= length < high]
        # NumPy's mean and rounding, as in the original: they differ from Python's in rare last digits
        buckets[name] = BucketScore(len(scores), float(round(100 * np.mean(scores), 2)) if scores else None)
    return buckets


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise MetricError(f"unknown metric {name!r}; metrics: {', '.join(METRICS)}")
    return METRICS[name]


def _score_all(task: str, records: Iterable[Mapping[str, Any]], metric: str | None) -> list[SampleScore]:
    return [
        sample_score(task, record["prediction"], record["references"], record.get("all_classes"), metric)
        for record in records
    ]


def _summary(task: str, metric: str | None, samples: list[SampleScore], mean: float | None) -> TaskScore:
    return TaskScore(
        task=task,
        metric=metric or get_task(task).metric,
        score=mean,
        per_sample=tuple(sample.score for sample in samples),
        num_empty=sum(sample.is_empty for sample in samples),
        errors=dict(Counter(sample.error for sample in samples if sample.error is not None)),
    )
