"""Greedy search for the sublayers whose skipping changes the output least, one more sublayer in each step.

The first step tries every candidate, the others only the most promising ones: those that cost least when last tried.
They are screened on a few prompts, and the finalists are measured on all. The sets of other strategies (`starts`)
compete in each step; if one diverges less, the search continues from it. One of these strategies is the `default`: its
set is chosen unless the best set diverges significantly less, judged by the paired differences over the prompts. A
comparison ends early where it is clear.

With `faster`, the fastest of the sets that do not diverge significantly more than the best one is chosen instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from statistics import fmean, stdev

from tqdm import tqdm

from adaskip.core.plan import Sublayer

Set = frozenset[Sublayer]
MeasureDivergence = Callable[[Set, Sequence[int]], list[float]]
"""Returns the divergence of a set on each of the prompts with the given indices. It should keep what it measured: a
search asks for some divergences several times."""

SCREENING_PROMPTS = 4
CONSIDERED = 6
"""Number of candidates that each step after the first screens."""
FINALISTS = 3
SEARCH = "search"
STANDARD_ERRORS = 2.0
"""The mean paired difference must be below zero by this many standard errors."""
EARLY_ERRORS = 3.0
"""The number of standard errors that ends a comparison after `SCREENING_PROMPTS` or more prompts, before it has all."""


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
    unless the search finds significantly better ones. A contender is dropped as soon as it is clearly not the best: the
    sum of its divergences, which are never negative, exceeds the best total, or it diverges significantly more
    (`EARLY_ERRORS`). Raises ValueError if there are too few candidates.

    faster: predicted speedup of a set, by which ties are decided: the fastest contender whose divergence is not
    significantly above the least one is chosen, and the search continues from it. The default's set is kept if it is
    one of these and none of them is faster. No contender is dropped, since all are compared in pairs; that takes more
    measurements, but no more than `most_measured`.
    """
    steps = _Steps(measure, list(candidates), num_layers, range(num_prompts), starts, default, faster)
    current: Set = frozenset()
    choices: dict[int, Choice] = {}
    for count in tqdm(range(1, up_to + 1), desc="search", unit="set", disable=None if show_progress else True):
        current, choices[count] = steps.step(current, count)
    return choices


