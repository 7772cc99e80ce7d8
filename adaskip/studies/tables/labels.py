"""Spellings of models, tasks, strategies and numbers in tables and plots."""

from __future__ import annotations

from adaskip.common.intervals import Estimate
from adaskip.strategies.names import LABELS


class Spelled(dict[str, str]):
    """Spellings of names; other names are unchanged."""

    def __missing__(self, name: str) -> str:
        return name


STRATEGIES = LABELS
"""The labels that strategies declare."""
TASKS = Spelled(
    multifieldqa_en="MultiFieldQA",
    triviaqa="TriviaQA",
    trec="TREC",
    gov_report="GovReport",
    multi_news="MultiNews",
)
METRICS = Spelled(f1="F1", acc="accuracy", rouge_l="Rouge-L")
"""The names of the paper."""
PHASES = {"prefill": "prefill", "decode": "decode", "e2e": "end to end"}
MISSING = "-"
UNPUBLISHED = "n/p"
UNKNOWN = "n/a"
PARTIAL = "*"


def budget(fraction: float) -> str:
    """`18.75 %`"""
    return f"{100 * fraction:.4g} %"


def percent(estimate: Estimate | None, mark: str = "", *, bold: bool = False) -> str:
    """A score in per cent with its interval, `88.1 [84.2, 91.0]`; `-` for None. mark: added to the value."""
    return _shown(estimate, 100, ".1f", mark, bold)


def nats(estimate: Estimate | None, mark: str = "", *, bold: bool = False) -> str:
    """A loss with its interval, `3.156 [3.021, 3.290]`."""
    return _shown(estimate, 1, ".3f", mark, bold)


def added_nats(estimate: Estimate | None) -> str:
    """A difference of losses with its interval, `+0.340 [+0.281, +0.402]`."""
    return _shown(estimate, 1, "+.3f", "", False)


def _shown(estimate: Estimate | None, scale: float, form: str, mark: str, bold: bool) -> str:
    if estimate is None:
        return MISSING
    value = f"{scale * estimate.value:{form}}{mark}"
    spread = ""
    if estimate.low is not None and estimate.high is not None:
        spread = f" [{scale * estimate.low:{form}}, {scale * estimate.high:{form}}]"
    return (f"**{value}**" if bold else value) + spread


def published(value: float, digits: int = 1, *, bold: bool = False) -> str:
    """A number of the paper; `n/p` for NaN."""
    if value != value:
        return UNPUBLISHED
    return f"**{value:.{digits}f}**" if bold else f"{value:.{digits}f}"


def ratio(value: float | None) -> str:
    """A speedup, `1.15`."""
    return MISSING if value is None else f"{value:.2f}"
