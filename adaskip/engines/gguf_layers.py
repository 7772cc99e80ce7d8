"""A GGUF model in memory, and the smaller one that a plan leaves of it, as layers that llama.cpp can run.

llama.cpp's architecture `deci` has layers without attention, but drops the attention of a layer without FFN, and needs
an attention in its first layer. So the live sublayers are packed anew: an attention and the FFN that follows it are one
layer, wherever they come from. What then still lacks its other half gets one of zeros, which adds nothing: an FFN of
32 channels, or in the first layer an output projection without keys and values. Where every layer has both, the file
is an ordinary `llama`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from gguf.quants import quant_shape_to_byte_shape

from adaskip.core.plan import Sublayer, SublayerKind, every_sublayer
from adaskip.engines.errors import ExportError
from adaskip.engines.fold import Folded
from adaskip.engines.gguf_blocks import Kind

LLAMA, DECI = "llama", "deci"
LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
PARTS = {
    "attention": ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
    "ffn": ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
}
"""The tensors of a sublayer; the last one writes to the residual stream."""
OUTER = ("token_embd.weight", "rope_freqs.weight", "output_norm.weight", "output.weight")
FIELDS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
)
"""What a llama file says of its architecture and `deci` understands alike."""
ZERO_FFN_CHANNELS = 32
"""Width of an FFN of zeros: every backend multiplies rows of 32 numbers."""


@dataclass(frozen=True)
class Weight:
    """One tensor of a GGUF file, not yet read.

    kind: the type of what `load` gives, bytes `[..., row bytes]`. target: the type that it is written in. shape: of the
    weights, rows first. divisor: what the weights are divided by.
    """

    kind: Kind
    target: Kind
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]
    divisor: float = 1.0

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Of the bytes as written."""
        return quant_shape_to_byte_shape(self.shape, self.target)


@dataclass(frozen=True)
class GGUFModel:
    """What a GGUF file holds: `fields` by key without `general.architecture`, `weights` by name."""

    architecture: str
    fields: Mapping[str, GGUFValue]
    weights: Mapping[str, Weight]

    def number(self, field: str) -> Any:
        """A field of the architecture. Raises ExportError where it is missing."""
        if (found := self.fields.get(f"{self.architecture}.{field}")) is None:
            raise ExportError(f"the GGUF file says nothing of {self.architecture}.{field}")
        return found.value


class Layer(NamedTuple):
    """A layer of the smaller model: the layers of the whole model that attention and FFN come from, None for none."""

    attention: int | None
    ffn: int | None


def packed(live: tuple[Sublayer, ...]) -> list[Layer]:
    """The live sublayers in their order as layers: an FFN joins the attention right before it."""
    layers: list[Layer] = []
    for kind, index in live:
        if kind == "attention":
            layers.append(Layer(index, None))
        elif layers and layers[-1].ffn is None:
            layers[-1] = layers[-1]._replace(ffn=index)
        else:
            layers.append(Layer(None, index))
    return layers


def smaller(model: GGUFModel, folded: Folded) -> GGUFModel:
    """What a plan leaves of a llama model.

    Raises:
        ExportError: the model is not a plain llama, or has another number of layers.
    """
    check_llama(model, folded.num_layers)
    layers = packed(folded.live)
    weights = {name: model.weights[name] for name in OUTER if name in model.weights}
    for index, layer in enumerate(layers):
        weights |= _half(model, folded, index, "attention", layer.attention)
        weights |= _half(model, folded, index, "ffn", layer.ffn)
    if layers[0].attention is None:
        weights |= _zero_attention(model)
    for index, layer in enumerate(layers):
        if layer.ffn is None:
            weights |= _zero_ffn(model, index)
    return GGUFModel(*_fields(model, folded, layers), weights)


def check_llama(model: GGUFModel, num_layers: int) -> None:
    """ExportError unless a model is a plain llama of so many layers that `deci` can express."""
    if model.architecture != LLAMA:
        raise ExportError(f"a GGUF file of architecture {model.architecture!r} cannot be exported; allowed: llama")
    known = {f"{LLAMA}.{field}" for field in FIELDS}
    if strange := sorted(key for key in model.fields if key.startswith(f"{LLAMA}.") and key not in known):
        raise ExportError(f"the GGUF file has {strange[0]}, which llama.cpp's deci does not know: it is no plain llama")
    if model.number("block_count") != num_layers:
        raise ExportError(f"the GGUF file has {model.number('block_count')} layers, the plan is for {num_layers}")
    for name in model.weights:
        match = LAYER_TENSOR.fullmatch(name)
        if name not in OUTER and (match is None or not any(match[2] in parts for parts in PARTS.values())):
            raise ExportError(f"the GGUF file has a tensor {name}, which is not of a plain llama")


