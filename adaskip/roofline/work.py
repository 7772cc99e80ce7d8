"""What one forward of one sublayer costs at least: floating-point operations, and bytes through the device's memory.

A matrix is read once, its input and output once; norms, activation functions and residual additions ride along with
them. Attention reads every key and value it sees once and keeps its scores on the chip ("fused": FlashAttention,
SDPA), or sends them through memory ("eager": transformers' plain implementation and the remote code of its time).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Required, TypedDict, Unpack, get_args

from adaskip.core.plan import SublayerKind
from adaskip.roofline.ceilings import Ceilings
from adaskip.roofline.shape import ModelShape, SublayerShape

AttentionImplementation = Literal["fused", "eager"]
IMPLEMENTATIONS: tuple[AttentionImplementation, ...] = get_args(AttentionImplementation)

EAGER_PASSES = 8
"""Passes over the score matrix: written by q k^T, read and written by the scaling and by the mask, read and written by
the softmax, read by the product with v."""
EAGER_FLOAT32_BYTES = 8
"""In 16-bit models the softmax leaves float32 scores, which the cast back reads."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes moved."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, ceilings: Ceilings) -> float:
        """The longer of computing and moving, since the two overlap."""
        return max(self.flops / ceilings.matmul_flops, self.bytes / ceilings.bandwidth)


def attention_work(
    shape: ModelShape,
    *,
    tokens: int,
    context: int,
    batch_size: int = 1,
    bytes_per_value: int = 2,
    layer: int = 0,
    attention: AttentionImplementation = "fused",
) -> Work:
    """One attention sublayer: `tokens` new tokens per row, which see `context` positions, themselves included.

    Causal attention computes only the half of the scores it needs; the eager one computes and masks the other half.
    """
    _check(tokens, context, batch_size)
    if attention not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {attention!r}; allowed: {', '.join(IMPLEMENTATIONS)}")
    sublayer = shape.attention[layer]
    width = sublayer.num_heads * sublayer.head_dim
    held = context if sublayer.window is None else min(context, sublayer.window - 1 + tokens)
    pairs = tokens * held if attention == "eager" else _pairs(tokens, context, sublayer.window)
    kv_values = 2 * sublayer.num_kv_heads * sublayer.head_dim * held
    values = batch_size * (kv_values + 2 * width * tokens)  # K/V and queries in, heads' outputs out
    scores_bytes = 0
    if attention == "eager":
        moved = EAGER_PASSES * bytes_per_value + (EAGER_FLOAT32_BYTES if bytes_per_value < 4 else 0)
        scores_bytes = batch_size * sublayer.num_heads * tokens * held * moved
    products = Work(4 * width * pairs * batch_size, values * bytes_per_value + scores_bytes)
    return _matrices_work(sublayer, tokens * batch_size, bytes_per_value) + products


def kv_work(shape: ModelShape, *, tokens: int, batch_size: int = 1, bytes_per_value: int = 2, layer: int = 0) -> Work:
    """A skipped attention that keeps its K/V: the projections to queries, which nothing uses, keys and values."""
    _check(tokens, tokens, batch_size)
    attention, width = shape.attention[layer], shape.hidden_size
    outputs = (heads * attention.head_dim for heads in (attention.num_heads, *2 * (attention.num_kv_heads,)))
    projections = SublayerShape(matrices=tuple((size, width) for size in outputs))
    return _matrices_work(projections, tokens * batch_size, bytes_per_value)


def ffn_work(shape: ModelShape, *, tokens: int, batch_size: int = 1, bytes_per_value: int = 2, layer: int = 0) -> Work:
    """One FFN sublayer: `tokens` new tokens per row."""
    _check(tokens, tokens, batch_size)
    return _matrices_work(shape.ffn[layer], tokens * batch_size, bytes_per_value)


def head_work(
    shape: ModelShape, *, tokens: int, batch_size: int = 1, bytes_per_value: int = 2, logits: bool = True
) -> Work:
    """Around the layers: the embeddings of `tokens` new tokens per row, and the logits of each row's last one."""
    _check(tokens, tokens, batch_size)
    embeddings = Work(0, 2 * shape.hidden_size * tokens * batch_size * bytes_per_value)
    if not logits:
        return embeddings
    head = SublayerShape(matrices=((shape.vocab_size, shape.hidden_size),), vectors=shape.final_vectors)
    return embeddings + _matrices_work(head, batch_size, bytes_per_value)


class Running(TypedDict, total=False):
    """How a model is run: rows and the ceilings of the device, bytes of a value, and how attention is computed."""

    ceilings: Required[Ceilings]
    batch_size: int
    bytes_per_value: int
    attention: AttentionImplementation


def sublayer_seconds(
    shape: ModelShape, kind: SublayerKind, *, tokens: int, context: int, layer: int = 0, **running: Unpack[Running]
) -> float:
    """The least time of one forward of one sublayer."""
    sizes: dict[str, Any] = {"tokens": tokens, "layer": layer, **running}
    ceilings, attention = sizes.pop("ceilings"), sizes.pop("attention", "fused")
    if kind == "ffn":
        return ffn_work(shape, **sizes).seconds(ceilings)
    return attention_work(shape, **sizes, context=context, attention=attention).seconds(ceilings)


def _matrices_work(sublayer: SublayerShape, rows: int, bytes_per_value: int) -> Work:
    values = sublayer.weights_read(rows) + rows * sublayer.passed
    return Work(2 * sublayer.multiplied * rows, values * bytes_per_value)


def _pairs(tokens: int, context: int, window: int | None) -> int:
    """Query-key pairs of the last `tokens` of `context` positions, each of which sees itself and what is before it."""
    if window is None:
        return tokens * context - tokens * (tokens - 1) // 2
    first = context - tokens
    growing = max(0, min(context, window) - first)  # queries that do not fill their window yet
    return growing * first + growing * (growing + 1) // 2 + (tokens - growing) * window


def _check(tokens: int, context: int, batch_size: int) -> None:
    if tokens < 1 or batch_size < 1 or context < tokens:
        raise ValueError(
            f"need at least 1 new token and 1 row, and a context that includes the new tokens; got {tokens} tokens, "
            f"{batch_size} rows, context {context}"
        )
