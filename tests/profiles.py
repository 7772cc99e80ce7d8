"""Importance profiles with chosen similarities."""

from __future__ import annotations

from collections.abc import Sequence

from adaskip.importance import ImportanceProfile, SublayerMeans


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
