"""Runs a decoder on a few tokens to record what its layers compute, all together and each one alone.

"Alone" means that the decoder runs while every other layer only returns its recorded output. A layer whose output then
differs depends on state that other layers leave behind, such as shared keys and values, which would be missing once
those layers are skipped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from adaskip.core import hf
from adaskip.core.decoder import UnsupportedModelError, execution_device, restore_attribute
from adaskip.core.hf import CACHE

TOKENS = 4
LayerForward = Callable[..., Any]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class LayerCall:
    """Input and output of a stock layer, both [1, S, D]."""

    hidden_states: Tensor
    output: Tensor


class LayerProbe:
    """Runs the decoder of a model: `record` with all of its layers, `alone` with a single one.

    model: owns the embeddings. slots: for each layer, the index of the KV-cache layer that its attention fills.
    Exceptions of the model become UnsupportedModelError, except out-of-memory errors. Enter `quiet` first.
    """

    def __init__(self, model: Any, decoder: Any, slots: tuple[int, ...]):
        self.model, self.decoder, self.slots = model, decoder, slots
        self.layers: list[nn.Module] = list(decoder.layers)
        self.calls: list[LayerCall] = []
        self._inputs: Inputs = {}
        self._parameters = inspect.signature(decoder.forward).parameters
        self._running: int | None = None  # the layer that runs now, to be named in an error

    def record(self) -> None:
        """Record input and output of every layer for random embeddings or, if these fail, for random tokens."""
        first: UnsupportedModelError | None = None
        for make in (self._random_embeddings, self._random_tokens):
            try:
                inputs = make(seed=0)
                calls = self._record(inputs)
                self._record(make(seed=1))  # other values, so that state left on the model no longer matches the record
            except UnsupportedModelError as error:
                first = first or error
            else:
                self.calls, self._inputs = calls, inputs
                return
        assert first is not None
        raise first

    def alone(self, index: int, forward: LayerForward) -> Tensor:
        """The output of `forward(hidden_states, kwargs)` in place of layer `index`, as the only layer that computes."""
        outputs: list[Any] = []

        def compute(hidden_states: Tensor, kwargs: dict[str, Any], layer: int) -> Any:
            if layer != index:
                return self.calls[layer].output.clone()
            outputs.append(forward(hidden_states, kwargs))
            return self.calls[layer].output.clone()

        cache = self._run(self._inputs, compute)
        self._check_slot(index, cache)
        return outputs[0]

    def stock(self, index: int) -> LayerForward:
        """The layer's own forward, called with (hidden_states, kwargs)."""
        layer = self.layers[index]
        forward = getattr(layer, hf.forward_name(layer))
        return lambda hidden_states, kwargs: forward(hidden_states, **kwargs)

    def _record(self, inputs: Inputs) -> list[LayerCall]:
        calls: list[LayerCall] = []
        stock = [self.stock(index) for index in range(len(self.layers))]

        def compute(hidden_states: Tensor, kwargs: dict[str, Any], layer: int) -> Any:
            entry = hidden_states.clone()
            output = stock[layer](hidden_states, kwargs)
            self._check_call(layer, entry, hidden_states, output)
            calls.append(LayerCall(entry, output.clone()))
            return output

        self._run(inputs, compute)
        return calls

    def _run(self, inputs: Inputs, compute: Callable[[Tensor, dict[str, Any], int], Any]) -> DynamicCache:
        """Run one forward of the decoder with `compute` in place of every layer; returns the KV cache it filled.

        Other threads that use the model meanwhile run its stock layers.
        """
        order: list[int] = []
        finished: list[int] = []
        thread = get_ident()

        def at_work(index: int) -> LayerForward:
            layer = self.layers[index]
            stock = getattr(layer, hf.forward_name(layer))

            def forward(*args: Any, **kwargs: Any) -> Any:
                if get_ident() != thread:
                    return stock(*args, **kwargs)
                order.append(index)
                self._running = index
                output = compute(*self._hidden_and_keywords(index, args, kwargs), index)
                self._running = None
                finished.append(index)
                return output

            return forward

        with self._refusing():
            cache = self._empty_cache()
            options = {"use_cache": True, CACHE: cache}
            with replaced_forwards(self.layers, [at_work(index) for index in range(len(self.layers))]):
                self.decoder(**{name: x.clone() for name, x in inputs.items()}, **self._accepted(options))
            self._check_order(order, finished)
            self._check_cache(cache)
        return cache

    def _empty_cache(self) -> DynamicCache:
        """The cache that the decoder would make itself if its layers fit that, else a cache that grows."""
        config = getattr(self.decoder, "config", None)
        usual = getattr(config, "num_hidden_layers", None) == len(self.slots) == max(self.slots) + 1
        return DynamicCache(config=config) if usual else DynamicCache()

    def _accepted(self, options: dict[str, Any]) -> dict[str, Any]:
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self._parameters.values()):
            return options
        return {name: value for name, value in options.items() if name in self._parameters}

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn exceptions of the model into UnsupportedModelError, which names the running layer or the decoder."""
        self._running = None
        try:
            yield
        except (UnsupportedModelError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            who = type(self.decoder).__name__ if self._running is None else self._name(self._running)
            raise UnsupportedModelError(f"{who} fails on {TOKENS} tokens: {described(error)}") from error

    def _name(self, index: int) -> str:
        return f"{type(self.layers[index]).__name__} (layer {index})"

    def _hidden_and_keywords(self, index: int, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The hidden states and the other arguments of a layer, which must all be named or None."""
        if args:
            hidden_states, *others = args
        else:
            hidden_states, others = kwargs.pop("hidden_states", None), []
        if not isinstance(hidden_states, Tensor) or hidden_states.dim() != 3:
            found = tuple(hidden_states.shape) if isinstance(hidden_states, Tensor) else type(hidden_states).__name__
            raise UnsupportedModelError(f"{self._name(index)} receives {found} instead of hidden states [B, S, D]")
        if any(value is not None for value in others):
            kinds = ", ".join(type(value).__name__ for value in others)
            raise UnsupportedModelError(
                f"{self._name(index)} receives more positional arguments than the hidden states ({kinds}), "
                "so it is not known which of them its sublayers need"
            )
        return hidden_states, kwargs

    def _check_call(self, index: int, entry: Tensor, hidden_states: Tensor, output: Any) -> None:
        """Refuse layers that do not simply return new hidden states."""
        name = self._name(index)
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(f"{name} returns {type(output).__name__} instead of only the hidden states")
        if output.is_meta:
            raise UnsupportedModelError(f"{name} computes on the meta device: its weights have no data")
        if output.shape != entry.shape or output.dtype != entry.dtype:
            raise UnsupportedModelError(
                f"{name} turns {tuple(entry.shape)} {entry.dtype} into {tuple(output.shape)} {output.dtype}; "
                "a layer whose sublayers can be skipped keeps shape and dtype"
            )
        if not torch.equal(entry, hidden_states) and entry.isfinite().all():
            raise UnsupportedModelError(f"{name} changes its input hidden states in place")
        if not output.isfinite().all():
            raise UnsupportedModelError(f"{name} computes NaN or infinity, so nothing can be proved about it")

    def _check_order(self, order: list[int], finished: list[int]) -> None:
        if order != finished:
            raise UnsupportedModelError(f"{type(self.decoder).__name__} continues after one of its layers has failed")
        if order != list(range(len(self.layers))):
            called = ", ".join(map(str, order)) or "none"
            raise UnsupportedModelError(
                f"{type(self.decoder).__name__} with {len(self.layers)} layers calls them in this order: {called}; "
                "layers can be skipped only if each runs exactly once, in order"
            )

    def _check_cache(self, cache: DynamicCache) -> None:
        """Refuse recurrent states, and placeholder cache layers of decoder layers that use the K/V of others."""
        odd = [x for x in cache.layers if hasattr(x, "recurrent_states") or not hasattr(x, "get_seq_length")]
        if odd:
            raise UnsupportedModelError(
                f"{type(self.decoder).__name__} needs a cache with {type(odd[0]).__name__}, not only keys and values "
                "per layer; layers with recurrent states or shared keys and values cannot be skipped"
            )

    def _check_slot(self, index: int, cache: DynamicCache) -> None:
        layers: list[Any] = cache.layers
        filled = [slot for slot, layer in enumerate(layers) if int(layer.get_seq_length()) > 0]
        if filled not in ([], [self.slots[index]]):
            raise UnsupportedModelError(
                f"the attention of {self._name(index)} fills layers {filled} of the KV cache, but its layer_idx is "
                f"{self.slots[index]}"
            )

    def _embedding(self) -> Any:
        """The embedding module; None if neither the decoder nor the model names one."""
        for owner in (self.decoder, self.model):
            with self._refusing():
                get = getattr(owner, "get_input_embeddings", None)
                embedding = None if get is None else get()
            if isinstance(embedding, nn.Module):
                return embedding
        return None

    def _random_embeddings(self, seed: int) -> Inputs:
        """Random inputs [1, S, D] with the shape, dtype and device of the embedding's output, not of its weight."""
        embedding = self._embedding()
        if embedding is None or ("input_ids" in self._parameters and "inputs_embeds" not in self._parameters):
            raise UnsupportedModelError(f"{type(self.decoder).__name__} takes no input embeddings")
        with self._refusing():
            ids = torch.zeros(1, TOKENS, dtype=torch.long, device=execution_device(embedding))
            made: Any = embedding(ids)
            if not isinstance(made, Tensor) or made.dim() != 3:
                raise UnsupportedModelError(f"{type(embedding).__name__} does not turn token ids into hidden states")
            generator = torch.Generator(device="cpu").manual_seed(seed)
            noise = torch.randn(made.shape, generator=generator, device="cpu", dtype=torch.float32)
            return {"inputs_embeds": noise.to(device=made.device, dtype=made.dtype)}

    def _random_tokens(self, seed: int) -> Inputs:
        """Random token ids [1, S]."""
        with self._refusing():
            size = getattr(getattr(self.decoder, "config", None), "vocab_size", None)
            size = size or getattr(self._embedding(), "num_embeddings", TOKENS)
            generator = torch.Generator(device="cpu").manual_seed(seed)
            ids = torch.randint(size, (1, TOKENS), generator=generator, device="cpu")
            return {"input_ids": ids.to(execution_device(self.decoder))}


def described(error: BaseException) -> str:
    """The exception's class and message on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


@contextmanager
def replaced_forwards(layers: list[nn.Module], forwards: list[LayerForward]) -> Iterator[None]:
    """Replace the layers' forwards by `forwards` while the context lasts; a layer may occur twice in the list."""
    saved: list[tuple[nn.Module, str, Any]] = []
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            name = hf.forward_name(layer)
            saved.append((layer, name, layer.__dict__.get(name)))
            layer.__dict__[name] = forward
        yield
    finally:
        for layer, name, own in reversed(saved):
            restore_attribute(layer, name, own)
