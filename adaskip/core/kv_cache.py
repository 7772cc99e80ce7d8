"""Lets a KV cache hold no K/V for skipped attentions.

transformers builds masks and positions from the length of one cache layer. A skipped attention never fills its layer,
so a stock cache would report a wrong length if that layer is skipped. `SkippedLayer` replaces such a layer: it stores
nothing and takes its length from a live layer of the same kind.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from adaskip.core import hf
from adaskip.core.in_place_cache import InPlaceLayer
from adaskip.core.plan import Compensation


class SkippedLayer(CacheLayerMixin):
    """Replaces the cache layer of a skipped attention: stores nothing and reports the lengths of `live`.

    scale: compensation of the attention, for later contexts that continue with this cache or a copy of it.
    """

    keys = None
    values = None

    def __init__(self, replaced: CacheLayerMixin, live: CacheLayerMixin, scale: Compensation):
        # no super().__init__: it would add state
        self.live, self.scale = live, scale
        self.emptied = replaced.emptied if isinstance(replaced, SkippedLayer) else _emptied_twin(replaced)
        self.is_sliding = getattr(replaced, "is_sliding", False)
        self.is_compileable = replaced.is_compileable
        self.is_croppable = getattr(replaced, "is_croppable", True)
        self.supports_early_init = False

    def __repr__(self) -> str:
        return "SkippedLayer()"

    @property
    def is_initialized(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.live.is_initialized

    def get_seq_length(self) -> int:
        return self.live.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.live.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self.live.get_max_length()

    def update(self, key_states, value_states, *args, **kwargs):
        raise ValueError(
            "this KV cache was filled while the attention of some layers was skipped, and one of them now needs its "
            "K/V; continue with the same skipping(model, strategy), or start with a new cache"
        )

    def lazy_initialization(self, key_states, value_states) -> None: ...
    def offload(self) -> None: ...
    def prefetch(self) -> None: ...
    def reset(self) -> None: ...
    def reorder_cache(self, beam_idx) -> None: ...
    def crop(self, tokens_to_remove: int) -> None: ...
    def batch_repeat_interleave(self, repeats: int) -> None: ...
    def batch_select_indices(self, indices) -> None: ...


class KVWritten(Exception):
    """Ends the call of an attention that only writes its K/V."""


class KVOnly:
    """Stands for `cache` in the call of a skipped attention: `update` stores the K/V, then raises KVWritten.

    So the attention's own code computes K and V, whatever its norms, projections and rotary positions, and neither
    scores nor output. It computes its queries, too, which nothing uses.
    """

    def __init__(self, cache: Cache):
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._cache.update(*args, **kwargs)
        raise KVWritten


def _emptied_twin(layer: CacheLayerMixin) -> CacheLayerMixin:
    """An empty copy of `layer` that shares no tensor with it."""
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):  # K/V are dropped, counters and constants copied
            setattr(twin, name, value.clone() if value.dim() == 0 else None)
    twin.is_initialized = False
    twin.reset()
    return twin


def skipped_layers(cache: Cache) -> frozenset[int]:
    """Indices of the layers of `cache` that are a `SkippedLayer`."""
    return frozenset(i for i, layer in enumerate(cache.layers) if isinstance(layer, SkippedLayer))


def held_scales(cache: Cache) -> dict[int, Compensation]:
    """Compensation of the attentions without K/V in `cache`, by slot (index of the cache layer)."""
    return {i: layer.scale for i, layer in enumerate(cache.layers) if isinstance(layer, SkippedLayer)}


def release_skipped(cache: Cache, skipped: Mapping[int, Compensation], slots: Sequence[int]) -> None:
    """Replace every cache layer in `skipped` by a `SkippedLayer`, which frees the K/V that it held.

    skipped: compensation of each skipped attention, by slot. slots: those that the model's layers use; the other layers
    of the cache stay empty. Call this before masks are built.
    `skipped` may only grow while a cache is in use, and must leave one slot live. Raises ValueError if an attention
    whose K/V is gone should run again.
    """
    if lost := sorted(skipped_layers(cache) - frozenset(skipped)):
        raise ValueError(
            f"the attention of layers {lost} was skipped earlier on this KV cache and holds no K/V, so it cannot run; "
            "a skipped attention stays skipped while its cache is in use"
        )
    if getattr(cache, "offloading", False):
        raise ValueError(
            "an offloaded KV cache needs all of its layers; to skip attention, use a cache that is not offloaded"
        )
    while len(cache.layers) <= max(slots):  # a DynamicCache built without a config grows its layers lazily
        layer = hf.new_cache_layer(cache)
        if layer is None:
            raise ValueError(
                f"this KV cache has {len(cache.layers)} layers, but the model's layers use indices up to {max(slots)} "
                "(their layer_idx); pass DynamicCache() without a config, which grows"
            )
        cache.layers.append(layer)
    layers: list[Any] = cache.layers
    live = [layers[i] for i in slots if i not in skipped]
    if not live:
        raise ValueError(
            "together with the attentions skipped earlier on this KV cache, none would stay live; use a new cache"
        )
    for i, scale in skipped.items():
        kind = getattr(layers[i], "is_sliding", False)
        same_kind = (layer for layer in live if getattr(layer, "is_sliding", False) == kind)
        # If all layers of a kind are skipped, nothing uses its mask; the length of any live layer keeps it well-formed.
        layers[i] = SkippedLayer(layers[i], next(same_kind, live[0]), scale)


def restore_emptied(cache: Cache) -> None:
    """Replace each `SkippedLayer` by a real, empty layer, in a cache that was emptied for a new request."""
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, SkippedLayer):
            cache.layers[i] = layer.emptied


def kv_bytes(cache: Cache) -> int:
    """Bytes of keys and values that `cache` holds (a static or in-place one: has allocated; a quantised one: with its
    scales)."""
    return sum(_layer_bytes(layer) for layer in cache.layers)


def _layer_bytes(layer: Any) -> int:
    if isinstance(layer, InPlaceLayer):
        return layer.allocated_bytes
    return sum(_nbytes(getattr(layer, name, None)) for name in hf.KV)


def _nbytes(held: Any) -> int:
    """Bytes of a tensor, of the inner tensors of a subclass, or of all tensors in a tuple or mapping."""
    if isinstance(held, tuple | Mapping):
        return sum(map(_nbytes, held.values() if isinstance(held, Mapping) else held))
    if not isinstance(held, Tensor):
        return 0
    if hf.is_traceable_wrapper_subclass(held):
        inner, _ = held.__tensor_flatten__()
        return sum(_nbytes(getattr(held, name)) for name in inner)
    return held.nbytes
