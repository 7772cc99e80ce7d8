"""An assumed profile for timing models that have not been calibrated.

Speed depends on the number of skipped sublayers of each kind and hardly on which ones. So a model without a profile
gets a set like those the paper reports, and every result states that it was assumed.
"""

from __future__ import annotations

from adaskip.core.plan import KINDS, Sublayer
from adaskip.profiles.importance import ROUNDING, ImportanceProfile, SublayerMeans

ATTENTIONS_PER_FFN = 3
ASSUMED = f"assumed: {ATTENTIONS_PER_FFN} attention sublayers to 1 FFN, from the last layer down; no FFN joins online"
ASSUMED_SCALE = 1.05
"""Any value other than 1: a scale of 1 would not be applied and so cost no time."""


def assumed_ranking(num_layers: int) -> list[Sublayer]:
    """All sublayers in the order in which they are skipped: mostly attention, from the last layer down."""
    attention = [Sublayer("attention", layer) for layer in reversed(range(num_layers))]
    ffn = [Sublayer("ffn", layer) for layer in reversed(range(num_layers))]
    ranking: list[Sublayer] = []
    while attention:
        ranking += attention[:ATTENTIONS_PER_FFN] + ffn[:1]
        attention, ffn = attention[ATTENTIONS_PER_FFN:], ffn[1:]
    return ranking + ffn


def assumed_profile(num_layers: int) -> ImportanceProfile:
    """A profile with the ranking of `assumed_ranking`.

    Its similarities are at least 1, above every cosine, so that no FFN exceeds them in a learning window and joins the
    set: windows measured on random weights are meaningless.
    """
    ranking = assumed_ranking(num_layers)
    similarity = {sublayer: 1.0 + ROUNDING * (1.0 - rank / len(ranking)) for rank, sublayer in enumerate(ranking)}
    scales = (ASSUMED_SCALE,) * num_layers
    attention, ffn = (
        SublayerMeans(tuple(similarity[Sublayer(kind, layer)] for layer in range(num_layers)), scales) for kind in KINDS
    )
    return ImportanceProfile(
        attention=attention,
        ffn=ffn,
        layer=attention,
        tokens=1,
        phase="prefill",
        model="none",
        weights_fingerprint="none",
        dtype="none",
        attn_implementation="none",
        dataset=ASSUMED,
        data_ids=(),
    )
