"""Whether a skipped attention's K/V really are not there: bytes to the byte, and freed before the next forward."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from adaskip.core.blocks import find_decoder
from adaskip.core.context import skipping
from adaskip.core.kv_cache import kv_bytes
from adaskip.core.plan import SkipPlan
from adaskip.roofline import ModelShape, kv_bytes_per_token
from adaskip.strategies import Strategy


class _Watch:
    """Hooks of the decoder: the cache's bytes as each forward begins, and the prompt's K/V by weak references."""

    def __init__(self) -> None:
        self.bytes_at_start: list[int] = []
        self.prompt: dict[int, list[ref[Tensor]]] = {}
        self.alive: set[int] = set()

    def before(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.bytes_at_start.append(kv_bytes(kwargs["past_key_values"]))
        if len(self.bytes_at_start) == 2:
            self.alive = {i for i, tensors in self.prompt.items() if any(tensor() is not None for tensor in tensors)}

    def after(self, decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not self.prompt:
            layers: list[Any] = kwargs["past_key_values"].layers
            self.prompt = {i: [ref(x.keys), ref(x.values)] for i, x in enumerate(layers) if x.keys is not None}


@torch.no_grad()
def check_kv(model: PreTrainedModel, strategy: Strategy, ids: Tensor, new_tokens: int) -> dict[str, Any]:
    """Bytes held and bytes expected when the first decode step begins and at the end, and whether none were kept.

    Expected are the live layers' share of all layers' K/V, from the configuration.
    """
    watch, decoder = _Watch(), find_decoder(model)
    with skipping(model, strategy):
        hooks = [
            decoder.register_forward_pre_hook(watch.before, with_kwargs=True),
            decoder.register_forward_hook(watch.after, with_kwargs=True),
        ]
        try:
            stock: Any = model.generate
            output = stock(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                pad_token_id=0,
                max_new_tokens=new_tokens,
                return_dict_in_generate=True,
            )
        finally:
            for hook in hooks:
                hook.remove()
    cache: Cache = output.past_key_values
    plan, shape = strategy.decode_plan(1).union(strategy.prefill_plan), ModelShape.of(model.config)
    per_token = len(ids) * kv_bytes_per_token(shape, plan, model.dtype.itemsize)
    all_layers = len(ids) * kv_bytes_per_token(shape, SkipPlan(), model.dtype.itemsize)
    prompt, end = ids.shape[1], ids.shape[1] + new_tokens - 1
    return {
        "live_layers": strategy.num_layers - len(plan.attention),
        "layers": strategy.num_layers,
        "bytes_before_decode": watch.bytes_at_start[1],
        "expected_before_decode": per_token * prompt,
        "bytes_at_end": kv_bytes(cache),
        "expected_at_end": per_token * end,
        "all_layers_at_end": all_layers * end,
        "kept_alive": sorted(watch.alive & plan.attention),
    }
