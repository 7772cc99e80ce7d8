"""How models, tasks, strategies and numbers are written in tables and plots."""

from __future__ import annotations

from adaskip.common.intervals import Estimate
from adaskip.strategies.names import LABELS


class Spelled(dict[str, str]):
    """How names are written; any other name is written as it is."""

    def __missing__(self, name: str) -> str:
        return name


STRATEGIES = LABELS
"""What each strategy declares."""
TASKS = Spelled(
    multifieldqa_en="MultiFieldQA",
    triviaqa="TriviaQA",
    trec="TREC",
    gov_report="GovReport",
    multi_news="MultiNews",
)
METRICS = Spelled(f1="F1", acc="accuracy", rouge_l="Rouge-L")
"""As the paper names them."""
PHASES = {"prefill": "prefill", "decode": "decode", "e2e": "end to end"}
MISSING = "-"
UNPUBLISHED = "n/p"


def budget(fraction: float) -> str:
    """`18.75 %`"""
    return f"{100 * fraction:.4g} %"


def percent(estimate: Estimate | None) -> str:
    """A score as per cent with its interval, `88.1 [84.2, 91.0]`; `-` where there is none."""
    if estimate is None:
        return MISSING
    return f"{100 * estimate.value:.1f}{interval(estimate)}"


def interval(estimate: Estimate, digits: int = 1) -> str:
    """` [84.2, 91.0]`, or nothing where there is no interval."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f" [{100 * estimate.low:.{digits}f}, {100 * estimate.high:.{digits}f}]"


def ratio(value: float | None) -> str:
    """A speedup, `1.15`."""
    return MISSING if value is None else f"{value:.2f}"
