"""No K/V for a skipped attention.

Masks and positions ask one layer of the cache for its length. A skipped attention never fills its layer, so stock
caches would answer wrongly as soon as that one is skipped. `SkippedLayer` takes the place of such a layer: it
stores nothing and passes every question of length on to a live layer of the same kind.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from adaskip.core import hf
from adaskip.core.plan import Compensation


class SkippedLayer(CacheLayerMixin):
    """Stand-in for the cache layer of a skipped attention: no storage, lengths of `live`.

    scale: what compensates the attention, for whoever goes on with this cache, or with a copy of it.
    """

    keys = None
    values = None

    def __init__(self, replaced: CacheLayerMixin, live: CacheLayerMixin, scale: Compensation):
        # no super().__init__: it would give us state
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
            "this KV cache was filled while the attention of some layers was skipped, and one of them asks for its K/V "
            "now; go on with the same skipping(model, strategy), or start with a new cache"
        )

    def lazy_initialization(self, key_states, value_states) -> None: ...
    def offload(self) -> None: ...
    def prefetch(self) -> None: ...
    def reset(self) -> None: ...
    def reorder_cache(self, beam_idx) -> None: ...
    def crop(self, tokens_to_remove: int) -> None: ...
    def batch_repeat_interleave(self, repeats: int) -> None: ...
    def batch_select_indices(self, indices) -> None: ...


def _emptied_twin(layer: CacheLayerMixin) -> CacheLayerMixin:
    """A layer like `layer` that has stored nothing yet and shares no tensor with it."""
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):  # K/V are dropped, counters and constants copied
            setattr(twin, name, value.clone() if value.dim() == 0 else None)
    twin.is_initialized = False
    twin.reset()
    return twin


def skipped_layers(cache: Cache) -> frozenset[int]:
    """The slots of `cache`, its layers, that hold a stand-in."""
    return frozenset(i for i, layer in enumerate(cache.layers) if isinstance(layer, SkippedLayer))


def held_scales(cache: Cache) -> dict[int, Compensation]:
    """What compensates the attentions without K/V in `cache`, by slot."""
    return {i: layer.scale for i, layer in enumerate(cache.layers) if isinstance(layer, SkippedLayer)}


def release_skipped(cache: Cache, skipped: Mapping[int, Compensation], slots: Sequence[int]) -> None:
    """Put a stand-in in the place of every slot in `skipped`, and let go of whatever K/V it held.

    skipped: by slot, what compensates the attention. slots: those that the model's layers use; the others of a cache
    never hold anything. Call before masks are built.
    `skipped` may only grow while a cache is in use, and must leave one slot live. Raises ValueError if a layer that
    holds no K/V any more is to run again.
    """
    if lost := sorted(skipped_layers(cache) - frozenset(skipped)):
        raise ValueError(
            f"the attention of layers {lost} was skipped earlier on this KV cache and holds no K/V; it cannot run; "
            "an attention once skipped stays skipped while its cache is in use"
        )
    if getattr(cache, "offloading", False):
        raise ValueError(
            "an offloaded KV cache cannot go without layers; skip attention with a cache that is not offloaded"
        )
    while len(cache.layers) <= max(slots):  # a DynamicCache built without a config grows its layers lazily
        layer = hf.new_cache_layer(cache)
        if layer is None:
            raise ValueError(
                f"this KV cache has {len(cache.layers)} layers, but the model's layers use slots up to {max(slots)} "
                "(their layer_idx); give DynamicCache() without a config, which grows"
            )
        cache.layers.append(layer)
    layers: list[Any] = cache.layers
    live = [layers[i] for i in slots if i not in skipped]
    if not live:
        raise ValueError(
            "together with what this KV cache skipped earlier, no attention would stay live; use a new cache"
        )
    for i, scale in skipped.items():
        kind = getattr(layers[i], "is_sliding", False)
        same_kind = (layer for layer in live if getattr(layer, "is_sliding", False) == kind)
        # Where a whole kind is skipped nobody uses its mask, and any live layer's length keeps it well-formed.
        layers[i] = SkippedLayer(layers[i], next(same_kind, live[0]), scale)


def restore_emptied(cache: Cache) -> None:
    """Give a cache that was emptied for a new request real layers again in the place of its stand-ins."""
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, SkippedLayer):
            cache.layers[i] = layer.emptied


def kv_bytes(cache: Cache) -> int:
    """Bytes of keys and values that `cache` holds (for a static cache: has allocated)."""
    layers: list[Any] = cache.layers
    held = (tensor for layer in layers for tensor in (layer.keys, layer.values))
    return sum(tensor.nbytes for tensor in held if tensor is not None)
