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
from dataclasses import dataclass
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
    candidates = list(candidates)
    prompts = range(num_prompts)
    screening = prompts[:SCREENING_PROMPTS]
    cost: dict[Sublayer, float] = {}  # divergence that each candidate added when last tried
    current: Set = frozenset()
    choices: dict[int, Choice] = {}
    for count in tqdm(range(1, up_to + 1), desc="search", unit="set", disable=None if show_progress else True):
        free = [c for c in candidates if c not in current and _leaves_attention(current, c, num_layers)]
        if not free:
            raise ValueError(f"{len(candidates)} candidates are too few for a set of {count} sublayers")
        considered = sorted(free, key=lambda c: cost.get(c, -1.0))[: CONSIDERED if cost else None]
        base = fmean(measure(current, screening)) if current else 0.0
        for candidate in sorted(considered, key=lambda c: -c.layer):  # each shares the layers below with those before
            cost[candidate] = fmean(measure(current | {candidate}, screening)) - base
        contenders = {current | {c}: SEARCH for c in sorted(considered, key=cost.__getitem__)[:FINALISTS]}
        for name, sets in starts.items():
            if count in sets:
                contenders.setdefault(sets[count], name)
        complete: dict[Set, list[float]] = {}  # divergences on all prompts, of the contenders that are not dropped
        for contender in contenders:
            least = min(complete.values(), key=sum) if complete and faster is None else [inf]
            values = _until_clear(measure, contender, least, prompts, by_total=True)
            if len(values) == num_prompts:
                complete[contender] = values
        current = best = min(complete, key=lambda c: sum(complete[c]))
        if not isfinite(sum(complete[best])):
            raise ValueError(f"no set of {count} sublayers leaves the output finite on every calibration prompt")
        if faster is not None:
            tied = [c for c in complete if not significantly_less(complete[best], complete[c])]
            current = max(tied, key=lambda c: (faster(c), -sum(complete[c])))
        choices[count] = Choice(current, fmean(complete[current]), contenders[current])
        if default is not None and count in starts[default] and (own := starts[default][count]) != current:
            is_slower = faster is not None and faster(own) < faster(current)
            usual = complete.get(own) or _until_clear(measure, own, complete[best], prompts, by_total=False)
            if not is_slower and len(usual) == num_prompts and not significantly_less(complete[best], usual):
                choices[count] = Choice(own, fmean(usual), default)
    return choices


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


def _until_clear(
    measure: MeasureDivergence, chosen: Set, best: Sequence[float], prompts: Sequence[int], *, by_total: bool
) -> list[float]:
    """The divergences of `chosen` prompt by prompt, up to where those of another set, `best`, are clearly less.

    best: on all prompts; while one is infinite, nothing is clear. by_total: a total above theirs is clear, too.
    """
    values: list[float] = []
    for prompt in prompts:
        screened = len(values) >= SCREENING_PROMPTS
        if isfinite(sum(best)) and (
            (by_total and sum(values) >= sum(best))
            or (screened and significantly_less(best[: len(values)], values, EARLY_ERRORS))
        ):
            break
        values += measure(chosen, [prompt])
    return values


def _leaves_attention(current: Set, candidate: Sublayer, num_layers: int) -> bool:
    """Whether at least one attention stays live, which must keep the length of the KV cache."""
    return candidate.kind == "ffn" or sum(sublayer.kind == "attention" for sublayer in current) + 1 < num_layers
