"""Which sublayers are skipped when nothing was measured, and in which share of the decode steps each one is.

Speed depends on how many sublayers of which kind are skipped and hardly on which; so a model without a profile gets
a set like those the paper reports for its models, and every result says that it was assumed.
"""

from __future__ import annotations

from collections.abc import Collection

from adaskip.importance import ROUNDING, ImportanceProfile, SublayerMeans
from adaskip.plan import SkipPlan, Sublayer, SublayerKind
from adaskip.strategies import Strategy

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


def decode_plans(strategy: Strategy, steps: int, online_ffns: Collection[int]) -> list[SkipPlan]:
    """What is skipped in each decode step of one request, given the FFNs that joined after its learning window.

    An attention the prompt skipped has no K/V and stays skipped.
    """
    floor = strategy.prefill_plan.attention_only()
    joined = SkipPlan(ffn=frozenset(online_ffns))
    plans = []
    for step in range(1, steps + 1):
        plan = strategy.decode_plan(step).union(floor)
        floor = plan.attention_only()
        plans.append(plan.union(joined) if step > strategy.window_tokens else plan)
    return plans


def shares(plans: Collection[SkipPlan], num_layers: int) -> dict[str, list[float]]:
    """In which share of the plans each sublayer is skipped: kind -> [M]."""
    return {
        kind: [sum(Sublayer(kind, layer) in plan for plan in plans) / max(len(plans), 1) for layer in range(num_layers)]
        for kind in KINDS
    }
