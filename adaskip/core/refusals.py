"""Refuses, inside a `skipping` context, the model methods and caches for which no plan can be followed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from adaskip.core.hf import CANDIDATES, CONTINUOUS_BATCHING
from adaskip.core.kv_cache import skipped_layers
from adaskip.core.strategy import Strategy


def refusals(model: Any, strategy: Strategy) -> dict[str, Callable[..., Any]]:
    """Replacements, by name, for methods of `model` that always refuse or refuse if `strategy` changes its plan."""
    batching = {name: _refused(name) for name in CONTINUOUS_BATCHING if hasattr(model, name)}
    return {**batching, CANDIDATES: _checked_candidates(getattr(model, CANDIDATES), strategy)}


def _refused(name: str) -> Callable[..., Any]:
    def refuse(*args, **kwargs):
        raise ValueError(
            f"{name} (continuous batching, cache_implementation='paged') is not supported inside skipping(...): "
            "its paged cache holds many requests at once, but a plan belongs to one; use generate"
        )

    return refuse


def _checked_candidates(stock: Callable[..., Any], strategy: Strategy) -> Callable[..., Any]:
    """The first step of assisted decoding, which refuses a strategy with different plans for prompt and answer."""

    @functools.wraps(stock)
    def candidates(*args, **kwargs):
        if getattr(kwargs.get("generation_config"), "assistant_early_exit", None) is not None:
            raise ValueError(
                "assistant_early_exit drafts with the same model and is not supported inside skipping(...); "
                "use lossless(model, EarlyExit(...)) for that"
            )
        if not strategy.one_plan:
            raise ValueError(
                "assisted decoding reads prompt and drafted tokens in one forward, which needs one plan for all "
                f"of them; {strategy.name} in phase {strategy.phase!r} changes its plan during a request "
                "(allowed: phase prefill, or a fixed set without a learning window in phase e2e)"
            )
        return stock(*args, **kwargs)

    return candidates


def check_cache(cache: Any) -> None:
    """Raise ValueError unless `cache` is a transformers Cache that consists of layers."""
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise ValueError(
            "skipping needs a transformers Cache made of layers (DynamicCache, StaticCache); got "
            f"{type(cache).__name__}"
        )


def check_grows(cache: Cache) -> None:
    """Raise ValueError for a cache of a fixed size, whose masks do not let a prompt's last token run by itself."""
    if cache.is_compileable:
        raise ValueError(
            f"a set that keeps the K/V needs a cache that grows (DynamicCache); got {type(cache).__name__}, in which "
            "the last token of a prompt cannot run by itself"
        )


def check_holds_all(cache: Cache) -> None:
    """Raise ValueError for a cache without the K/V of some layers, over which no forward of the full model can run."""
    if lacking := sorted(skipped_layers(cache)):
        raise ValueError(
            f"a set that keeps the K/V needs a cache that holds those of every layer; layers {lacking} of this one "
            "lack them, since their attention was skipped in another context; start with a new cache"
        )


@torch.compiler.disable()
def refuse_compiled_call() -> None:
    """Raise ValueError; runs outside of any compiled graph."""
    raise ValueError(
        "a compiled model was called directly inside skipping(...), but its graph would keep the plan of its first "
        "call; call the model itself, or generate with a static cache, which compiles a graph for each plan"
    )
