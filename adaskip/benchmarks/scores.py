"""The score of one answer, and of a set of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SampleScore:
    """One sample: its score, in [0, 1], and what went wrong on the way."""

    score: float
    is_empty: bool = False
    """Nothing but white space was scored."""
    error: str | None = None
    """Why the metric failed, if the score is 0 and it did; else None."""

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise ValueError(f"a score is {self.score}; allowed: 0 to 1")


@dataclass(frozen=True)
class TaskScore:
    """A set of samples."""

    task: str
    metric: str
    score: float | None
    """Mean x 100, rounded to two decimals; None (never NaN) if there are no samples."""
    per_sample: tuple[float, ...]
    """In [0, 1], in the order of the records."""
    num_empty: int
    errors: Mapping[str, int] = field(default_factory=dict)
    """Samples that score 0 because the metric failed on them, by reason."""

    @classmethod
    def of(cls, task: str, metric: str, samples: Sequence[SampleScore]) -> TaskScore:
        """The score of a task's samples."""
        total = 0.0
        for sample in samples:  # not sum(): from Python 3.12 on it compensates rounding, and LongBench's does not
            total += sample.score
        return cls(
            task=task,
            metric=metric,
            score=round(100 * total / len(samples), 2) if samples else None,
            per_sample=tuple(sample.score for sample in samples),
            num_empty=sum(sample.is_empty for sample in samples),
            errors=dict(Counter(sample.error for sample in samples if sample.error is not None)),
        )

    @property
    def n(self) -> int:
        return len(self.per_sample)

    def __str__(self) -> str:
        if self.score is None:
            return f"{self.task}: no samples"
        notes = [f"{self.num_empty} empty"] * bool(self.num_empty) + [f"{n} x {why}" for why, n in self.errors.items()]
        return f"{self.task}: {self.score:.2f} (n={self.n}{''.join(f', {note}' for note in notes)})"


@dataclass(frozen=True)
class BucketScore:
    """The samples of one bucket of lengths: mean x 100, two decimals; None (never NaN) if it is empty."""

    n: int
    score: float | None


@dataclass(frozen=True)
class Evaluation:
    """A task's samples by its own metric, by another beside it, and by buckets of length; None where there are none."""

    main: TaskScore
    beside: TaskScore | None = None
    buckets: dict[str, BucketScore] | None = None
