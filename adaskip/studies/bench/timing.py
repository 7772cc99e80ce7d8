"""One generation, timed or counted.

Timed generations are greedy, of fixed length, without synchronisation between the first mark and the last. Calls,
operations and bytes of the KV cache are counted: they are exact where times are too noisy to resolve one per cent.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedModel, StaticCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from adaskip.core.blocks import decoder_layers, find_decoder
from adaskip.core.context import skipping
from adaskip.core.decoding import plain_generate
from adaskip.core.hf import CACHE, TorchDispatchMode, on_any_device
from adaskip.core.kv_cache import kv_bytes, restore_emptied
from adaskip.core.patching import patches_of
from adaskip.core.plan import SkipPlan
from adaskip.core.request import RequestTrace
from adaskip.roofline import ModelShape, kv_bytes_per_token
from adaskip.strategies import Strategy
from adaskip.studies.bench.settings import CLOCKS, TURNS, Cell, Clock, Workload

MANY = 64
"""Number of step graphs: enough for every set of a benchmark, so that later sets are not slower."""


class Stopwatch:
    """Marks moments by CUDA events or a system clock without waiting for the device; only `laps` waits, once."""

    def __init__(self, device: torch.device, clock: Clock):
        self.device, self.now = device, time.thread_time if clock == TURNS else CLOCKS[clock]
        self.moments: list[Any] = []

    def mark(self) -> None:
        if self.device.type != "cuda":
            self.moments.append(self.now())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.moments.append(event)

    def laps(self) -> list[float]:
        """Seconds from each mark to the next."""
        pairs = itertools.pairwise(self.moments)
        if self.device.type != "cuda":
            return [after - before for before, after in pairs]
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """An idle device, and no garbage collection, as in the standard library's timeit. Contexts may nest."""
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@cache
def compile_config() -> CompileConfig:
    """transformers' default on any device, with separate graphs for each prompt length; always the same object, so that
    graphs are reused."""
    return on_any_device(CompileConfig(dynamic=False))


class StaticCaches:
    """The static KV caches of cells, emptied and reused: a captured CUDA graph reads fixed addresses, so a new one
    needs a new capture. Caches of other workloads are dropped, since a longer one would slow down a shorter one."""

    def __init__(self) -> None:
        self.caches: dict[tuple[Cell, Workload], StaticCache] = {}

    def emptied(self, cell: Cell, workload: Workload, model: PreTrainedModel) -> StaticCache:
        """The empty cache of a cell for a workload; those of other workloads are dropped."""
        self.caches = {key: cache for key, cache in self.caches.items() if key[1] == workload}
        if (cell, workload) not in self.caches:
            length = workload.prompt_tokens + workload.new_tokens
            config = model.config.get_text_config(decoder=True)
            self.caches[cell, workload] = StaticCache(config=config, max_cache_len=length)
        cache = self.caches[cell, workload]
        restore_emptied(cache)
        cache.reset()
        return cache


@dataclass(frozen=True)
class TimedGeneration:
    """ttft_s: from the call to the first token. steps_s: time of each further token, between calls of the stopping
    criteria. cache: after the last step. peak_bytes: peak of allocated memory, None on the CPU. trace: what was
    skipped, None for the stock model."""

    ttft_s: float
    steps_s: list[float]
    cache: Cache
    peak_bytes: int | None
    trace: RequestTrace | None

    def to_dict(self) -> dict[str, Any]:
        """The fields in the records of a result."""
        measured: dict[str, Any] = {"ttft_s": self.ttft_s, "steps_s": self.steps_s, "kv_bytes": kv_bytes(self.cache)}
        measured["peak_memory_bytes"] = self.peak_bytes
        return measured if self.trace is None else {**measured, "online_ffns": list(self.trace.online_ffns)}