@dataclass
class _Steps:
    """The steps of a search, with its arguments. cost: divergence that each candidate added when last tried."""

    measure: MeasureDivergence
    candidates: Sequence[Sublayer]
    num_layers: int
    prompts: Sequence[int]
    starts: Mapping[str, Mapping[int, Set]]
    default: str | None
    faster: Callable[[Set], float] | None
    cost: dict[Sublayer, float] = field(default_factory=dict)

    def step(self, current: Set, count: int) -> tuple[Set, Choice]:
        """(the set of `count` sublayers from which the next step continues, the chosen set)."""
        contenders = dict.fromkeys(self._finalists(current, count), SEARCH)
        for name, sets in self.starts.items():
            if count in sets:
                contenders.setdefault(sets[count], name)
        complete = self._on_all_prompts(contenders)
        best = min(complete.values(), key=sum)
        if not isfinite(sum(best)):
            raise ValueError(f"no set of {count} sublayers leaves the output finite on every calibration prompt")
        found = self._fastest(complete, best)
        own = self._kept_default(complete, best, found, count)
        choice = Choice(found, fmean(complete[found]), contenders[found])
        return found, choice if own is None else own

    def _finalists(self, current: Set, count: int) -> list[Set]:
        """`current` with each of the candidates that add least on the screening prompts."""
        free = [c for c in self.candidates if c not in current and _leaves_attention(current, c, self.num_layers)]
        if not free:
            raise ValueError(f"{len(self.candidates)} candidates are too few for a set of {count} sublayers")
        cost, screening = self.cost, self.prompts[:SCREENING_PROMPTS]
        considered = sorted(free, key=lambda c: cost.get(c, -1.0))[: CONSIDERED if cost else None]
        base = fmean(self.measure(current, screening)) if current else 0.0
        for candidate in sorted(considered, key=lambda c: -c.layer):  # each shares the layers below with those before
            cost[candidate] = fmean(self.measure(current | {candidate}, screening)) - base
        return [current | {c} for c in sorted(considered, key=cost.__getitem__)[:FINALISTS]]

    def _on_all_prompts(self, contenders: Iterable[Set]) -> dict[Set, list[float]]:
        """The divergences on all prompts of the contenders that are not dropped."""
        complete: dict[Set, list[float]] = {}
        for contender in contenders:
            least = min(complete.values(), key=sum) if complete and self.faster is None else [inf]
            values = self._until_clear(contender, least, by_total=True)
            if len(values) == len(self.prompts):
                complete[contender] = values
        return complete

    def _fastest(self, complete: Mapping[Set, Sequence[float]], best: Sequence[float]) -> Set:
        """The set with the least divergence; with `faster`, the fastest that is not significantly above it."""
        if self.faster is None:
            return min(complete, key=lambda c: sum(complete[c]))
        speed = self.faster
        tied = [c for c in complete if not significantly_less(best, complete[c])]
        return max(tied, key=lambda c: (speed(c), -sum(complete[c])))

    def _kept_default(
        self, complete: Mapping[Set, list[float]], best: Sequence[float], found: Set, count: int
    ) -> Choice | None:
        """The default's set; None if it is not kept, or if it is the one found."""
        if self.default is None or (own := self.starts[self.default].get(count)) in (None, found):
            return None
        if self.faster is not None and self.faster(own) < self.faster(found):
            return None
        values = complete.get(own) or self._until_clear(own, best, by_total=False)
        if len(values) < len(self.prompts) or significantly_less(best, values):
            return None
        return Choice(own, fmean(values), self.default)

    def _until_clear(self, chosen: Set, best: Sequence[float], *, by_total: bool) -> list[float]:
        """The divergences of `chosen` prompt by prompt, up to where those of another set, `best`, are clearly less.

        best: on all prompts; while one is infinite, nothing is clear. by_total: a total above theirs is clear, too.
        """
        values: list[float] = []
        for prompt in self.prompts:
            screened = len(values) >= SCREENING_PROMPTS
            if isfinite(sum(best)) and (
                (by_total and sum(values) >= sum(best))
                or (screened and significantly_less(best[: len(values)], values, EARLY_ERRORS))
            ):
                break
            values += self.measure(chosen, [prompt])
        return values


def significantly_less(ours: Sequence[float], theirs: Sequence[float], errors: float = STANDARD_ERRORS) -> bool:
    """Whether `ours` are significantly less than `theirs` in paired comparison; a single pair is simply compared.

    errors: standard errors of the mean difference by which it must be below zero.
    """
    if not all(map(isfinite, (*ours, *theirs))):  # an overflow is worse than any finite divergence
        return sum(map(isfinite, ours)) > sum(map(isfinite, theirs))
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    return fmean(gaps) < -errors * error


def most_measured(num_candidates: int, num_prompts: int, starts: Sequence[int]) -> int:
    """Maximum number of measurements (one set on one prompt) in a search.

    starts: for each number of sublayers, how many sets of other strategies compete.
    """
    screening = min(SCREENING_PROMPTS, num_prompts)
    tried = num_candidates + (len(starts) - 1) * min(CONSIDERED, num_candidates)
    return screening * tried + (num_prompts - screening) * FINALISTS * len(starts) + num_prompts * sum(starts)


def _leaves_attention(current: Set, candidate: Sublayer, num_layers: int) -> bool:
    """Whether at least one attention stays live, which must keep the length of the KV cache."""
    return candidate.kind == "ffn" or sum(sublayer.kind == "attention" for sublayer in current) + 1 < num_layers
