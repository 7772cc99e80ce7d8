"""Comparing rankings of sublayers: rank correlation, and hits among the k most similar."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import spearmanr, t


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rho of two [M]; 0 where one of them is constant and ranks nothing."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    result: Any = spearmanr(one, other)
    return float(result.statistic)


def chance_correlation(num_layers: int) -> float:
    """|rho| that 95 % of random rankings of so many layers stay below; at most 1."""
    freedom = num_layers - 2
    if freedom < 1:
        return 1.0
    bound = float(t.ppf(0.975, freedom))
    return bound / (freedom + bound**2) ** 0.5


def most_similar(similarity: np.ndarray, k: int) -> list[int]:
    """The k layers of highest similarity, the highest first; of equals the earlier layer."""
    return np.argsort(-similarity, kind="stable")[:k].tolist()


def hits(ranking: np.ndarray, others: np.ndarray, k: int) -> list[float]:
    """How many of the k most similar by `ranking`, [M], are among those of each row of `others`, [N, M]."""
    chosen = set(most_similar(ranking, k))
    return [float(len(chosen & set(most_similar(other, k)))) for other in others]


def paired_hits(ones: np.ndarray, others: np.ndarray, k: int) -> list[float]:
    """The same row by row of two [N, M]."""
    return [hits(one, other[None], k)[0] for one, other in zip(ones, others, strict=True)]


def chance_hits(k: int, num_layers: int) -> float:
    """Hits of a random ranking: k * k / M."""
    return k * k / num_layers
