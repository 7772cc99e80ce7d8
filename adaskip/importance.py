"""Importance of sublayers: IO similarity and scale, and the profile that keeps them.

For a sublayer with input `a` and output `b` on the residual stream, similarity is cos(a, b) and scale is |b| / |a|,
both per token and averaged over tokens. High similarity means little change: importance is its complement.
Paper: Eq. (1)-(3).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaskip.files import write_text_atomic
from adaskip.fingerprint import weights_fingerprint
from adaskip.plan import Sublayer

FORMAT = "adaskip-importance-profile/1"
ROWS_PER_CHUNK = 128  # on the CPU, float32 copies of this many rows stay in the L2 cache


class ProfileError(ValueError):
    """A profile that cannot be read, or that was measured on another model."""


def norm(x: Tensor) -> Tensor:
    """|x| per token in float32 of [..., D], any floating dtype, without a float32 copy."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


class RecentNorms:
    """`norm`, remembered of the last three tensors: a sublayer's input is the output of the one before, and a layer's
    input and output are those of its sublayers. So each tensor of the residual stream is read once."""

    def __init__(self) -> None:
        self.known: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        for tensor, known in self.known:
            if tensor is x:
                return known
        self.known = [*self.known[-2:], (x, norm(x))]
        return self.known[-1][1]

    def forget(self) -> None:
        """Let go of the tensors."""
        self.known = []


def cosine_and_ratio(
    a: Tensor, b: Tensor, change: Tensor | None = None, norm_of: Callable[[Tensor], Tensor] = norm
) -> tuple[Tensor, Tensor]:
    """Per-token cos(a, b) and |b| / |a| in float32, without a host synchronisation.

    a, b: [..., D], any floating dtype. change: b - a as the sublayer computed it, if at hand; it lets CUDA get by
    with three norms and no float32 copies, since <a, b> = (|a|^2 + |b|^2 - |b - a|^2) / 2. norm_of: `norm`, or what
    remembers it. Returns two tensors [...].
    A token whose input or output is all zeros has similarity 0 and ratio 0: nothing can be said of it.
    Paper: Eq. (1), and the summand of Eq. (3).
    """
    norm_a, norm_b = norm_of(a), norm_of(b)
    if a.is_cuda:
        norm_change = norm(b - a if change is None else change)
        dot = (norm_a.square() + norm_b.square() - norm_change.square()) / 2
    else:
        dot = _chunked_dot(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])).reshape(a.shape[:-1])
    defined = (norm_a > 0) & (norm_b > 0)
    cosine = torch.where(defined, dot / (norm_a * norm_b), 0.0).clamp_(-1.0, 1.0)
    return cosine, torch.where(defined, norm_b / norm_a, 0.0)


def _chunked_dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of the rows of two [T, D] tensors, in float32."""
    chunks = zip(a.split(ROWS_PER_CHUNK), b.split(ROWS_PER_CHUNK), strict=True)
    return torch.cat([torch.linalg.vecdot(rows_a.float(), rows_b.float()) for rows_a, rows_b in chunks])


@dataclass(frozen=True)
class SublayerMeans:
    """Token means of one kind of unit, one entry per decoder layer."""

    similarity: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "similarity", tuple(float(x) for x in self.similarity))
        object.__setattr__(self, "scale", tuple(float(x) for x in self.scale))
        if len(self.similarity) != len(self.scale):
            raise ProfileError(f"{len(self.similarity)} similarities but {len(self.scale)} scales")
        if not all(math.isfinite(x) for x in self.similarity + self.scale):
            raise ProfileError("similarities and scales must be finite; the model's activations overflow or are NaN")


@dataclass(frozen=True)
class ImportanceProfile:
    """IO similarity and scale of every attention sublayer, FFN sublayer and whole layer of one model.

    attention, ffn, layer: the means, per decoder layer. tokens: how many tokens they are means of. phase: whether
    those were tokens of prompts or generated ones. The rest says what was measured on what, so that it can be trusted.
    """

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_ids", tuple(str(i) for i in self.data_ids))
        lengths = {len(means.similarity) for means in (self.attention, self.ffn, self.layer)}
        if len(lengths) != 1 or 0 in lengths:
            raise ProfileError(f"attention, ffn and layer must have one entry per decoder layer; got {sorted(lengths)}")
        if self.tokens < 1:
            raise ProfileError(f"a profile needs at least one token; got {self.tokens}")
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
        for layer in range(self.num_layers):
            yield Sublayer("attention", layer)
            yield Sublayer("ffn", layer)

    def ranking(self) -> list[Sublayer]:
        """All 2M sublayers, the most similar first; equals in the order of computation."""
        return sorted(self.sublayers(), key=lambda sublayer: -self.similarity_of(sublayer))

    def check_num_layers(self, num_layers: int) -> None:
        """Raise ProfileError unless the profile is of a model with that many layers."""
        if num_layers != self.num_layers:
            raise ProfileError(f"profile of {self.model} has {self.num_layers} layers, the model has {num_layers}")

    def check_fits(self, model: nn.Module) -> None:
        """Raise ProfileError unless `model` has the very weights the profile was measured on."""
        self.check_num_layers(model.config.get_text_config(decoder=True).num_hidden_layers)  # pyright: ignore
        fingerprint = weights_fingerprint(model)
        if fingerprint != self.weights_fingerprint:
            raise ProfileError(
                f"profile was measured on {self.model} with weights {self.weights_fingerprint}, "
                f"this model's weights are {fingerprint}; calibrate this model"
            )

    def save(self, path: str | Path) -> Path:
        """Write the profile as JSON, whole or not at all."""
        record = {"format": FORMAT, **asdict(self)}
        return write_text_atomic(path, json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> ImportanceProfile:
        """Read a saved profile; with `model`, refuse one that was not measured on it.

        Raises FileNotFoundError if there is no file and ProfileError if it is not a profile or does not fit.
        """
        fields = read_fields(path, FORMAT, "an importance profile")
        try:
            for unit in ("attention", "ffn", "layer"):
                fields[unit] = SublayerMeans(**fields[unit])
            profile = cls(**fields)
        except (KeyError, TypeError) as error:
            raise ProfileError(f"{path} is not a whole importance profile: {error}") from error
        if model is not None:
            profile.check_fits(model)
        return profile


def read_fields(path: str | Path, expected_format: str, what: str) -> dict[str, Any]:
    """The fields of a profile's file, but for its format.

    Raises FileNotFoundError if there is no file and ProfileError if it is not `what`, a profile of that format.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ProfileError(f"{path} is not JSON: {error}") from error
    found = record.pop("format", None) if isinstance(record, dict) else type(record).__name__
    if found != expected_format:
        raise ProfileError(f"{path} is not {what}: format is {found!r}, expected {expected_format!r}")
    return record
