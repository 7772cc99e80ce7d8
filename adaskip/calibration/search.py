"""Greedy choice of the sublayers whose absence changes the output least, each step given what is already skipped.

A step re-examines only the most promising candidates: those that cost least when last tried, first on a few prompts,
then the finalists on all of them. What others would choose (`starts`) takes over wherever it diverges less, and the
search goes on from there. One of the others, the `default`, is what is known to work: its set is chosen unless the
best one diverges less beyond chance, by the paired differences over the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean, stdev

from tqdm import tqdm

from adaskip.core.plan import Sublayer

Set = frozenset[Sublayer]
Measure = Callable[[Set, Sequence[int]], list[float]]
"""Divergence of a set on each prompt of those whose indices are given."""

SCREENING_PROMPTS = 4
CONSIDERED = 8
"""Candidates tried again in each step after the first, on the screening prompts."""
FINALISTS = 3
SEARCH = "search"
STANDARD_ERRORS = 2.0
"""By so many the mean paired difference must lie below zero."""


@dataclass(frozen=True)
class Choice:
    """A set of sublayers, its mean divergence on all calibration prompts, and whose it is."""

    sublayers: Set
    divergence: float
    found_by: str


def search(
    measure: Measure,
    candidates: Iterable[Sublayer],
    *,
    num_layers: int,
    num_prompts: int,
    up_to: int,
    starts: Mapping[str, Mapping[int, Set]],
    default: str | None = None,
    show_progress: bool = False,
) -> dict[int, Choice]:
    """The set chosen for every count 1..up_to. starts: sets that others would choose, by name and count; default: the
    one of them that is left only for a better one.

    A contender is dropped as soon as its divergences so far exceed the best one's over all prompts: none is negative.
    Raises ValueError if there are too few candidates.
    """
    candidates = list(candidates)
    screening = range(min(SCREENING_PROMPTS, num_prompts))
    cost: dict[Sublayer, float] = {}  # what each candidate added when last tried
    current: Set = frozenset()
    screened = {current: [0.0]}
    choices: dict[int, Choice] = {}
    for count in tqdm(range(1, up_to + 1), desc="search", unit="set", disable=None if show_progress else True):
        free = [c for c in candidates if c not in current and _leaves_attention(current, c, num_layers)]
        considered = sorted(free, key=lambda c: cost.get(c, -1.0))[: CONSIDERED if cost else None]
        if not considered:
            raise ValueError(f"{len(candidates)} candidates are too few for a set of {count} sublayers")
        base = fmean(screened[current])
        tried = {c: measure(current | {c}, screening) for c in considered}
        cost |= {c: fmean(values) - base for c, values in tried.items()}
        screened = {current | {c}: tried[c] for c in sorted(considered, key=cost.__getitem__)[:FINALISTS]}
        contenders = dict.fromkeys(screened, SEARCH)
        for name, sets in starts.items():
            if count in sets and sets[count] not in contenders:
                contenders[sets[count]] = name
                screened[sets[count]] = measure(sets[count], screening)
        best, least = current, float("inf")
        for contender in sorted(contenders, key=lambda chosen: fmean(screened[chosen])):
            total = _total(measure, contender, screened[contender], range(len(screening), num_prompts), least)
            if total < least:
                best, least = contender, total
        if not contenders.keys() & {best}:
            raise ValueError(f"no set of {count} sublayers leaves the output finite on every calibration prompt")
        current = best
        choices[count] = Choice(current, least / num_prompts, contenders[current])
        if default is not None and count in starts[default] and starts[default][count] != current:
            usual = measure(starts[default][count], range(num_prompts))
            if not _beyond_chance(measure(current, range(num_prompts)), usual):
                choices[count] = Choice(starts[default][count], fmean(usual), default)
    return choices


def _beyond_chance(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether `ours` are smaller than `theirs`, pair by pair; of a single pair, whatever it says."""
    if not all(map(isfinite, (*ours, *theirs))):  # an output that overflowed is worse than any that did not
        return sum(map(isfinite, ours)) > sum(map(isfinite, theirs))
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    return fmean(gaps) < -STANDARD_ERRORS * error


def most_measured(num_candidates: int, num_prompts: int, starts: Sequence[int]) -> int:
    """How often a search measures a set on a prompt at most. starts: how many sets of others there are, by count."""
    screening = min(SCREENING_PROMPTS, num_prompts)
    tried = num_candidates + (len(starts) - 1) * min(CONSIDERED, num_candidates) + sum(starts)
    finalists = sum(FINALISTS + number for number in starts)
    return screening * tried + (num_prompts - screening) * finalists


def _total(measure: Measure, chosen: Set, screened: list[float], rest: Sequence[int], least: float) -> float:
    """Sum of the divergences over all prompts; infinite as soon as it exceeds `least`."""
    total = sum(screened)
    for prompt in rest:
        if total >= least:
            return float("inf")
        total += measure(chosen, [prompt])[0]
    return total


def _leaves_attention(current: Set, candidate: Sublayer, num_layers: int) -> bool:
    """Whether an attention stays live to hold the cache's length."""
    return candidate.kind == "ffn" or sum(sublayer.kind == "attention" for sublayer in current) + 1 < num_layers
