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
    """A `DynamicCache` for `generate` and direct calls whose new tokens cost no copy of the earlier ones.

    With gradients enabled, inside `torch.compile`, and for K/V of another dtype or shape than those held, it does what
    the stock cache does. The `keys` and `values` of its layers are views which later steps may overwrite after a
    `crop`; copies and pickles of the cache have memory of their own.

    config: the model's, without which every layer grows without bound, as in `DynamicCache`. Layers other than those
    of full attention are stock's; those with a sliding window copy no more than the window.
    """

    def __init__(self, *, config: PreTrainedConfig | None = None):
        super().__init__(config=config)
        self.layers = [InPlaceLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = InPlaceLayer


class InPlaceLayer(DynamicLayer):
    """A cache layer with room: `keys` and `values`, [B, heads, S, D], are views of the beginning of longer tensors."""

    _memory: tuple[Tensor | None, Tensor | None] = (None, None)
    """The longer tensors for keys and values, [B, heads, S + room, D], that only this layer writes to."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append K/V [B, heads, T, D] and return all of them."""
        if not self._can_write(key_states, value_states):
            self._memory = (None, None)
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for_keys, for_values = self._memory
        for_keys, keys = _append(for_keys, self.keys, key_states)
        for_values, values = _append(for_values, self.values, value_states)
        self._memory, self.keys, self.values = (for_keys, for_values), keys, values
        return keys, values

    def _can_write(self, *states: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        held = zip((self.keys, self.values), states, strict=True)
        return all(_alike(own, new) for own, new in held if own is not None and own.numel())

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the memory of K and V, with the room for more tokens."""
        return sum(x.untyped_storage().nbytes() for x in (self.keys, self.values) if x is not None)

    def reset(self) -> None:
        """Drop all K/V and their memory."""
        self._memory = (None, None)
        self.keys = self.values = None
        self.is_initialized = False  # transformers 5.17 would write zeros into K/V
        super().reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        self._memory = (None, None)
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._memory = (None, None)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._memory = (None, None)
        super().batch_select_indices(indices)

    def __copy__(self) -> InPlaceLayer:
        """A layer with the same K/V, which neither overwrites from now on."""
        self._memory = (None, None)
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """What deep copies and pickles take: K/V without room."""
        own = {name: x.clone() for name in ("keys", "values") if isinstance(x := getattr(self, name, None), Tensor)}
        return {**vars(self), **own, "_memory": (None, None)}


def _append(memory: Tensor | None, held: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
    """(memory, all K/V, which are its beginning), with `new` written behind `held`.

    The memory is `memory` if `held` is its beginning and there is room, else new one.
    """
    length = _length(held)
    end = length + new.shape[-2]
    if memory is None or held is None or not length or memory.shape[-2] < end or not _begins(memory, held):
        memory = new.new_empty(*new.shape[:-2], end + ROOM_TOKENS, new.shape[-1])
        if held is not None and length:
            memory[..., :length, :] = held
    memory[..., length:end, :] = new
    return memory, memory[..., :end, :]


def _length(held: Tensor | None) -> int:
    """Number of tokens; stock's empty layers hold tensors of shape [0]."""
    return held.shape[-2] if held is not None and held.numel() else 0


def _alike(held: Tensor, new: Tensor) -> bool:
    """Whether both have the same rows, heads, head size, dtype and device."""
    alike = (held.dtype, held.device) == (new.dtype, new.device)
    return alike and held.shape[:-2] == new.shape[:-2] and held.shape[-1] == new.shape[-1]


def _begins(memory: Tensor, held: Tensor) -> bool:
    """Whether `held` is the beginning of `memory`, and this mode of torch may write to `memory`.

    `crop` replaces the K/V of a layer by such a view, and a caller may assign others.
    """
    writable = torch.is_inference_mode_enabled() or not memory.is_inference()
    same_rows = held.shape[:-2] == memory.shape[:-2] and held.stride() == memory.stride()
    return writable and same_rows and held.data_ptr() == memory.data_ptr()


GROWING_CACHES = (DynamicCache, InPlaceCache)
"""Caches that grow token by token, with layers of different kinds."""
UNBOUNDED_LAYERS = (DynamicLayer, InPlaceLayer)
"""Layers that hold every token, of which `crop` removes the last ones."""
