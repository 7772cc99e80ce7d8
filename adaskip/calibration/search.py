"""Greedy search for the sublayers whose skipping changes the output least, one more sublayer in each step.

A step tries only the most promising candidates: those that cost least when last tried. They are screened on a
few prompts, and the finalists are measured on all. The sets of other strategies (`starts`)
compete in each step; if one diverges less, the search continues from it. One of these strategies is the `default`: its
set is chosen unless the best set diverges significantly less, judged by the paired differences over the prompts.

With `faster`, the fastest of the sets that do not diverge significantly more than the best one is chosen instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean, stdev

from tqdm import tqdm

from adaskip.core.plan import Sublayer

Set = frozenset[Sublayer]
MeasureDivergence = Callable[[Set, Sequence[int]], list[float]]
"""Returns the divergence of a set on each of the prompts with the given indices."""

SCREENING_PROMPTS = 4
CONSIDERED = 8
"""Number of candidates that each step after the first screens."""
FINALISTS = 3
SEARCH = "search"
STANDARD_ERRORS = 2.0
"""The mean paired difference must be below zero by this many standard errors."""


@dataclass(frozen=True)
class Choice:
    """A set of sublayers, its mean divergence on all calibration prompts, and the search or strategy that found it."""

    sublayers: Set
    divergence: float
    found_by: str


def search(
    measure: MeasureDivergence,
    candidates: Iterable[Sublayer],
    *,
    num_layers: int,
    num_prompts: int,
    up_to: int,
    starts: Mapping[str, Mapping[int, Set]],
    default: str | None = None,
    faster: Callable[[Set], float] | None = None,
    show_progress: bool = False,
) -> dict[int, Choice]:
    """The set chosen for each number of sublayers, 1..up_to.

    starts: the sets of other strategies, by name and number of sublayers. default: the one of them whose sets are kept
    unless the search finds significantly better ones. A contender is dropped as soon as the sum of its divergences,
    which are never negative, exceeds the best total. Raises ValueError if there are too few candidates.

    faster: predicted speedup of a set, by which ties are decided: the fastest contender whose divergence is not
    significantly above the least one is chosen, and the search continues from it. The default's set is kept if it is
    one of these and none of them is faster. No contender is dropped, since all are compared in pairs; that takes more
    measurements, but no more than `most_measured`.
    """
    candidates = list(candidates)
    prompts = range(num_prompts)
    screening = prompts[:SCREENING_PROMPTS]
    cost: dict[Sublayer, float] = {}  # divergence that each candidate added when last tried
    current: Set = frozenset()
    choices: dict[int, Choice] = {}
    if default is not None:  # one after the other, since each shares its lower layers with the one before
        for usual in starts[default].values():
            measure(usual, prompts)
    for count in tqdm(range(1, up_to + 1), desc="search", unit="set", disable=None if show_progress else True):
        free = [c for c in candidates if c not in current and _leaves_attention(current, c, num_layers)]
        considered = sorted(free, key=lambda c: cost.get(c, -1.0))[: CONSIDERED if cost else None]
        if not considered:
            raise ValueError(f"{len(candidates)} candidates are too few for a set of {count} sublayers")
        base = measure(current, screening) if current else [0.0] * len(screening)
        downwards = sorted(considered, key=lambda c: -c.layer)  # each shares the layers below it with the one before
        tried = {c: measure(current | {c}, screening) for c in downwards}
        cost |= {c: fmean(values) - fmean(base) for c, values in tried.items()}
        finalists = sorted(considered, key=cost.__getitem__)[:FINALISTS]
        contenders = {current | {c}: (SEARCH, tried[c]) for c in finalists}
        for name, sets in starts.items():
            if count in sets:
                contenders.setdefault(sets[count], (name, []))
        totals: dict[Set, float] = {}
        for contender, (_, known) in contenders.items():
            least = min(totals.values(), default=float("inf")) if faster is None else float("inf")
            totals[contender] = _total(measure, contender, known, prompts[len(known) :], least)
        best = min(totals, key=totals.__getitem__)
        if not isfinite(totals[best]):
            raise ValueError(f"no set of {count} sublayers leaves the output finite on every calibration prompt")
        current = best
        if faster is not None:
            values = measure(best, prompts)
            tied = [c for c in totals if not significantly_less(values, measure(c, prompts))]
            current = max(tied, key=lambda c: (faster(c), -totals[c]))
        choices[count] = Choice(current, totals[current] / num_prompts, contenders[current][0])
        if default is not None and count in starts[default] and (own := starts[default][count]) != current:
            usual = measure(own, prompts)
            is_slower = faster is not None and faster(own) < faster(current)
            if not is_slower and not significantly_less(measure(best, prompts), usual):
                choices[count] = Choice(own, fmean(usual), default)
    return choices


def significantly_less(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether `ours` are significantly less than `theirs` in paired comparison; a single pair is simply compared."""
    if not all(map(isfinite, (*ours, *theirs))):  # an overflow is worse than any finite divergence
        return sum(map(isfinite, ours)) > sum(map(isfinite, theirs))
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    return fmean(gaps) < -STANDARD_ERRORS * error


def most_measured(num_candidates: int, num_prompts: int, starts: Sequence[int]) -> int:
    """Maximum number of measurements (one set on one prompt) in a search.

    starts: for each number of sublayers, how many sets of other strategies compete.
    """
    screening = min(SCREENING_PROMPTS, num_prompts)
    tried = num_candidates + (len(starts) - 1) * min(CONSIDERED, num_candidates)
    return screening * tried + (num_prompts - screening) * FINALISTS * len(starts) + num_prompts * sum(starts)


def _total(measure: MeasureDivergence, chosen: Set, screened: list[float], rest: Sequence[int], least: float) -> float:
    """Sum of the divergences over all prompts; infinite as soon as it exceeds `least`."""
    total = sum(screened)
    for prompt in rest:
        if total >= least:
            return float("inf")
        total += measure(chosen, [prompt])[0]
    return total


def _leaves_attention(current: Set, candidate: Sublayer, num_layers: int) -> bool:
    """Whether at least one attention stays live, which must keep the length of the KV cache."""
    return candidate.kind == "ffn" or sum(sublayer.kind == "attention" for sublayer in current) + 1 < num_layers
