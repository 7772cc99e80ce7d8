"""Weights as GGUF stores them, divided by a number without being quantised anew: a block's scales are divided.

Every tensor here is its bytes, uint8 `[..., row bytes]`, and a GGML type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from adaskip.engines.errors import ExportError

Kind = GGMLQuantizationType


class Scales(NamedTuple):
    """Where the half-precision numbers of a block lie by which all of its weights are multiplied."""

    offset: int
    count: int = 1


SCALES: dict[Kind, Scales] = {
    **dict.fromkeys((Kind.Q4_0, Kind.Q5_0, Kind.Q8_0, Kind.IQ4_NL, Kind.IQ4_XS), Scales(0)),
    **dict.fromkeys((Kind.Q4_1, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K), Scales(0, 2)),  # scale and minimum
    Kind.Q2_K: Scales(80, 2),
    Kind.Q3_K: Scales(108),
    Kind.Q6_K: Scales(208),
}
PLAIN = (Kind.F32, Kind.F16, Kind.BF16)
CHUNK_WEIGHTS = 1 << 22
"""Weights that are dequantised at once, at most, unless a row has more."""


def divided(data: np.ndarray, kind: Kind, divisor: float) -> np.ndarray:
    """The bytes of all weights divided by `divisor`: exact but for the rounding of each weight or scale.

    Raises:
        ExportError: a type whose blocks cannot be scaled, or a weight or scale that its number format cannot hold.
    """
    if divisor == 1.0:
        return data
    if kind == Kind.BF16:
        return quantize(dequantize(data, kind) / np.float32(divisor), kind)
    if kind in PLAIN:
        return _quotient(data.view(np.float32 if kind == Kind.F32 else np.float16), divisor).view(np.uint8)
    if kind not in SCALES:
        allowed = ", ".join(known.name for known in (*PLAIN, *SCALES))
        raise ExportError(f"weights of type {kind.name} cannot be divided; allowed: {allowed}")
    start, count = SCALES[kind]
    blocks = data.reshape(-1, GGML_QUANT_SIZES[kind][1]).copy()
    scales = blocks[:, start : start + 2 * count]
    scales[:] = _quotient(scales.copy().view(np.float16), divisor).view(np.uint8)
    return blocks.reshape(data.shape)


def _quotient(numbers: np.ndarray, divisor: float) -> np.ndarray:
    with np.errstate(over="ignore"):
        quotient = (numbers / np.float64(divisor)).astype(numbers.dtype)
    if (lost := np.isinf(quotient) & np.isfinite(numbers)).any():
        raise ExportError(
            f"{lost.sum()} of {lost.size} {numbers.dtype} weights or scales divided by {divisor:g} are too large for "
            "their format; allowed: a plan with larger scales, or an export from the unquantised checkpoint"
        )
    return quotient


def converted(data: np.ndarray, kind: Kind, target: Kind, divisor: float = 1.0) -> np.ndarray:
    """The bytes of weights divided by `divisor` in type `target`; only what is plain can change its type."""
    if kind == target:
        return divided(data, kind, divisor)
    assert kind in PLAIN, "nothing is requantised"
    chunks = [quantize(np.ascontiguousarray(chunk), target).view(np.uint8) for chunk in values(data, kind, divisor)]
    return np.concatenate(chunks)


def values(data: np.ndarray, kind: Kind, divisor: float = 1.0) -> Iterator[np.ndarray]:
    """The weights that bytes stand for, divided by `divisor`, float32, some rows at a time."""
    width = data.shape[-1] * GGML_QUANT_SIZES[kind][0] // GGML_QUANT_SIZES[kind][1]
    step = max(1, CHUNK_WEIGHTS // width) if data.ndim > 1 else len(data)
    for start in range(0, len(data), step):
        chunk = dequantize(np.ascontiguousarray(data[start : start + step]), kind)
        yield chunk if divisor == 1.0 else chunk / np.float32(divisor)


def relative_error(data: np.ndarray, kind: Kind, wanted: Iterator[np.ndarray]) -> float:
    """Root of the mean squared error of stored weights against those `wanted`, as a fraction of the latter's."""
    error = size = 0.0
    for found, right in zip(values(data, kind), wanted, strict=True):
        error += float(np.square(found - right, dtype=np.float64).sum())
        size += float(np.square(right, dtype=np.float64).sum())
    return (error / size) ** 0.5 if size else error**0.5
