"""Weights in GGUF's types, divided by their scales alone and compared with what the package gguf reads out of them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

from adaskip.engines.errors import ExportError
from adaskip.engines.gguf_blocks import PLAIN, SCALES, Kind, converted, divided, relative_error, values


def random_blocks(kind: Kind, rows: int = 6, blocks: int = 5, scale: float = 0.01) -> np.ndarray:
    """Bytes of random blocks, their scales about `scale` in size, [rows, bytes]."""
    draw = np.random.default_rng(0)
    if kind in PLAIN:
        return quantize(draw.normal(0, scale, (rows, 64)).astype(np.float32), kind).view(np.uint8)
    start, count = SCALES[kind]
    data = draw.integers(0, 256, (rows * blocks, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    data[:, start : start + 2 * count] = (
        draw.uniform(scale / 2, scale, (len(data), count)).astype(np.float16).view(np.uint8)
    )
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", [*PLAIN, *SCALES], ids=lambda kind: kind.name)
def test_a_power_of_two_divides_every_weight_exactly(kind):
    data = random_blocks(kind)
    assert np.array_equal(dequantize(divided(data, kind, 0.25), kind), dequantize(data, kind) * 4)


@pytest.mark.parametrize("kind", [*PLAIN, *SCALES], ids=lambda kind: kind.name)
def test_any_divisor_is_right_to_the_rounding_of_a_scale_and_changes_nothing_else(kind):
    data = random_blocks(kind)
    before = data.copy()
    new = divided(data, kind, 1.37)
    assert np.array_equal(data, before)
    limit = 4e-3 if kind == Kind.BF16 else 1e-3
    assert relative_error(new, kind, values(data, kind, 1.37)) < limit
    assert relative_error(new, kind, values(data, kind)) > 0.2
    if kind in SCALES:
        start, count = SCALES[kind]
        same = np.ones(GGML_QUANT_SIZES[kind][1], dtype=bool)
        same[start : start + 2 * count] = False
        blocks, old = (array.reshape(-1, len(same)) for array in (new, data))
        assert np.array_equal(blocks[:, same], old[:, same])


@pytest.mark.parametrize("kind", [Kind.F16, *SCALES], ids=lambda kind: kind.name)
def test_what_overflows_half_precision_is_refused(kind):
    with pytest.raises(ExportError, match="too large for their format"):
        divided(random_blocks(kind, scale=60000.0), kind, 0.1)


def test_scales_too_small_for_half_precision_show_in_the_error():
    data = random_blocks(Kind.Q6_K, scale=1e-6)
    assert relative_error(divided(data, Kind.Q6_K, 9.3), Kind.Q6_K, values(data, Kind.Q6_K, 9.3)) > 0.02


def test_types_whose_scales_are_not_known_are_refused_unless_nothing_changes():
    data = np.zeros((2, GGML_QUANT_SIZES[Kind.IQ1_M][1]), np.uint8)
    assert divided(data, Kind.IQ1_M, 1.0) is data
    with pytest.raises(ExportError, match="IQ1_M cannot be divided; allowed: F32"):
        divided(data, Kind.IQ1_M, 2.0)


@pytest.mark.parametrize("target", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
def test_plain_weights_are_converted_in_chunks_as_gguf_quantises_them(kind, target, monkeypatch):
    monkeypatch.setattr("adaskip.engines.gguf_blocks.CHUNK_WEIGHTS", 128)  # two rows
    data = random_blocks(kind, rows=5)
    whole = quantize(dequantize(data, kind) / np.float32(1.25), target).view(np.uint8)
    new = converted(data, kind, target, 1.25)
    assert relative_error(new, target, values(data, kind, 1.25)) <= {Kind.Q8_0: 0.01, Kind.BF16: 4e-3}.get(target, 1e-3)
    if kind != target:
        assert np.array_equal(new, whole)


def test_every_type_of_the_guides_list_is_known():
    named = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
    assert {gguf.GGMLQuantizationType[name] for name in named} <= set(SCALES)
