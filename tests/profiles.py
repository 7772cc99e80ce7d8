"""Importance profiles with chosen similarities, and selections with known sets."""

from __future__ import annotations

from collections.abc import Sequence

from adaskip.core.plan import Phase
from adaskip.profiles.importance import ImportanceProfile, SublayerMeans
from adaskip.profiles.selection import METHODS, SEARCH, SearchCost, Selected, SelectionProfile


def profile_of(
    attention: Sequence[float], ffn: Sequence[float], layer: Sequence[float] | None = None, scale: float = 1.1, **fields
) -> ImportanceProfile:
    """A profile with these similarities; all scales are `scale`."""
    units = [SublayerMeans(tuple(x), (scale,) * len(x)) for x in (attention, ffn, layer or attention)]
    about = {
        "tokens": 100,
        "phase": "prefill",
        "model": "random",
        "weights_fingerprint": "none",
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "dataset": "none",
        "data_ids": ("a", "b"),
    }
    return ImportanceProfile(*units, **{**about, **fields})


def selection_of(num_layers: int, phase: Phase, method: str = SEARCH) -> SelectionProfile:
    """Sets of every possible size: the FFNs from the first layer on, then the attentions."""
    selected = {
        count: Selected(
            attention=dict.fromkeys(range(count - num_layers), 1.1),
            ffn=dict.fromkeys(range(min(count, num_layers)), 1.1),
            divergence=0.1 * count,
            found_by="search",
        )
        for count in METHODS[method].counts(2 * num_layers - 1)
    }
    return SelectionProfile(
        selected=selected,
        phase=phase,
        num_layers=num_layers,
        cost=SearchCost(200, 2000, 2.0, 20, 200, 0.1),
        model="random",
        weights_fingerprint="none",
        dtype="float32",
        attn_implementation="sdpa",
        dataset="none",
        data_ids=("a", "b"),
        method=method,
    )
