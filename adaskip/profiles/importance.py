"""The importance profile of a model: IO similarity and scale of every sublayer.

For a sublayer with input `a` and output `b` on the residual stream, the similarity is cos(a, b) and the scale is
|b| / |a|, both computed per token and averaged over tokens. A sublayer of high similarity changes little, so it is of
low importance. Paper: Eq. (1)-(3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from adaskip.core.plan import Sublayer, every_sublayer
from adaskip.profiles.fields import Profile, ProfileError, built, check_record, finite, number, whole

UNITS = ("attention", "ffn", "layer")
ROUNDING = 1e-6  # a mean of cosines may be outside of [-1, 1] by this much


@dataclass(frozen=True)
class SublayerMeans:
    """Token means of one kind of unit (attention, FFN or whole layer), one entry per decoder layer.

    similarity: cosines, in [-1, 1]. scale: ratios of norms, at least 0. Raises ProfileError for other values, including
    NaN and infinity.
    """

    similarity: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("similarity", "scale"):
            if isinstance(values := getattr(self, name), (str, Mapping)) or not isinstance(values, Iterable):
                raise ProfileError(f"{name} must be a list of numbers; got {values!r}")
        similarity = (number("a similarity", x, -1 - ROUNDING, 1 + ROUNDING) for x in self.similarity)
        object.__setattr__(self, "similarity", tuple(similarity))
        object.__setattr__(self, "scale", tuple(finite("a scale", x, 0.0) for x in self.scale))
        if len(self.similarity) != len(self.scale):
            raise ProfileError(f"{len(self.similarity)} similarities but {len(self.scale)} scales")


@dataclass(frozen=True)
class ImportanceProfile(Profile):
    """IO similarity and scale of every attention sublayer, FFN sublayer and whole layer of one model.

    attention, ffn, layer: the means, per decoder layer. tokens: number of tokens in the means. phase: "prefill" for
    tokens of prompts, "decode" for tokens of the full model's own greedy answers to them, one token per forward over a
    KV cache; neither depends on the model's generation config.

    The other fields record the model and the data; None means not recorded. hidden_size: width of the residual stream.
    adapter: result of `adapters.active_adapters`, "" for none. prompts_begin_with_bos: whether every prompt began with
    the model's BOS token; also None for a model without BOS. config_fingerprint: of the model's configuration.
    tokenizer_files: digest of the checkpoint's tokenizer files, in profiles that a command keeps beside its runs.
    """

    FORMAT = "adaskip-importance-profile/1"
    FILE = "adaskip_profile.json"
    KIND = "importance profile"
    AGAIN = "calibrate this model"

    attention: SublayerMeans
    ffn: SublayerMeans
    layer: SublayerMeans
    tokens: int
    phase: Literal["prefill", "decode"]
    model: str
    weights_fingerprint: str
    dtype: str
    attn_implementation: str
    dataset: str
    data_ids: tuple[str, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    hidden_size: int | None = None
    adapter: str | None = None
    prompts_begin_with_bos: bool | None = None
    config_fingerprint: str | None = None
    tokenizer_files: str | None = None

    def __post_init__(self) -> None:
        check_record(self)
        lengths = {len(means.similarity) for means in (self.attention, self.ffn, self.layer)}
        if len(lengths) != 1 or 0 in lengths:
            raise ProfileError(f"attention, ffn and layer must have one entry per decoder layer; got {sorted(lengths)}")
        whole("tokens of a profile", self.tokens, 1)
        if self.phase not in ("prefill", "decode"):
            raise ProfileError(f"phase of a profile is prefill or decode; got {self.phase!r}")

    @property
    def num_layers(self) -> int:
        return len(self.layer.similarity)

    def similarity_of(self, sublayer: Sublayer) -> float:
        """Mean IO similarity of a sublayer. Paper: Eq. (2)."""
        return getattr(self, sublayer.kind).similarity[sublayer.layer]

    def scale_of(self, sublayer: Sublayer) -> float:
        """Mean norm ratio of a sublayer. Paper: Eq. (3)."""
        return getattr(self, sublayer.kind).scale[sublayer.layer]

    def sublayers(self) -> Iterator[Sublayer]:
        """All 2M sublayers in the order of computation."""
        return every_sublayer(self.num_layers)

    def ranking(self) -> list[Sublayer]:
        """All 2M sublayers, the most similar first; ties are in the order of computation."""
        return sorted(self.sublayers(), key=lambda sublayer: -self.similarity_of(sublayer))

    @classmethod
    def _parts(cls, record: dict[str, Any]) -> dict[str, Any]:
        return {unit: built(SublayerMeans, unit, record[unit]) for unit in UNITS if unit in record}
