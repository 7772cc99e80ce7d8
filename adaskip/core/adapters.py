"""Which adapters act on a model: PEFT's wrappers, or adapters that transformers itself put in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from adaskip.core.wrappers import unwrapped


def active_adapters(model: nn.Module) -> str:
    """The adapters that change what `model` computes, "" if there are none: by name and scaling, as "default x2".

    Adapters that are disabled, not active or merged into the weights do not count; merged ones are part of the weights,
    and of their fingerprint, and PEFT applies no other beside them. An adapter that scales layers differently shows
    each scaling.
    """
    found: dict[str, set[float]] = {}
    for name, scaling in _adapters(unwrapped(model)):
        found.setdefault(name, set()).update(() if scaling is None else (float(scaling),))
    return ", ".join(" ".join([name, *(f"x{x:g}" for x in sorted(found[name]))]) for name in sorted(found))


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and scaling, None where the method has none, of each adapter that acts on a layer.

    PEFT's layers are known by their attributes, so that peft need not be installed.
    """
    for module in model.modules():
        layer: Any = module
        if not hasattr(layer, "adapter_layer_names") or layer.disable_adapters or getattr(layer, "merged", False):
            continue
        there = {name for part in layer.adapter_layer_names for name in getattr(layer, part, {})}
        scaling = getattr(layer, "scaling", None)
        for name in layer.active_adapters:
            if name in there:
                yield name, scaling.get(name) if isinstance(scaling, dict) else None
