"""How models, tasks, strategies and numbers are written in tables and plots."""

from __future__ import annotations

import math

from adaskip.common.intervals import Estimate
from adaskip.strategies.names import LABELS

STRATEGIES = LABELS
"""What each strategy declares."""
TASKS = {
    "multifieldqa_en": "MultiFieldQA",
    "triviaqa": "TriviaQA",
    "trec": "TREC",
    "gov_report": "GovReport",
    "multi_news": "MultiNews",
}
METRICS = {"f1": "F1", "acc": "accuracy", "rouge_l": "Rouge-L"}
PHASES = {"prefill": "prefill", "decode": "decode", "e2e": "end to end"}
MISSING = "-"
UNPUBLISHED = "n/p"
UNKNOWN = "n/a"


def task(name: str) -> str:
    """A dataset's own spelling; the name of a task that the paper does not use."""
    return TASKS.get(name, name)


def budget(fraction: float) -> str:
    """`18.75 %`"""
    return f"{100 * fraction:.4g} %"


def percent(estimate: Estimate | None, mark: str = "", *, bold: bool = False) -> str:
    """A score as per cent with its interval, `88.1 [84.2, 91.0]`; `-` where there is none. mark: after the value."""
    if estimate is None:
        return MISSING
    value = f"{100 * estimate.value:.1f}{mark}"
    return (f"**{value}**" if bold else value) + interval(estimate)


def nats(estimate: Estimate | None, mark: str = "", *, signed: bool = False, bold: bool = False) -> str:
    """A loss with its interval, `3.156 [3.021, 3.290]`; `-` where there is none. signed: a difference."""
    if estimate is None:
        return MISSING
    sign = "+" if signed else ""
    value = f"{estimate.value:{sign}.3f}{mark}"
    ends = "" if estimate.low is None else f" [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
    return (f"**{value}**" if bold else value) + ends


def interval(estimate: Estimate, digits: int = 1) -> str:
    """` [84.2, 91.0]`, or nothing where there is no interval."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f" [{100 * estimate.low:.{digits}f}, {100 * estimate.high:.{digits}f}]"


def published(value: float, *, bold: bool = False) -> str:
    """A number of the paper's, per cent; `n/p` for NaN."""
    if math.isnan(value):
        return UNPUBLISHED
    return f"**{value:.1f}**" if bold else f"{value:.1f}"


def ratio(value: float | None) -> str:
    """A speedup, `1.15`."""
    return MISSING if value is None else f"{value:.2f}"
