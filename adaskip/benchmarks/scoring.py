"""Scores of samples and sets of samples, equal to LongBench's `eval.py` to the last digit, and what it keeps silent.

The original scores 0 where a metric fails, gives NaN for an empty bucket and never says that predictions were empty.
Here those are counted (`TaskScore.errors`, `num_empty`) and an empty set has no score.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from adaskip.benchmarks import metrics, scores
from adaskip.benchmarks.longbench_tasks import get_task
from adaskip.benchmarks.metrics import METRICS, STANDARD_ROUGE, Metric, MetricError, ScoredZero, code_line
from adaskip.benchmarks.scores import BucketScore, SampleScore, TaskScore

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
    scored = scored_text(task, prediction, metric)
    best, error = 0.0, None
    for reference in references:
        try:
            best = max(best, compute(scored, reference, all_classes))
        except ScoredZero as failure:
            error = str(failure)
    return SampleScore(best, not scored.strip(), error if best == 0 else None)


def scored_text(task: str, prediction: str, metric: str | None = None) -> str:
    """What a metric, by default the task's, reads of a prediction: all, the first line, or the first line of code."""
    spec = get_task(task)
    text = prediction.lstrip("\n").split("\n")[0] if spec.first_line_only else prediction
    return code_line(text) if (metric or spec.metric) == "code_sim" else text


def score_sample(
    task: str, prediction: str, references: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """LongBench's score of one prediction, in [0, 1]: the maximum over its references."""
    return sample_score(task, prediction, references, all_classes).score


def score_samples(task: str, records: Iterable[Mapping[str, Any]], metric: str | None = None) -> TaskScore:
    """Score a run's records (`prediction`, `references`, `all_classes`) as LongBench's eval.py scores a plain set.

    The paper's one bucket (`length > 4000`) is this, on records that are long enough.
    """
    samples = [sample_score(task, r["prediction"], r["references"], r.get("all_classes"), metric) for r in records]
    return TaskScore.of(task, metric or get_task(task).metric, samples)


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


def same_classes(task: str, ours: str, full: str, classes: tuple[str, ...]) -> float:
    """Classes that both answers name / classes that either names.

    The full model's answer is seldom a bare class name, as the metric demands of a reference. Where it names one class,
    this is what the metric gives for that class as the reference. An answer that names no class has 0.
    """
    mine, theirs = (_named(task, answer, classes) for answer in (ours, full))
    return len(mine & theirs) / len(mine | theirs) if mine | theirs else 0.0


@lru_cache(maxsize=4096)
def _named(task: str, answer: str, classes: tuple[str, ...]) -> frozenset[str]:
    """The classes that an answer names, as the metric finds them."""
    return frozenset(name for name in classes if score_sample(task, answer, [name], classes) > 0)


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise MetricError(f"unknown metric {name!r}; metrics: {', '.join(METRICS)}")
    return METRICS[name]


@cache
def fingerprint() -> str:
    """What these scores depend on: the code here, the packages of Rouge-L, and jieba."""
    code = "".join(inspect.getsource(module) for module in (sys.modules[__name__], metrics, scores))
    versions = [f"{package} {_version(package)}" for package in ("rouge", "rouge_score", "jieba")]
    return f"{hashlib.sha256(code.encode()).hexdigest()}, {', '.join(versions)}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # jieba is only needed for Chinese tasks
        return "none"
