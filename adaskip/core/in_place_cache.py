"""A KV cache that writes new K/V behind the earlier ones, where stock's `DynamicCache` copies all of them each step.

Stock concatenates: a decode step after S tokens reads and writes S tokens of K and V in every layer, on top of the
reading that attention does. Here every layer has room for some tokens more, and copies only when that is used up. The
attention gets tensors of the same shape and values, with other strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM_TOKENS = 256
"""Tokens for which a layer has room beyond those it holds when it allocates memory."""


class InPlaceCache(DynamicCache):
    """A `DynamicCache` for `generate` and direct calls, without gradients, whose tokens cost no copy of earlier ones.

    Layers with a sliding window keep stock's, whose copies are as short as the window. config: the model's, without
    which every layer grows without bound, as in `DynamicCache`.
    """

    def __init__(self, config: PreTrainedConfig | None = None):
        super().__init__(config=config)
        self.layers = [InPlaceLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = InPlaceLayer


class InPlaceLayer(DynamicLayer):
    """A cache layer with room: `keys` and `values`, [B, heads, S, D], are views of the beginning of longer tensors."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._rooms = (_Room(), _Room())

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append K/V [B, heads, T, D] and return all of them. Raises ValueError for K/V that do not fit those held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None, "initialised above"
        assert self.values is not None, "initialised above"
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            _check_fits(held, new)
        for_keys, for_values = self._rooms
        self.keys = for_keys.append(self.keys, key_states)
        self.values = for_values.append(self.values, value_states)
        return self.keys, self.values

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the memory of K and V, with the room for more tokens."""
        return sum(0 if room.memory is None else room.memory.nbytes for room in self._rooms)

    def reset(self) -> None:
        """Drop all K/V and their memory."""
        super().reset()
        self._rooms = (_Room(), _Room())

    def __copy__(self) -> InPlaceLayer:
        """A layer with the same K/V; from now on neither writes to the memory of both."""
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        self._rooms, twin._rooms = (_Room(), _Room()), (_Room(), _Room())
        return twin


class _Room:
    """The memory of the K or the V of a layer, [B, heads, S + room, D]; None before the first token."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def append(self, held: Tensor, new: Tensor) -> Tensor:
        """Write `new` behind `held` and return both. Other memory is used if `held` does not lie in this one."""
        length, memory = _length(held), self.memory
        end = length + new.shape[-2]
        if memory is None or not length or memory.shape[-2] < end or not _begins(memory, held):
            memory = self.memory = new.new_empty(*new.shape[:-2], end + ROOM_TOKENS, new.shape[-1])
            if length:
                memory[..., :length, :] = held
        memory[..., length:end, :] = new
        return memory[..., :end, :]


def _length(held: Tensor) -> int:
    """Number of tokens; stock's empty layers hold tensors of shape [0]."""
    return held.shape[-2] if held.numel() else 0


def _check_fits(held: Tensor, new: Tensor) -> None:
    if torch.is_grad_enabled() and new.requires_grad:
        raise ValueError("InPlaceCache overwrites memory that gradients need; run the model under torch.no_grad()")
    if _length(held) and (held.shape[:2], held.dtype) != (new.shape[:2], new.dtype):
        rows, heads = held.shape[:2]
        raise ValueError(
            f"this InPlaceCache holds K/V of {rows} rows and {heads} heads in {held.dtype}; got {new.shape[0]} rows "
            f"and {new.shape[1]} heads in {new.dtype}"
        )


def _begins(memory: Tensor, held: Tensor) -> bool:
    """Whether `held` is the beginning of `memory`, which may be written to.

    Stock's methods replace the K/V of a layer: `crop` by such a view, others by new tensors.
    """
    alike = held.stride() == memory.stride() and held.shape[:-2] == memory.shape[:-2]
    writable = torch.is_inference_mode_enabled() or not memory.is_inference()
    return alike and writable and held.data_ptr() == memory.data_ptr()


GROWING_CACHES = (DynamicCache, InPlaceCache)
UNBOUNDED_LAYERS = (DynamicLayer, InPlaceLayer)
"""Kinds of cache and of layer that hold every token and from which the last ones can be removed."""