def _half(model: GGUFModel, folded: Folded, index: int, kind: SublayerKind, layer: int | None) -> dict[str, Weight]:
    """The tensors of a live sublayer under their new names, its output divided."""
    if layer is None:
        return {}
    divisor = folded.divisors[Sublayer(kind, layer)]
    found = {}
    for part in PARTS[kind]:
        of_output = part == PARTS[kind][-1]
        for end in ("weight", "bias"):
            if (weight := model.weights.get(f"blk.{layer}.{part}.{end}")) is not None:
                found[f"blk.{index}.{part}.{end}"] = replace(weight, divisor=divisor) if of_output else weight
        if f"blk.{index}.{part}.weight" not in found:
            raise ExportError(f"the GGUF file lacks tensor blk.{layer}.{part}.weight")
    return found


def _zero_attention(model: GGUFModel) -> dict[str, Weight]:
    """A first layer's attention that adds zeros and has no keys and values: a norm and a projection alone."""
    width = model.number("embedding_length")
    kind = model.weights["blk.0.attn_q.weight"].target  # its rows have that width
    return {
        "blk.0.attn_norm.weight": _zeros(Kind.F32, (width,)),
        "blk.0.attn_output.weight": _zeros(kind, (width, width)),
    }


def _zero_ffn(model: GGUFModel, index: int) -> dict[str, Weight]:
    width = model.number("embedding_length")
    wide = (ZERO_FFN_CHANNELS, width)
    shapes = {"ffn_norm": (width,), "ffn_gate": wide, "ffn_up": wide, "ffn_down": wide[::-1]}
    return {f"blk.{index}.{part}.weight": _zeros(Kind.F32, shape) for part, shape in shapes.items()}


def _zeros(kind: Kind, shape: tuple[int, ...]) -> Weight:
    """Weights of 0: so are bytes of 0 in every type, whose scales they are."""
    return Weight(kind, kind, shape, lambda: np.zeros(quant_shape_to_byte_shape(shape, kind), np.uint8))


def _fields(model: GGUFModel, folded: Folded, layers: list[Layer]) -> tuple[str, dict[str, GGUFValue]]:
    """Architecture and fields of the smaller model."""
    whole = all(None not in layer for layer in layers)
    architecture = LLAMA if whole else DECI
    prefix = f"{LLAMA}."
    fields = {
        f"{architecture}.{key.removeprefix(prefix)}" if key.startswith(prefix) else key: value
        for key, value in model.fields.items()
    }
    own = {"block_count": _whole_number(len(layers)), **({} if whole else dict(_per_layer(model, layers)))}
    fields |= {f"{architecture}.{key}": value for key, value in own.items()}
    skipped = [sublayer for sublayer in every_sublayer(folded.num_layers) if sublayer not in folded.divisors]
    record = {kind: [layer for of, layer in skipped if of == kind] for kind in PARTS}
    told = json.dumps({"num_layers": folded.num_layers, **record})
    return architecture, fields | {"adaskip.skipped": GGUFValue(told, GGUFValueType.STRING)}


def _per_layer(model: GGUFModel, layers: list[Layer]) -> Iterator[tuple[str, GGUFValue]]:
    heads, kv_heads = model.number("attention.head_count"), model.number("attention.head_count_kv")
    channels = model.number("feed_forward_length")
    length = model.fields.get("llama.attention.key_length")
    head_size = model.number("embedding_length") // heads if length is None else length.value
    yield "attention.key_length", _whole_number(head_size)
    yield "attention.value_length", _whole_number(head_size)
    has_heads = [layer.attention is not None or index == 0 for index, layer in enumerate(layers)]
    yield "attention.head_count", _numbers([heads * has for has in has_heads])
    yield "attention.head_count_kv", _numbers([kv_heads * (layer.attention is not None) for layer in layers])
    yield "feed_forward_length", _numbers([ZERO_FFN_CHANNELS if layer.ffn is None else channels for layer in layers])


def _whole_number(value: int) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.UINT32)


def _numbers(values: list[int]) -> GGUFValue:
    return GGUFValue(values, GGUFValueType.ARRAY, GGUFValueType.INT32)