class _MarkTokens(StoppingCriteria):
    """Stops nothing; `generate` calls it after each token."""

    def __init__(self, stopwatch: Stopwatch, rows: int, device: torch.device):
        self.stopwatch = stopwatch
        self.go_on = torch.zeros(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:  # pyright: ignore
        self.stopwatch.mark()
        return self.go_on


@torch.no_grad()
def timed_generation(
    model: PreTrainedModel, strategy: Strategy | None, ids: Tensor, new_tokens: int, clock: Clock, **options: Any
) -> TimedGeneration:
    """Generate at most `new_tokens` tokens per row and time each.

    strategy: None for the stock model. ids: [B, S]. options: further arguments of `generate`.
    """
    stopwatch = Stopwatch(ids.device, clock)
    with (
        nullcontext() if strategy is None else skipping(model, strategy, max_step_graphs=MANY) as session,
        undisturbed(ids.device),
    ):
        stopwatch.mark()
        output = plain_generate(
            model,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([_MarkTokens(stopwatch, len(ids), ids.device)]),
            **{"pad_token_id": 0, **options},
        )
        ttft_s, *steps_s = stopwatch.laps()
        trace = None if session is None else session.last_request
    peak = torch.cuda.max_memory_allocated(ids.device) if ids.is_cuda else None
    return TimedGeneration(ttft_s, steps_s, getattr(output, CACHE), peak, trace)


class _SublayerMarks:
    """Probe that marks the moment after each sublayer; a hook marks the one before the first layer."""

    def __init__(self, stopwatch: Stopwatch):
        self.stopwatch = stopwatch

    def before_layers(self, layer: nn.Module, args: tuple) -> None:
        self.stopwatch.mark()

    def record(self, kind: str, layer: int, a: Tensor, b: Tensor, change: Tensor | None) -> None:
        if kind != "layer":
            self.stopwatch.mark()


def sublayer_times(
    model: PreTrainedModel, ids: Tensor, new_tokens: int, clock: Clock
) -> tuple[TimedGeneration, list[list[float]]]:
    """A generation of the full model, and the times of its sublayers: [forward][2M], alternating attention and FFN."""
    patches, first, stopwatch = patches_of(model), decoder_layers(model)[0], Stopwatch(ids.device, clock)
    probe = _SublayerMarks(stopwatch)
    with patches.install():
        patches.set_probe(probe)
        hook = first.register_forward_pre_hook(probe.before_layers)
        try:
            timed = timed_generation(model, None, ids, new_tokens, clock)
        finally:
            hook.remove()
    laps, per_forward = [*stopwatch.laps(), 0.0], 2 * len(patches.patches) + 1
    assert len(laps) == new_tokens * per_forward
    starts = range(0, len(laps), per_forward)  # the lap between two forwards belongs to no sublayer
    return timed, [laps[start : start + per_forward - 1] for start in starts]


STEPS = 8


class _Operations(TorchDispatchMode):
    """Counts the operations that torch dispatches: on a GPU, roughly its kernel launches."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        self.number += 1
        return func(*args, **(kwargs or {}))


def _count_calls(work: Callable[[], object]) -> dict[str, int]:
    """Count the Python function calls (including C functions) and torch operations of a call."""
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
    """Python function calls (including C functions) and torch operations of a prefill and of a decode step."""
    with nullcontext() if strategy is None else skipping(model, strategy):
        _generate(model, ids, 1 + STEPS)  # work that is only done once
        prefill, whole = (_count_calls(lambda new=new: _generate(model, ids, new)) for new in (1, 1 + STEPS))
    return {what: {"prefill": prefill[what], "decode_step": (whole[what] - prefill[what]) / STEPS} for what in prefill}


class _Watch:
    """Hooks of the decoder: the bytes of the cache before each forward, and weak references to the prompt's K/V."""

    def __init__(self) -> None:
        self.bytes_at_start: list[int] = []
        self.prompt: dict[int, list[ref[Tensor]]] = {}
        self.alive: set[int] = set()

    def before(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.bytes_at_start.append(kv_bytes(kwargs[CACHE]))
        if len(self.bytes_at_start) == 2:
            self.alive = {i for i, tensors in self.prompt.items() if any(tensor() is not None for tensor in tensors)}

    def after(self, decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not self.prompt:
            layers: list[Any] = kwargs[CACHE].layers
            self.prompt = {i: [ref(x.keys), ref(x.values)] for i, x in enumerate(layers) if x.keys is not None}


@torch.no_grad()
def check_kv(model: PreTrainedModel, strategy: Strategy, ids: Tensor, new_tokens: int) -> dict[str, Any]:
    """Actual and expected bytes of the KV cache before the first decode step and at the end, and the skipped layers
    whose K/V of the prompt were not freed.

    The expected bytes are those of the live layers, computed from the configuration.
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
        "bytes_at_end": kv_bytes(getattr(output, CACHE)),
        "expected_at_end": live * end,
        "all_layers_at_end": every * end,
        "kept_alive": sorted(watch.alive & plan.attention),
    }
