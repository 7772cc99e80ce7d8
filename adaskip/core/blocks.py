"""Recognises how a decoder layer is built from its two sublayers, and proves it on the layer itself.

Every supported layer computes `h + f(h)` twice, with f = post_norm(module(pre_norm(h))); families differ in which
norms exist and what they are called. Names alone cannot tell a parallel residual from a sequential one, so a
structure is accepted only if it reproduces the stock layer bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaskip.core import hf
from adaskip.core.decoder import (
    UnsupportedModelError,
    decoder_layers,
    execution_device,
    find_decoder,
    restore_attribute,
)
from adaskip.core.probe import LayerForward, LayerProbe
from adaskip.core.quiet import quiet

__all__ = [
    "BlockStructure",
    "Proved",
    "Sublayers",
    "UnsupportedModelError",
    "cache_slots",
    "decoder_layers",
    "execution_device",
    "find_decoder",
    "find_structure",
    "known_structures",
    "probe_layers",
    "register_structure",
    "restore_attribute",
]

OUTPUT_SCALAR = "layer_scalar"


@dataclass(frozen=True)
class Sublayers:
    """Attribute names of one residual branch: h + post_norm(module(pre_norm(h)))."""

    module: str
    pre_norm: str | None
    post_norm: str | None

    def names(self) -> set[str]:
        return {name for name in (self.module, self.pre_norm, self.post_norm) if name}

    def change(self, layer: nn.Module, hidden_states: Tensor, kwargs: dict[str, Any] | None) -> Tensor:
        """f(h), [B, S, D]: what the sublayer adds to the residual stream.

        kwargs: the other arguments of an attention; None for an FFN.
        """
        x = hidden_states if self.pre_norm is None else getattr(layer, self.pre_norm)(hidden_states)
        module = getattr(layer, self.module)
        x = module(x) if kwargs is None else module(hidden_states=x, **kwargs)
        x = x[0] if isinstance(x, tuple) else x
        x = x if self.post_norm is None else getattr(layer, self.post_norm)(x)
        x = x if x.shape == hidden_states.shape else x.view(hidden_states.shape)  # experts give [B * S, D]
        multiplier = getattr(layer, "residual_multiplier", None)
        return x if multiplier is None else x * multiplier


@dataclass(frozen=True)
class BlockStructure:
    """The attribute names under which a kind of decoder layer keeps its attention and its FFN."""

    name: str
    attention: Sublayers
    ffn: Sublayers

    @property
    def parts(self) -> frozenset[str]:
        """Names of the children that a layer of this structure has."""
        return frozenset(self.attention.names() | self.ffn.names())

    def fits(self, layer: nn.Module) -> bool:
        """Whether the layer has exactly these parts, apart from dropouts, which do nothing in inference.

        A layer with weights of its own does not fit: at their initial values, ones or zeros, they may seem to do
        nothing.
        """
        parts = {name for name, child in layer.named_children() if not isinstance(child, nn.Dropout)}
        return parts == self.parts and not _own_weights(layer)

    def forward(self, layer: nn.Module, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Output of the whole layer, computed from its two sublayers."""
        hidden_states = hidden_states + self.attention.change(layer, hidden_states, kwargs)
        return self.finish(layer, hidden_states + self.ffn.change(layer, hidden_states, None))

    @staticmethod
    def finish(layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """What the layer does after its sublayers even if they are skipped: Gemma 4 scales the residual stream."""
        scalar = getattr(layer, OUTPUT_SCALAR, None)
        return hidden_states if scalar is None else hidden_states * scalar


def _own_weights(layer: nn.Module) -> list[str]:
    """Names of the layer's own parameters and buffers, except the known output scalar."""
    own = {**hf.own_parameters(layer), **hf.own_buffers(layer)}
    return sorted(name for name, tensor in own.items() if tensor is not None and name != OUTPUT_SCALAR)


_structures: dict[str, BlockStructure] = {}


def known_structures() -> tuple[BlockStructure, ...]:
    """The library's structures, then those registered by users."""
    return tuple(_structures.values())


def register_structure(structure: BlockStructure) -> BlockStructure:
    """Register a structure, by which decoder layers are recognised.

    A layer is recognised by its parts, so no two structures may have the same parts. Every model is still checked bit
    for bit, so a wrong registration is refused when a model is patched. Registering an equal structure again changes
    nothing.

    Raises:
        ValueError: it is not a BlockStructure, a name is not an attribute name or names two parts, or another
            structure has the same name or parts.
    """
    _check_structure(structure)
    if _structures.get(structure.name) == structure:
        return structure
    for other in _structures.values():
        if structure.name == other.name:
            raise ValueError(f"a structure named {structure.name!r} is already registered; choose another name")
        if structure.parts == other.parts:
            raise ValueError(
                f"structure {structure.name!r} has the same parts as {other.name!r}, {sorted(other.parts)}; layers are "
                "recognised by their parts"
            )
    _structures[structure.name] = structure
    return structure


def _check_structure(structure: Any) -> None:
    if not isinstance(structure, BlockStructure):
        raise ValueError(f"register_structure takes a BlockStructure; got {structure!r}")
    if not isinstance(structure.name, str) or not structure.name.strip():
        raise ValueError(f"a structure needs a name; got {structure.name!r}")
    given: list[Any] = []
    for branch in (structure.attention, structure.ffn):
        if not isinstance(branch, Sublayers):
            raise ValueError(f"attention and ffn of structure {structure.name!r} must be Sublayers; got {branch!r}")
        given += [branch.module, *(name for name in (branch.pre_norm, branch.post_norm) if name is not None)]
    for name in given:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(
                f"structure {structure.name!r} names a part {name!r}; expected the name of a direct child of the layer"
            )
    if repeated := sorted({name for name in given if given.count(name) > 1}):
        raise ValueError(f"structure {structure.name!r} uses {', '.join(repeated)} for more than one part")


for _structure in (
    BlockStructure(
        "pre-norm",  # Llama, InternLM, Mistral, Mixtral, Qwen2, Qwen3, Phi3; with a residual multiplier: Granite
        Sublayers("self_attn", pre_norm="input_layernorm", post_norm=None),
        Sublayers("mlp", pre_norm="post_attention_layernorm", post_norm=None),
    ),
    BlockStructure(
        "pre-norm (feed_forward)",  # Llama 4
        Sublayers("self_attn", pre_norm="input_layernorm", post_norm=None),
        Sublayers("feed_forward", pre_norm="post_attention_layernorm", post_norm=None),
    ),
    BlockStructure(
        "sandwich-norm",  # Gemma2, Gemma3, Gemma4
        Sublayers("self_attn", pre_norm="input_layernorm", post_norm="post_attention_layernorm"),
        Sublayers("mlp", pre_norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
    ),
    BlockStructure(
        "sandwich-norm (GLM)",  # GLM4
        Sublayers("self_attn", pre_norm="input_layernorm", post_norm="post_self_attn_layernorm"),
        Sublayers("mlp", pre_norm="post_attention_layernorm", post_norm="post_mlp_layernorm"),
    ),
    BlockStructure(
        "post-norm",  # OLMo2, OLMo3
        Sublayers("self_attn", pre_norm=None, post_norm="post_attention_layernorm"),
        Sublayers("mlp", pre_norm=None, post_norm="post_feedforward_layernorm"),
    ),
):
    register_structure(_structure)


@dataclass(frozen=True)
class Proved:
    """What a probe has proved about a model.

    stream_dtypes: dtype of each layer's input and output hidden states. stream_width: D, their number of channels.
    cache_slots: for each layer, the index of the KV-cache layer that its attention fills.
    """

    structure: BlockStructure
    stream_dtypes: tuple[torch.dtype, ...]
    stream_width: int
    cache_slots: tuple[int, ...]


def find_structure(model: nn.Module) -> BlockStructure:
    """The structure that reproduces every decoder layer of `model` bit for bit; see `probe_layers`."""
    return probe_layers(model).structure


def probe_layers(model: nn.Module) -> Proved:
    """Prove on random inputs how every decoder layer of `model` is built.

    A structure is accepted if its two sublayers reproduce the output of the stock layer bit for bit while every other
    layer only replays its recorded output. User hooks do not fire and autocast is off. Afterwards the model and the
    state of the random number generators are as before.

    Raises UnsupportedModelError, with the reason and the class at fault, if no structure is accepted, also where the
    model itself raises something else. Only out-of-memory errors propagate unchanged.
    """
    decoder = find_decoder(model)
    layers = list(decoder.layers)
    _refuse_repeated(layers)
    structure, slots = _matching_structure(layers), cache_slots(layers)
    with quiet(model):
        probe = LayerProbe(model, decoder, slots)
        probe.record()
        for index in reversed(range(len(layers))):  # test a layer before those it may depend on
            _prove(probe, index, layers[index], structure)
    streams = [call.hidden_states for call in probe.calls]
    return Proved(structure, tuple(stream.dtype for stream in streams), streams[0].shape[-1], slots)


def cache_slots(layers: Iterable[nn.Module]) -> tuple[int, ...]:
    """For each layer, the index of its K/V in the cache: the `layer_idx` of its attention, else the layer's position.

    Raises UnsupportedModelError if a `layer_idx` is not an index or two layers share one.
    """
    slots: dict[int, int] = {}
    for position, layer in enumerate(layers):
        owners = [getattr(layer, name, None) for name in sorted({s.attention.module for s in known_structures()})]
        found = (getattr(owner, "layer_idx", None) for owner in (*owners, layer))
        slot = next((index for index in found if index is not None), position)
        name = type(layer).__name__
        if not isinstance(slot, int) or isinstance(slot, bool) or slot < 0:
            raise UnsupportedModelError(f"{name} at position {position} has layer_idx {slot!r}, which is not an index")
        if slot in slots:
            raise UnsupportedModelError(
                f"{name} at positions {slots[slot]} and {position} have the same layer_idx {slot}, so both would write "
                "the same layer of the KV cache; give each its own layer_idx"
            )
        slots[slot] = position
    return tuple(slots)


def _refuse_repeated(layers: list[nn.Module]) -> None:
    positions: dict[int, int] = {}
    for position, layer in enumerate(layers):
        first = positions.setdefault(id(layer), position)
        if first != position:
            raise UnsupportedModelError(
                f"layers {first} and {position} are the same {type(layer).__name__} object, so one cannot be skipped "
                "without the other; make one of them a copy"
            )


def _matching_structure(layers: list[nn.Module]) -> BlockStructure:
    """The structure that all layers fit; no two structures have the same parts, so there is at most one."""
    for structure in known_structures():
        if all(structure.fits(layer) for layer in layers):
            return structure
    odd = next((layer for layer in layers if not any(s.fits(layer) for s in known_structures())), None)
    if odd is None:
        kinds = ", ".join(sorted({s.name for s in known_structures() for layer in layers if s.fits(layer)}))
        raise UnsupportedModelError(f"the layers have several structures ({kinds}); all must have the same one")
    parts = sorted(name for name, _ in odd.named_children()) + _own_weights(odd)
    known = "; ".join(f"{s.name}: {sorted(s.parts)}" for s in known_structures())
    raise UnsupportedModelError(
        f"{type(odd).__name__} has parts {parts}, which match no known structure ({known}); "
        "register_structure adds another one"
    )


def _prove(probe: LayerProbe, index: int, layer: nn.Module, structure: BlockStructure) -> None:
    """Raise UnsupportedModelError unless `structure` alone reproduces layer `index` bit for bit."""

    def ours(hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return structure.forward(layer, hidden_states, kwargs)

    expected, name = probe.calls[index].output, f"{type(layer).__name__} (layer {index})"
    output, failure = _attempt(probe, index, ours)
    if _same(output, expected):
        return
    stock, stock_failure = _attempt(probe, index, probe.stock(index))
    if not _same(stock, expected):
        how = "" if stock_failure is None else f" ({stock_failure})"
        raise UnsupportedModelError(
            f"{name} computes a different output when it runs alone{how}: it depends on state that other layers leave "
            "behind, such as shared keys and values, or on random numbers; its sublayers cannot be skipped"
        ) from stock_failure
    if failure is not None:
        raise UnsupportedModelError(
            f"{name} has the parts of a {structure.name} block, but they cannot run one by one: {failure}"
        ) from failure
    raise UnsupportedModelError(
        f"{name} has the parts of a {structure.name} block but computes something else "
        f"({_difference(output, expected)}); its sublayers cannot be skipped"
    )


def _attempt(probe: LayerProbe, index: int, forward: LayerForward) -> tuple[Any, UnsupportedModelError | None]:
    try:
        return probe.alone(index, forward), None
    except UnsupportedModelError as error:
        return None, error


def _same(output: Any, expected: Tensor) -> bool:
    alike = isinstance(output, Tensor) and output.dtype == expected.dtype and output.device == expected.device
    return alike and torch.equal(output, expected)


def _difference(output: Any, expected: Tensor) -> str:
    """A guess at what a layer computes besides its two sublayers, in words."""
    if isinstance(output, Tensor) and output.shape == expected.shape:
        ours, theirs = output.double(), expected.double()
        factor = (ours * theirs).sum() / (ours * ours).sum()
        if torch.allclose(ours * factor, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max())):
            return f"its output is the sublayers' output times {float(factor):.4g}"
    return "a parallel residual?"
