"""The profile that stands in when nothing was measured.

Speed depends on how many sublayers of which kind are skipped and hardly on which; so a model without a profile gets
a set like those the paper reports for its models, and every result says that it was assumed.
"""

from __future__ import annotations

from adaskip.core.plan import Sublayer, SublayerKind
from adaskip.profiles.importance import ROUNDING, ImportanceProfile, SublayerMeans

ATTENTIONS_PER_FFN = 3
ASSUMED = f"assumed: {ATTENTIONS_PER_FFN} attention sublayers to 1 FFN, from the last layer down; no FFN joins online"
ASSUMED_SCALE = 1.05
"""Any scale but 1, which would cost nothing to apply."""
KINDS: tuple[SublayerKind, SublayerKind] = ("attention", "ffn")


def assumed_ranking(num_layers: int) -> list[Sublayer]:
    """All sublayers, those to be skipped first in front: mostly attention, late layers."""
    attention = [Sublayer("attention", layer) for layer in reversed(range(num_layers))]
    ffn = [Sublayer("ffn", layer) for layer in reversed(range(num_layers))]
    ranking: list[Sublayer] = []
    while attention:
        ranking += attention[:ATTENTIONS_PER_FFN] + ffn[:1]
        attention, ffn = attention[ATTENTIONS_PER_FFN:], ffn[1:]
    return ranking + ffn


def assumed_profile(num_layers: int) -> ImportanceProfile:
    """A profile that ranks as `assumed_ranking` does.

    Its similarities are above every cosine, as far as rounding may bring one, so that no FFN is more similar in a
    learning window: what a window finds on random weights means nothing.
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
