"""Greedy search for the sublayers whose skipping changes the output least, one more sublayer in each step, with swaps.

A step tries only the most promising candidates: those that cost least when last tried. They are screened on a
few prompts, and the finalists are measured on all. The sets of other strategies (`starts`)
compete in each step; if one diverges less, the search continues from it. A step ends with a swap, if one lowers the
divergence: removal is not monotone, so a sublayer chosen early may be the wrong one in a larger set.
One of the other strategies is the `default`: its set is chosen unless the best set diverges significantly less, judged
by the paired differences over the prompts.
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
DROPPED = 2
"""Number of chosen sublayers that a swap tries to replace: those whose removal from the set lowers divergence most."""
SEARCH = "search"
STANDARD_ERRORS = 2.0
"""The mean paired difference must be below zero by this many standard errors."""


@dataclass(frozen=True)
class Choice:
    """A set of sublayers, its mean divergence on all calibration prompts, and the search or strategy that found it."""

    sublayers: Set
    divergence: float
    found_by: str


class _Candidates:
    """Screens sets that differ by one sublayer, and finds the best of those that are worth a full measurement.

    cost: the divergence that each candidate added when last tried.
    """

    def __init__(self, measure: MeasureDivergence, candidates: Iterable[Sublayer], num_layers: int, num_prompts: int):
        self.measure, self.candidates, self.num_layers = measure, list(candidates), num_layers
        self.prompts = range(num_prompts)
        self.screening = self.prompts[:SCREENING_PROMPTS]
        self.cost: dict[Sublayer, float] = {}

    def grown(self, current: Set) -> dict[Set, list[float]]:
        """The most promising sets with one sublayer more, and their divergences on the screening prompts.

        Raises ValueError if there is no candidate left.
        """
        free = [c for c in self.candidates if c not in current and _leaves_attention(current, c, self.num_layers)]
        considered = sorted(free, key=lambda c: self.cost.get(c, -1.0))[: CONSIDERED if self.cost else None]
        if not considered:
            raise ValueError(f"{len(self.candidates)} candidates are too few for a set of {len(current) + 1} sublayers")
        base = self.measure(current, self.screening) if current else [0.0] * len(self.screening)
        screened = {}
        for c in _downwards(considered):
            screened[current | {c}] = values = self.measure(current | {c}, self.screening)
            self.cost[c] = fmean(values) - fmean(base)
        return screened

    def swapped(self, current: Set) -> dict[Set, list[float]]:
        """The most promising sets with another sublayer in place of one, and their divergences on the screening
        prompts."""
        without = {s: fmean(self.measure(current - {s}, self.screening)) for s in _downwards(current)}
        screened: dict[Set, list[float]] = {}
        for dropped in sorted(without, key=without.__getitem__)[:DROPPED]:
            screened |= self.grown(current - {dropped})
        screened.pop(current, None)
        return screened

    def best(
        self, screened: Mapping[Set, list[float]], others: Iterable[Set] = (), below: float = float("inf")
    ) -> tuple[Set | None, float]:
        """The set with the least sum of divergences over all prompts, and that sum; None if none is less than `below`.

        Of the screened sets only the finalists are measured; `others` are all. A set is dropped as soon as its sum
        exceeds the least, since divergences are never negative.
        """
        best, least = None, below
        finalists = sorted(screened, key=lambda chosen: fmean(screened[chosen]))[:FINALISTS]
        for contender in dict.fromkeys((*finalists, *others)):
            total = 0.0
            for prompt in self.prompts:
                if (total := total + self.measure(contender, [prompt])[0]) >= least:
                    break
            else:
                best, least = contender, total
        return best, least


def search(
    measure: MeasureDivergence,
    candidates: Iterable[Sublayer],
    *,
    num_layers: int,
    num_prompts: int,
    up_to: int,
    starts: Mapping[str, Mapping[int, Set]],
    default: str | None = None,
    show_progress: bool = False,
) -> dict[int, Choice]:
    """The set chosen for each number of sublayers, 1..up_to.

    measure: measures a set on a prompt again without cost. starts: the sets of other strategies, by name and number of
    sublayers. default: the one of them whose sets are kept unless the search finds significantly better ones. Raises
    ValueError if there are too few candidates.
    """
    tried = _Candidates(measure, candidates, num_layers, num_prompts)
    current: Set = frozenset()
    choices: dict[int, Choice] = {}
    if default is not None:  # one after the other, since each shares its lower layers with the one before
        for usual in starts[default].values():
            measure(usual, tried.prompts)
    for count in tqdm(range(1, up_to + 1), desc="search", unit="set", disable=None if show_progress else True):
        others = {sets[count]: name for name, sets in reversed(starts.items()) if count in sets}
        grown = tried.grown(current)
        best, least = tried.best(grown, others)
        if best is None:
            raise ValueError(f"no set of {count} sublayers leaves the output finite on every calibration prompt")
        swapped, least = tried.best(tried.swapped(best), below=least) if count > 1 else (None, least)
        current = swapped or best
        found_by = SEARCH if swapped or best in grown else others[best]
        choices[count] = Choice(current, least / num_prompts, found_by)
        if default is not None and count in starts[default] and starts[default][count] != current:
            usual = measure(starts[default][count], tried.prompts)
            if not _significantly_less(measure(current, tried.prompts), usual):
                choices[count] = Choice(starts[default][count], fmean(usual), default)
    return choices


def _significantly_less(ours: Sequence[float], theirs: Sequence[float]) -> bool:
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
    screening, considered = min(SCREENING_PROMPTS, num_prompts), min(CONSIDERED, num_candidates)
    swaps = sum(min(DROPPED, count) * considered + count for count in range(2, len(starts) + 1))
    screened = num_candidates + (len(starts) - 1) * considered + swaps
    finalists = FINALISTS * (2 * len(starts) - 1)
    return screening * screened + (num_prompts - screening) * finalists + num_prompts * sum(starts)


def _downwards(sublayers: Iterable[Sublayer]) -> list[Sublayer]:
    """From the last layer down: sets that differ in one of them then share the layers below it with the one before."""
    return sorted(sublayers, key=lambda s: (-s.layer, s.kind))


def _leaves_attention(current: Set, candidate: Sublayer, num_layers: int) -> bool:
    """Whether at least one attention stays live, which must keep the length of the KV cache."""
    return candidate.kind == "ffn" or sum(sublayer.kind == "attention" for sublayer in current) + 1 < num_layers
