"""The matrices of a model, sublayer by sublayer, read off the stock model itself without allocating a weight.

transformers builds the model on the meta device, so every family's biases, norms, fused projections and experts are
counted as they are; no formula per family can go stale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from adaskip.core.blocks import Sublayers, UnsupportedModelError, decoder_layers, find_decoder, known_structures
from adaskip.core.plan import SublayerKind


@dataclass(frozen=True)
class SublayerShape:
    """The parameters of one attention or FFN sublayer, its norms included.

    matrices: (outputs, inputs) of every matrix that each token is multiplied by. experts, active_experts: how many
    experts there are and how many of them a token visits; expert_matrices: (outputs, inputs) of one of them. vectors:
    entries of biases and norm weights. Of an attention also num_heads, num_kv_heads, head_dim, and window: the
    positions it sees at most, None for all.
    """

    matrices: tuple[tuple[int, int], ...]
    expert_matrices: tuple[tuple[int, int], ...] = ()
    experts: int = 0
    active_experts: int = 0
    vectors: int = 0
    window: int | None = None
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0

    @property
    def num_parameters(self) -> int:
        """Entries of all weights."""
        return _entries(self.matrices) + self.experts * _entries(self.expert_matrices) + self.vectors

    @property
    def multiplied(self) -> int:
        """Matrix entries that one token is multiplied by."""
        return _entries(self.matrices) + self.active_experts * _entries(self.expert_matrices)

    @property
    def passed(self) -> int:
        """Activations that one token brings to its matrices and takes from them."""
        passed = sum(map(sum, self.matrices))
        return passed + self.active_experts * sum(map(sum, self.expert_matrices))

    def weights_read(self, tokens: int) -> float:
        """Entries of the weights that `tokens` tokens need: of the experts those expected to be visited by any token,
        if each token chose its own at random."""
        visited = self.experts * (1 - (1 - self.active_experts / self.experts) ** tokens) if self.experts else 0.0
        return _entries(self.matrices) + visited * _entries(self.expert_matrices) + self.vectors


@dataclass(frozen=True)
class ModelShape:
    """What of a decoder decides its time: matrices, heads, vocabulary and windows. Layers need not be alike.

    attention, ffn: one `SublayerShape` per layer. final_vectors: entries of the norm before the head.
    """

    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    attention: tuple[SublayerShape, ...]
    ffn: tuple[SublayerShape, ...]
    final_vectors: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> ModelShape:
        """The shape of the causal language model that `config` describes.

        Raises:
            UnsupportedModelError: its layers are not two residual sublayers, or hold parameters unknown here.
        """
        config = config.get_text_config()
        model = _on_meta(config)
        layers, kept = decoder_layers(model), list[Any](DynamicCache(config=config).layers)
        if len(kept) != len(layers):
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps K/V for {len(kept)} of its {len(layers)} layers; what layers share "
                "is not known here"
            )
        # Where layers differ, as in Gemma 4, transformers refuses to read their sizes off the whole model's config.
        own: Any = getattr(config, "per_layer_config", None)
        own = [config] * len(layers) if own is None else own
        both = [_sublayers(layer, own[i], cache) for i, (layer, cache) in enumerate(zip(layers, kept, strict=True))]
        shape = cls(
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            tied_embeddings=config.tie_word_embeddings,
            attention=tuple(attention for attention, _ in both),
            ffn=tuple(ffn for _, ffn in both),
            final_vectors=sum(p.numel() for p in find_decoder(model).norm.parameters()),
        )
        shape._check_against(model)
        return shape

    def _check_against(self, model: Any) -> None:
        """Raise UnsupportedModelError if the model has parameters whose use is not known here."""
        name = type(model).__name__
        for layer, attention in enumerate(self.attention):
            expected = 2 * self.hidden_size * attention.head_dim * (attention.num_heads + attention.num_kv_heads)
            if (found := _entries(attention.matrices)) != expected or attention.experts:
                raise UnsupportedModelError(
                    f"the attention of layer {layer} of {name} has {found} matrix entries; the four projections of "
                    f"{attention.num_heads} heads and {attention.num_kv_heads} key/value heads of {attention.head_dim} "
                    f"have {expected}"
                )
        if self.num_parameters != model.num_parameters():
            raise UnsupportedModelError(
                f"{name} has {model.num_parameters()} parameters, of which {self.num_parameters} are embeddings, "
                "attention, FFN, norms and head; what the others do is not known here"
            )

    @property
    def num_layers(self) -> int:
        return len(self.attention)

    @cached_property
    def num_parameters(self) -> int:
        """Entries of all weights; a tied head counts once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self.final_vectors + sum(s.num_parameters for s in (*self.attention, *self.ffn))

    @cached_property
    def alike(self) -> dict[SublayerKind, tuple[frozenset[int], ...]]:
        """By kind, the layers whose sublayers are of the same shape; most models have one group."""
        return {"attention": _groups(self.attention), "ffn": _groups(self.ffn)}


