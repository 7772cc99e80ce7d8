"""How a decoder layer is built from its two sublayers, found out by structure and proved on the layer itself.

Every supported layer computes `h + f(h)` twice, with f = post_norm(module(pre_norm(h))); families differ in which
norms there are and what they are called. Names alone cannot tell a parallel residual from a sequential one, so a
structure counts only if it reproduces the stock layer bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaskip.wrappers import unwrapped as unwrapped  # callers of this module look for it here


class UnsupportedModelError(ValueError):
    """The model's decoder layers are not a sequence of two residual sublayers that we know."""


@dataclass(frozen=True)
class Sublayers:
    """Attribute names of one residual branch: h + post_norm(module(pre_norm(h)))."""

    module: str
    pre_norm: str | None
    post_norm: str | None

    def names(self) -> set[str]:
        return {name for name in (self.module, self.pre_norm, self.post_norm) if name}

    def change(self, layer: nn.Module, hidden_states: Tensor, kwargs: dict[str, Any] | None) -> Tensor:
        """f(h), [B, S, D]: what the sublayer adds to the residual stream. kwargs: an attention's further arguments."""
        x = hidden_states if self.pre_norm is None else getattr(layer, self.pre_norm)(hidden_states)
        module = getattr(layer, self.module)
        x = module(x) if kwargs is None else module(hidden_states=x, **kwargs)
        x = x[0] if isinstance(x, tuple) else x
        x = x if self.post_norm is None else getattr(layer, self.post_norm)(x)
        multiplier = getattr(layer, "residual_multiplier", None)
        return x if multiplier is None else x * multiplier


@dataclass(frozen=True)
class BlockStructure:
    """A known way to put attention and FFN on the residual stream."""

    name: str
    attention: Sublayers
    ffn: Sublayers

    def fits(self, layer: nn.Module) -> bool:
        """Whether the layer has exactly these parts (dropouts aside, which do nothing in inference)."""
        parts = {name for name, child in layer.named_children() if not isinstance(child, nn.Dropout)}
        return parts == self.attention.names() | self.ffn.names()

    def forward(self, layer: nn.Module, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The whole layer, from its two sublayers."""
        hidden_states = hidden_states + self.attention.change(layer, hidden_states, kwargs)
        return hidden_states + self.ffn.change(layer, hidden_states, None)


STRUCTURES = (
    BlockStructure(
        "pre-norm",  # Llama, InternLM, Mistral, Mixtral, Qwen2, Qwen3, Phi3; with a residual multiplier: Granite
        Sublayers("self_attn", pre_norm="input_layernorm", post_norm=None),
        Sublayers("mlp", pre_norm="post_attention_layernorm", post_norm=None),
    ),
    BlockStructure(
        "sandwich-norm",  # Gemma2, Gemma3
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
)


def find_decoder(model: nn.Module) -> Any:
    """The stock module that owns the list of decoder layers, `layers`."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder: Any = model if get_decoder is None else get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList) or not len(decoder.layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder layers; supported are decoder-only transformers models"
        )
    return decoder


def execution_device(module: nn.Module) -> torch.device:
    """Where `module` computes; under accelerate's offloading its parameters rest on another device."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in devices if device is not None), None)
    return next(module.parameters()).device if device is None else torch.device(device)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a stock model; raises UnsupportedModelError if there are none."""
    return find_decoder(model).layers


@dataclass(frozen=True)
class _LayerCall:
    """What one stock layer was given and what it made of it."""

    hidden_states: Tensor
    kwargs: dict[str, Any]
    output: Tensor


def forward_attribute(layer: nn.Module) -> str:
    """Where the layer's computation hangs: accelerate's hooks keep the stock forward in `_old_forward`."""
    return "_old_forward" if hasattr(layer, "_old_forward") else "forward"


@torch.no_grad()
def find_structure(model: nn.Module) -> BlockStructure:
    """The structure that reproduces every decoder layer of `model` bit for bit on a random input.

    Raises UnsupportedModelError if none does.
    """
    decoder = find_decoder(model)
    layers = list(decoder.layers)
    name = type(layers[0]).__name__
    candidates = [s for s in STRUCTURES if all(s.fits(layer) for layer in layers)]
    if not candidates:
        parts = sorted(n for n, _ in layers[0].named_children())
        known = "; ".join(f"{s.name}: {sorted(s.attention.names() | s.ffn.names())}" for s in STRUCTURES)
        raise UnsupportedModelError(f"{name} has parts {parts}, which is none of the known blocks ({known})")
    calls = _record_layer_calls(decoder, layers)
    for structure in candidates:
        if all(_reproduces(structure, layer, call) for layer, call in zip(layers, calls, strict=True)):
            return structure
    raise UnsupportedModelError(
        f"{name} has the parts of a {candidates[0].name} block but computes something else (a parallel residual?); "
        "its sublayers cannot be skipped"
    )


def _reproduces(structure: BlockStructure, layer: nn.Module, call: _LayerCall) -> bool:
    ours = structure.forward(layer, call.hidden_states, call.kwargs)
    return torch.allclose(ours, call.output, rtol=0, atol=0, equal_nan=True)


def _record_layer_calls(decoder: Any, layers: list[nn.Module]) -> list[_LayerCall]:
    """Run the stock decoder on four random embeddings and keep what went in and out of each layer."""
    calls: list[_LayerCall] = []

    def recorder(stock):
        def forward(hidden_states, *args, **kwargs):
            if args:
                raise UnsupportedModelError(f"{type(layers[0]).__name__} takes more than one positional argument")
            calls.append(_LayerCall(hidden_states, kwargs, stock(hidden_states, **kwargs)))
            return calls[-1].output

        return forward

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4, decoder.config.hidden_size, generator=generator)
    inputs = inputs.to(device=execution_device(decoder), dtype=decoder.get_input_embeddings().weight.dtype)
    with _replaced_forwards(layers, recorder):
        decoder(inputs_embeds=inputs, use_cache=False)
    return calls


class _replaced_forwards:
    """Put `wrap(stock)` in the place of every layer's forward while the context lasts."""

    def __init__(self, layers: list[nn.Module], wrap):
        self.layers, self.wrap = layers, wrap

    def __enter__(self) -> None:
        self.saved = []
        for layer in self.layers:
            name = forward_attribute(layer)
            self.saved.append((layer, name, layer.__dict__.get(name)))
            layer.__dict__[name] = self.wrap(getattr(layer, name))

    def __exit__(self, *exception) -> None:
        for layer, name, own in self.saved:
            restore_attribute(layer, name, own)


def restore_attribute(owner: Any, name: str, own: Any) -> None:
    """Undo an instance attribute: put back what the instance itself had (`own`), or nothing."""
    if own is None:
        owner.__dict__.pop(name, None)
    else:
        owner.__dict__[name] = own
