"""The evolutionary search of EvoPress, on measures without a model."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest

from adaskip.calibration import evopress
from adaskip.core.plan import Sublayer

LAYERS = 6
ALL = [Sublayer(kind, layer) for layer in range(LAYERS) for kind in ("attention", "ffn")]


def noisy(seed: int = 0):
    """A measure with interactions between sublayers."""
    draw = random.Random(seed)
    weight = {s: draw.random() for s in ALL}
    pair = {frozenset(two): draw.random() for two in combinations(ALL, 2)}

    def measure(chosen, which):
        together = sum(pair[frozenset(two)] for two in combinations(sorted(chosen), 2))
        return [(sum(weight[s] for s in chosen) + together) * (1 + 0.1 * prompt) for prompt in which]

    return measure


OPTIONS = {"num_layers": LAYERS, "count": 4, "found_by": "evopress"}


def test_evopress_has_as_many_attentions_as_ffns_and_never_gets_worse():
    measure, longer = noisy(), []
    for effort in (0.01, 0.5, 2.0):
        choice = evopress.evolve(measure, [5000, 5000, 5000], effort=effort, seed=0, **OPTIONS)
        kinds = [s.kind for s in choice.sublayers]
        assert (kinds.count("attention"), kinds.count("ffn")) == (2, 2)
        longer.append(choice.divergence)
    assert longer == sorted(longer, reverse=True)


def test_evopress_finds_the_best_set_of_a_small_model():
    measure = noisy(1)
    sets = [{*a, *f} for a in combinations(ALL[::2], 2) for f in combinations(ALL[1::2], 2)]
    best = min(sets, key=lambda chosen: measure(chosen, [0])[0])
    found = evopress.evolve(measure, [5000], effort=2.0, seed=0, **OPTIONS)
    assert found.sublayers == best


def test_evopress_is_a_function_of_its_seed():
    flat = lambda chosen, which: [1.0 for _ in which]  # noqa: E731 - without a best set only the draws decide
    first, again, other = (
        evopress.evolve(flat, [50], effort=0.01, seed=seed, **OPTIONS).sublayers for seed in (0, 0, 1)
    )
    assert first == again != other


def test_evopress_screens_on_few_tokens_and_compares_survivors_with_the_parent_on_more():
    asked = []

    def measure(chosen, which):
        asked.append((chosen, tuple(which)))
        return noisy()(chosen, which)

    lengths = [1024] * 40
    evopress.evolve(measure, lengths, effort=0.01, seed=0, **OPTIONS)
    initial, screened = asked[: evopress.INITIAL], asked[evopress.INITIAL : evopress.INITIAL + evopress.OFFSPRING]
    compared, last = asked[evopress.INITIAL + evopress.OFFSPRING : -1], asked[-1]
    assert {len(which) for _, which in (*initial, *screened)} == {2}  # 2048 tokens
    assert len({which for _, which in screened}) == 1
    assert [len(which) for _, which in compared] == [32] * 3  # 32768 tokens: two survivors and the parent
    assert len({chosen for chosen, _ in screened}) == evopress.OFFSPRING
    assert len(last[1]) == 40


@pytest.mark.parametrize(("num_layers", "size"), [(2, 1), (4, 1), (5, 2), (6, 5)])
def test_evopress_ends_where_there_are_few_sets_to_draw(num_layers, size):
    draw = random.Random(0)
    sets = evopress._random_sets(num_layers, size, draw)
    assert len(sets) == len(set(sets)) == min(evopress.INITIAL, math.comb(num_layers, size) ** 2)
    offspring = evopress._offspring(sets[0], num_layers, size, draw)
    within = [s for s in _all_sets(num_layers, size) if 0 < len(s - sets[0]) <= evopress.MOST_SWAPS]
    assert evopress.num_mutations(num_layers, size) == len(within)
    assert set(offspring) <= set(within)
    assert len(offspring) == min(evopress.OFFSPRING, len(within))


def _all_sets(num_layers: int, size: int) -> list[frozenset[Sublayer]]:
    layers = list(combinations(range(num_layers), size))
    pairs = ((attention, ffn) for attention in layers for ffn in layers)
    return [
        frozenset({Sublayer("attention", i) for i in attention} | {Sublayer("ffn", i) for i in ffn})
        for attention, ffn in pairs
    ]


def test_an_infinite_divergence_of_evopress_is_refused():
    with pytest.raises(ValueError, match="evopress found no set of 4 sublayers that leaves the output finite"):
        evopress.evolve(lambda chosen, which: [math.inf for _ in which], [50], effort=0.01, seed=0, **OPTIONS)
