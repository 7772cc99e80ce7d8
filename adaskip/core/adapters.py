"""Finds the adapters that are active on a model, whether PEFT or transformers added them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from adaskip.core.wrappers import unwrapped


def active_adapters(model: nn.Module) -> str:
    """Names and scalings of the adapters that change what `model` computes, e.g. "default x2"; "" for none.

    Adapters that are disabled, inactive or merged into the weights do not count. Merged adapters are part of the
    weights and of their fingerprint, and PEFT applies no other adapter beside them. An adapter whose scaling differs
    between layers is listed with every scaling.
    """
    found: dict[str, set[float]] = {}
    for name, scaling in _adapters(unwrapped(model)):
        found.setdefault(name, set()).update(() if scaling is None else (float(scaling),))
    return ", ".join(" ".join([name, *(f"x{x:g}" for x in sorted(found[name]))]) for name in sorted(found))


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, scaling) of each adapter that is active in a layer; scaling is None for methods without one.

    PEFT layers are recognised by their attributes, so peft need not be installed.
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