def _groups(sublayers: tuple[SublayerShape, ...]) -> tuple[frozenset[int], ...]:
    shapes = dict.fromkeys(sublayers)
    return tuple(frozenset(i for i, each in enumerate(sublayers) if each == shape) for shape in shapes)


def _entries(matrices: Iterable[tuple[int, int]]) -> int:
    return sum(map(prod, matrices))


def _on_meta(config: PreTrainedConfig) -> Any:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except RuntimeError as error:
        if type(error).__name__ != "AmbiguousGlobalPerLayerAttributeError":
            raise
        reason = str(error).split(". ")[0]
        raise UnsupportedModelError(
            f"transformers' {config.model_type} models cannot have layers of different sizes: {reason}"
        ) from error


def _sublayers(layer: nn.Module, config: Any, cache: Any) -> tuple[SublayerShape, SublayerShape]:
    """config, cache: the layer's own, by which heads and window are known."""
    structure = next((structure for structure in known_structures() if structure.fits(layer)), None)
    if structure is None:
        raise UnsupportedModelError(f"{type(layer).__name__} is not one attention and one FFN, one after the other")
    heads = config.num_attention_heads
    attention = replace(
        _count(layer, structure.attention),
        window=cache.sliding_window if getattr(cache, "is_sliding", False) else None,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
    ffn = _count(layer, structure.ffn)
    if not ffn.experts:
        return attention, ffn
    if (active := getattr(config, "num_experts_per_tok", None)) is None:
        raise UnsupportedModelError(f"{type(config).__name__} does not say how many experts a token visits")
    return attention, replace(ffn, active_experts=active)


def _count(layer: nn.Module, sublayers: Sublayers) -> SublayerShape:
    """The parameters of one residual branch: matrices have two dimensions, stacks of experts three."""
    modules = [(part, getattr(layer, part)) for part in sorted(sublayers.names())]
    named = {f"{part}.{name}": p for part, module in modules for name, p in module.named_parameters()}
    stacks = [p for p in named.values() if p.dim() == 3]
    flat_experts = [name for name, p in named.items() if ".experts." in name and p.dim() != 3]
    if flat_experts or len({len(stack) for stack in stacks}) > 1 or any(p.dim() > 3 for p in named.values()):
        strange = next(iter(flat_experts), "parameters of unequal stacks")
        raise UnsupportedModelError(f"{type(layer).__name__} has {strange}, whose use is not known here")
    return SublayerShape(
        matrices=tuple((p.shape[0], p.shape[1]) for p in named.values() if p.dim() == 2),
        expert_matrices=tuple((p.shape[1], p.shape[2]) for p in stacks),
        experts=len(stacks[0]) if stacks else 0,
        vectors=sum(p.numel() for p in named.values() if p.dim() == 1),
    )
