"""What is counted and not timed: a generation's calls and operations, and the bytes of its KV cache."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.core.blocks import find_decoder
from adaskip.core.context import skipping
from adaskip.core.hf import TorchDispatchMode
from adaskip.core.kv_cache import kv_bytes
from adaskip.core.plan import SkipPlan
from adaskip.roofline import ModelShape, kv_bytes_per_token
from adaskip.strategies import Strategy

STEPS = 8


class _Operations(TorchDispatchMode):
    """Counts the operations torch dispatches: on a GPU, about the kernels that it is asked to launch."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        self.number += 1
        return func(*args, **(kwargs or {}))


def _count_calls(work: Callable[[], object]) -> dict[str, int]:
    """Function calls of Python (C functions included) and torch operations."""
    calls, before = 0, sys.getprofile()

    def see(frame, event: str, argument) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(before)
    with _Operations() as operations:
        work()
    return {"python_calls": calls, "torch_operations": operations.number}


def _generate(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Any:
    stock: Any = model.generate
    return stock(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        pad_token_id=0,
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
    )


@torch.no_grad()
def count_work(model: PreTrainedModel, strategy: Strategy | None, ids: Tensor) -> dict[str, dict[str, float]]:
    """Function calls of Python (C functions included) and torch operations, in a prefill and in a decode step: exact
    where times are too noisy to tell one per cent."""
    with nullcontext() if strategy is None else skipping(model, strategy):
        _generate(model, ids, 1 + STEPS)  # what is only done once is done now
        prefill, whole = (_count_calls(lambda new=new: _generate(model, ids, new)) for new in (1, 1 + STEPS))
    return {what: {"prefill": prefill[what], "decode_step": (whole[what] - prefill[what]) / STEPS} for what in prefill}


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
    """Bytes held and bytes expected when the first decode step begins and at the end, and which layers' K/V of the
    prompt were kept although they are skipped.

    Expected are the live layers' share of all layers' K/V, from the configuration.
    """
    watch, decoder = _Watch(), find_decoder(model)
    with skipping(model, strategy):
        hooks = [
            decoder.register_forward_pre_hook(watch.before, with_kwargs=True),
            decoder.register_forward_hook(watch.after, with_kwargs=True),
        ]
        try:
            output = _generate(model, ids, new_tokens)
        finally:
            for hook in hooks:
                hook.remove()
    plan, shape = strategy.decode_plan(1).union(strategy.prefill_plan), ModelShape.of(model.config)
    live, every = (len(ids) * kv_bytes_per_token(shape, p, model.dtype.itemsize) for p in (plan, SkipPlan()))
    prompt, end = ids.shape[1], ids.shape[1] + new_tokens - 1
    return {
        "live_layers": strategy.num_layers - len(plan.attention),
        "layers": strategy.num_layers,
        "bytes_before_decode": watch.bytes_at_start[1],
        "expected_before_decode": live * prompt,
        "bytes_at_end": kv_bytes(output.past_key_values),
        "expected_at_end": live * end,
        "all_layers_at_end": every * end,
        "kept_alive": sorted(watch.alive & plan.attention),
    }
