"""Means, medians and ratios over samples, with 95 % percentile-bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 5000
CONFIDENCE = 0.95
SEED = 0
"""All intervals use one seed, so two runs with the same number of samples are resampled with the same indices."""


@dataclass(frozen=True)
class Estimate:
    """A statistic of samples and its 95 % interval; low and high are None for fewer than two samples."""

    value: float
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


def mean_estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of `values`; None for no values."""
    return mean_of_means_estimate([values]) if values else None


def median_estimate(values: Sequence[float]) -> Estimate | None:
    """The median of `values`; None for no values."""
    if not values:
        return None
    return _grouped(float(np.median(values)), [values], lambda sample, drawn: np.median(sample[drawn], axis=1))


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate | None:
    """mean(numerators) / mean(denominators) of paired samples; None if there are none or the denominator is zero."""
    return mean_ratio_estimate([list(zip(numerators, denominators, strict=True))])


def mean_ratio_estimate(groups: Sequence[Sequence[tuple[float, float]]]) -> Estimate | None:
    """The mean over groups of mean(numerators) / mean(denominators); None if a denominator is zero or a group empty.

    groups: per group, (numerator, denominator) of each sample. Samples are resampled within their group.
    """
    if not groups or any(not group or mean([below for _, below in group]) == 0 for group in groups):
        return None
    value = mean([mean([above for above, _ in group]) / mean([below for _, below in group]) for group in groups])
    return _grouped(value, groups, lambda pairs, drawn: _mean_of(pairs[0], drawn) / _mean_of(pairs[1], drawn))


def mean_of_means_estimate(groups: Sequence[Sequence[float]]) -> Estimate:
    """The mean over groups of the mean of each group. Samples are resampled within their group."""
    return _grouped(mean([mean(group) for group in groups]), groups, _mean_of)


def _mean_of(values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    return values[drawn].mean(axis=1)


def _grouped(value: float, groups: Sequence[Sequence[Any]], statistic: Callable[..., np.ndarray]) -> Estimate:
    """`value` with the interval of the mean over groups of `statistic(samples, indices of each resample)`."""
    if any(len(group) < 2 for group in groups):
        return Estimate(value)
    rng, tail = np.random.default_rng(SEED), 50 * (1 - CONFIDENCE)
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = [
            statistic(np.array(group, dtype=np.float64).T, rng.integers(len(group), size=(RESAMPLES, len(group))))
            for group in groups
        ]
        low, high = np.percentile(np.mean(resampled, axis=0), [tail, 100 - tail]).tolist()
    # A resample whose denominators are all zero has no ratio, so the interval is undefined.
    return Estimate(value, low, high) if math.isfinite(low) and math.isfinite(high) else Estimate(value)


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive `values`; for ratios, the mean of the inverses is the inverse of the mean."""
    return math.exp(mean([math.log(value) for value in values]))


def mean(values: Sequence[float]) -> float:
    """The mean with an exact sum, so that it does not depend on the order of the values."""
    return math.fsum(values) / len(values)


def mean_if_whole(values: Sequence[float | None]) -> float | None:
    """The mean of `values`; None if there are none or any is None."""
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None
