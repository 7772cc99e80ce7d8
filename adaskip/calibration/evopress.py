"""Evolutionary search for k attentions and k FFNs whose removal diverges least: (1 + lambda), in several stages.

Each generation makes offspring of the parent by swaps: of one kind of sublayer, one more is removed and one restored.
The offspring are screened on few tokens; the best of them and the parent are compared on more, and the best becomes the
next parent.

Source: Sieberling et al., EvoPress, arXiv 2410.14649, and the settings of its published depth search. Differences: a
stage takes whole prompts until it has its tokens, and the default number of generations is a tenth of the published.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from math import comb, isfinite
from statistics import fmean

from tqdm import tqdm

from adaskip.calibration.search import Choice, MeasureDivergence, Set
from adaskip.core.plan import KINDS, Sublayer, SublayerKind

INITIAL, OFFSPRING, SURVIVORS = 64, 32, 2
"""Random sets at the start, offspring in each generation, and those of them that are compared with the parent."""
SCREENING_TOKENS, TOKENS = 2048, 32768
"""Tokens on which random sets and offspring are screened, and those on which the survivors are compared."""
MOST_SWAPS = 3
EFFORT = 0.1
"""Default share of the published number of generations."""


def num_generations(num_layers: int, size: int, effort: float) -> int:
    """The generations for `size` attentions and FFNs; the published number is size (num_layers - size) / 1.5."""
    return max(1, round(effort * size * (num_layers - size) / 1.5))


def evolve(
    measure: MeasureDivergence,
    lengths: Sequence[int],
    *,
    num_layers: int,
    count: int,
    effort: float,
    seed: int,
    found_by: str,
    show_progress: bool = False,
) -> Choice:
    """The best set of `count` sublayers (even) that was found, half attentions and half FFNs.

    measure: the divergence of a set on prompts. lengths: the prompts' tokens. The result is a function of the measured
    divergences and the seed. Raises ValueError if its divergence is infinite.
    """
    size, draw = count // 2, random.Random(f"{seed} {count}")
    stages = _Stages(measure, lengths, draw)
    parent = stages.best(_random_sets(num_layers, size, draw), 1, SCREENING_TOKENS)[0]
    generations = range(num_generations(num_layers, size, effort))
    name = f"{found_by}, {count} sublayers"
    for _ in tqdm(generations, desc=name, unit="generation", disable=None if show_progress else True):
        offspring = _offspring(parent, num_layers, size, draw)
        survivors = stages.best(offspring, SURVIVORS, SCREENING_TOKENS)
        parent = stages.best([*survivors, parent], 1, TOKENS)[0]
    divergence = fmean(measure(parent, range(len(lengths))))
    if not isfinite(divergence):
        raise ValueError(f"{found_by} found no set of {count} sublayers that leaves the output finite on every prompt")
    return Choice(parent, divergence, found_by)


class _Stages:
    """Selects the best sets by their mean divergence on prompts that are drawn for each selection."""

    def __init__(self, measure: MeasureDivergence, lengths: Sequence[int], draw: random.Random):
        self.measure, self.lengths, self.draw = measure, lengths, draw

    def best(self, candidates: Sequence[Set], number: int, tokens: int) -> list[Set]:
        """The `number` candidates of least divergence; in a tie, those that come first."""
        which = self._prompts(tokens)
        # Neighbours in this order share the most layers from the first on, so that their forwards share them, too.
        ordered = sorted(candidates, key=lambda chosen: sorted((s.layer, s.kind) for s in chosen))
        divergence = {chosen: fmean(self.measure(chosen, which)) for chosen in ordered}
        return sorted(candidates, key=divergence.__getitem__)[:number]

    def _prompts(self, tokens: int) -> list[int]:
        """Random prompts of at least that many tokens in total; all of them if they have fewer."""
        drawn, total = [], 0
        for prompt in self.draw.sample(range(len(self.lengths)), len(self.lengths)):
            if total >= tokens:
                break
            drawn.append(prompt)
            total += self.lengths[prompt]
        return sorted(drawn)


def _random_sets(num_layers: int, size: int, draw: random.Random) -> list[Set]:
    """Different sets of `size` attentions and `size` FFNs: `INITIAL`, or all if there are fewer."""
    found: dict[Set, None] = {}
    while len(found) < min(INITIAL, comb(num_layers, size) ** 2):
        drawn = [Sublayer(kind, layer) for kind in KINDS for layer in draw.sample(range(num_layers), size)]
        found[frozenset(drawn)] = None
    return list(found)


def _offspring(parent: Set, num_layers: int, size: int, draw: random.Random) -> list[Set]:
    """Different mutations of a set: `OFFSPRING`, or all within `MOST_SWAPS` if there are fewer."""
    found: dict[Set, None] = {}
    while len(found) < min(OFFSPRING, num_mutations(num_layers, size)):
        swaps = min(draw.randint(1, MOST_SWAPS), draw.randint(1, MOST_SWAPS))  # mostly few
        child = parent
        for _ in range(swaps):
            child = _swapped(child, num_layers, draw.choice(KINDS), draw)
        if child != parent:
            found[child] = None
    return list(found)


def _swapped(chosen: Set, num_layers: int, kind: SublayerKind, draw: random.Random) -> Set:
    removed = _layers(chosen, kind)
    restored = draw.choice(removed)
    more = draw.choice([layer for layer in range(num_layers) if layer not in removed])
    return chosen - {Sublayer(kind, restored)} | {Sublayer(kind, more)}


def _layers(chosen: Iterable[Sublayer], kind: SublayerKind) -> list[int]:
    return sorted(sublayer.layer for sublayer in chosen if sublayer.kind == kind)


def num_mutations(num_layers: int, size: int) -> int:
    """The number of sets that differ from a given one by 1 to `MOST_SWAPS` swaps."""
    within = [comb(size, swaps) * comb(num_layers - size, swaps) for swaps in range(MOST_SWAPS + 1)]
    return sum(within[i] * within[j] for i in range(MOST_SWAPS + 1) for j in range(MOST_SWAPS + 1 - i)) - 1


def most_measured(num_layers: int, num_prompts: int, counts: Sequence[int], effort: float = EFFORT) -> int:
    """Maximum number of measurements (one set on one prompt), if every stage takes all prompts."""
    generations = sum(num_generations(num_layers, count // 2, effort) for count in counts)
    return num_prompts * (INITIAL * len(counts) + generations * (OFFSPRING + SURVIVORS) + len(counts))
