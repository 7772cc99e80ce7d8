"""The minimum cost of one forward of one sublayer: floating-point operations, and bytes through the device's memory.

A matrix and its input and output are each moved once; norms, activation functions and residual additions are fused with
them. Attention reads every key and value it sees once, and either keeps its scores on the chip ("fused":
FlashAttention, SDPA) or moves them through memory ("eager": the plain implementation of transformers and older remote
code).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from adaskip.core.plan import SublayerKind
from adaskip.roofline.ceilings import Ceilings
from adaskip.roofline.shape import ModelShape, SublayerShape

AttentionImplementation = Literal["fused", "eager"]
IMPLEMENTATIONS: tuple[AttentionImplementation, ...] = get_args(AttentionImplementation)

EAGER_PASSES = 8
"""Passes over the score matrix: written by q k^T, read and written by the scaling and by the mask, read and written by
the softmax, read by the product with v."""
EAGER_FLOAT32_BYTES = 8
"""In 16-bit models the softmax writes float32 scores, which the cast to 16 bits reads."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes moved."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, ceilings: Ceilings) -> float:
        """The longer of compute time and memory time, since the two overlap."""
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
    """One attention sublayer: `tokens` new tokens per row, which see `context` positions, including themselves.

    Fused causal attention computes only the needed half of the scores; eager attention also computes and masks the
    other half.
    """
    _check(tokens, context, batch_size)
    _check_implementation(attention)
    sublayer = shape.attention[layer]
    width = sublayer.num_heads * sublayer.head_dim
    held = context if sublayer.window is None else min(context, sublayer.window - 1 + tokens)
    pairs = tokens * held if attention == "eager" else _pairs(tokens, context, sublayer.window)
    kv_values = 2 * sublayer.num_kv_heads * sublayer.head_dim * held
    values = batch_size * (kv_values + 2 * width * tokens)  # K/V and queries in, heads' outputs out
    scores = batch_size * sublayer.num_heads * tokens * held
    scores_bytes = scores * _eager_bytes(bytes_per_value) if attention == "eager" else 0
    products = Work(4 * width * pairs * batch_size, values * bytes_per_value + scores_bytes)
    return _matrices_work(sublayer, tokens * batch_size, bytes_per_value) + products


def ffn_work(shape: ModelShape, *, tokens: int, batch_size: int = 1, bytes_per_value: int = 2, layer: int = 0) -> Work:
    """One FFN sublayer: `tokens` new tokens per row."""
    _check(tokens, tokens, batch_size)
    return _matrices_work(shape.ffn[layer], tokens * batch_size, bytes_per_value)


def head_work(shape: ModelShape, *, tokens: int, batch_size: int = 1, bytes_per_value: int = 2) -> Work:
    """The work outside of the layers: embeddings of `tokens` new tokens per row, and logits of each row's last one."""
    _check(tokens, tokens, batch_size)
    embeddings = 2 * shape.hidden_size * tokens * batch_size
    head = SublayerShape(matrices=((shape.vocab_size, shape.hidden_size),), vectors=shape.final_vectors)
    return Work(0, embeddings * bytes_per_value) + _matrices_work(head, batch_size, bytes_per_value)


def sublayer_seconds(
    shape: ModelShape,
    kind: SublayerKind,
    *,
    tokens: int,
    context: int,
    batch_size: int = 1,
    ceilings: Ceilings,
    bytes_per_value: int = 2,
    layer: int = 0,
    attention: AttentionImplementation = "fused",
) -> float:
    """The minimum time of one forward of one sublayer."""
    sizes = {"tokens": tokens, "batch_size": batch_size, "bytes_per_value": bytes_per_value, "layer": layer}
    if kind == "ffn":
        return ffn_work(shape, **sizes).seconds(ceilings)
    return attention_work(shape, **sizes, context=context, attention=attention).seconds(ceilings)


def _matrices_work(sublayer: SublayerShape, rows: int, bytes_per_value: int) -> Work:
    values = sublayer.weights_read(rows) + rows * sublayer.passed
    return Work(2 * sublayer.multiplied * rows, values * bytes_per_value)


def _pairs(tokens: int, context: int, window: int | None) -> int:
    """Query-key pairs of the last `tokens` of `context` positions, each of which sees itself and earlier positions."""
    if window is None:
        return tokens * context - tokens * (tokens - 1) // 2
    first = context - tokens
    growing = max(0, min(context, window) - first)  # queries that do not fill their window yet
    return growing * first + growing * (growing + 1) // 2 + (tokens - growing) * window


def _eager_bytes(bytes_per_value: int) -> int:
    """Bytes that one score moves through memory."""
    return EAGER_PASSES * bytes_per_value + (EAGER_FLOAT32_BYTES if bytes_per_value < 4 else 0)


def _check(tokens: int, context: int, batch_size: int) -> None:
    if tokens < 1 or batch_size < 1 or context < tokens:
        raise ValueError(
            f"need at least 1 new token and 1 row, and a context that includes the new tokens; got {tokens} tokens, "
            f"{batch_size} rows, context {context}"
        )


def _check_implementation(attention: str) -> None:
    if attention not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {attention!r}; allowed: {', '.join(IMPLEMENTATIONS)}")
