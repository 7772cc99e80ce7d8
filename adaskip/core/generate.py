"""Timed greedy generation: returns TTFT, TPOT, KV bytes and the plans that were used."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from adaskip.core.blocks import execution_device
from adaskip.core.context import skipping
from adaskip.core.decoding import plain_generate
from adaskip.core.hf import CACHE, on_any_device
from adaskip.core.kv_cache import kv_bytes
from adaskip.core.model_plan import strategy_of
from adaskip.core.plan import EMPTY_PLAN, SkipPlan
from adaskip.core.reference_loss import ReadPrompt, reference_loss, rewound
from adaskip.core.request import RequestTrace
from adaskip.core.strategy import Strategy
from adaskip.core.token_ids import end_token_ids, left_padded
from adaskip.core.wrappers import unwrapped

CacheImplementation = Literal["dynamic", "static"]


@dataclass(frozen=True)
class Generation:
    """One sample's answer with its timings.

    token_ids: the new tokens without the end token. ttft_s: time from the call to the first token. tpot_ms: mean time
    of each later token, None if there was none. kv_bytes: bytes of K/V at the end, per row of the batch.
    plan: the skipped layers in prefill and in the last decode step. online_ffns: layers whose FFN was added online.
    The times are those of the whole batch that the sample was generated in.
    reference_loss: loss of the reference answer, nats per token; None without a reference.
    """

    token_ids: list[int]
    ttft_s: float
    tpot_ms: float | None
    kv_bytes: int
    plan: dict[str, dict[str, list[int]]]
    online_ffns: list[int]
    reference_loss: float | None = None


class _FirstLogits(LogitsProcessor):
    """Changes nothing; keeps the logits after the prompt, [B, V]."""

    def __init__(self) -> None:
        self.logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore
        if self.logits is None:
            self.logits = scores
        return scores


class _TokenClock(StoppingCriteria):
    """A stopping criterion that never stops; it records when the first token is done."""

    def __init__(self) -> None:
        self.first_token_s: float | None = None
        self.never = torch.empty(0, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:  # pyright: ignore
        if self.first_token_s is None:
            self.first_token_s = _now(input_ids.device)
            self.never = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self.never


def _now(device: torch.device) -> float:
    """The time in seconds, after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    strategy: Strategy | SkipPlan | None,
    input_ids: Sequence[Tensor],
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    min_new_tokens: int = 0,
    references: Sequence[Tensor | None] | None = None,
    cache_implementation: CacheImplementation = "dynamic",
    compile: bool | CompileConfig = False,
) -> list[Generation]:
    """Greedy answers to a batch of prompts, one beam, no logits processors, as the paper has it.

    The model's generation config is ignored, except for its end tokens if `eos_token_ids` is empty: it affects neither
    sampling, beams, penalties, suppressed or forced tokens and assisted decoding nor the cache and compilation.

    strategy: a strategy or plan, None for the full, unpatched model. input_ids: one 1-D tensor of token ids per
    sample. eos_token_ids: tokens that end an answer; if empty, those of the model's generation config. references:
    per sample, token ids of an answer whose loss after the prompt is also measured; the times exclude it. compile:
    run compiled decode steps; this needs a static cache, and compiles a graph for each set of skipped sublayers
    when it first occurs, so time a second generation of the same lengths. True means transformers' default config,
    CUDA graphs on CUDA.
    Raises ValueError for no prompts or an empty one, and a compiled generation on a cache that is not static.
    """
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode; call model.eval() before generating")
    if not len(input_ids) or not all(len(row) for row in input_ids):
        raise ValueError(f"each prompt needs at least one token; got lengths {[len(row) for row in input_ids]}")
    if references is not None and len(references) != len(input_ids):
        raise ValueError(f"one reference for each of {len(input_ids)} prompts is needed, not {len(references)}")
    caching = _cache_options(model, cache_implementation, compile)
    if strategy is not None:
        strategy = strategy_of(strategy, unwrapped(model))
    ends = list(end_token_ids(model, eos_token_ids))
    options = {
        **caching,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens or None,
        "eos_token_id": ends or None,
        "pad_token_id": pad_token_id,
    }
    answered = _answer(model, strategy, left_padded(input_ids, pad_token_id, execution_device(model)), ends, options)
    kv_bytes_per_row = kv_bytes(answered.cache) // len(input_ids)
    losses: list[float | None] = [None] * len(input_ids)
    if references:
        # min_new_tokens masks the end tokens' logits; the cache of a batch has all its rows
        read = answered.read_prompt(strategy) if len(input_ids) == 1 and not min_new_tokens else None
        losses = [
            None if answer is None else reference_loss(model, strategy, prompt, answer, eos_token_ids=ends, read=read)
            for prompt, answer in zip(input_ids, references, strict=True)
        ]
    return [
        Generation(
            token_ids=list(takewhile(lambda token: token not in ends, row)),
            ttft_s=answered.ttft_s,
            tpot_ms=answered.tpot_ms,
            kv_bytes=kv_bytes_per_row,
            plan=answered.plan,
            online_ffns=[] if answered.trace is None else list(answered.trace.online_ffns),
            reference_loss=loss,
        )
        for row, loss in zip(answered.new_tokens.tolist(), losses, strict=True)
    ]


@dataclass(frozen=True)
class _Answered:
    """What one timed `generate` has left.

    new_tokens: [B, T]. first_logits: those after the prompt, [B, V]. trace: None for the full model.
    """

    prompt_tokens: int
    new_tokens: Tensor
    first_logits: Tensor
    cache: Any
    trace: RequestTrace | None
    ttft_s: float
    later_tokens_s: float

    @property
    def tpot_ms(self) -> float | None:
        further = self.new_tokens.shape[1] - 1
        return 1000 * self.later_tokens_s / further if further else None

    @property
    def plan(self) -> dict[str, dict[str, list[int]]]:
        """The skipped layers in prefill and in the last decode step."""
        trace = self.trace
        ran = (EMPTY_PLAN, EMPTY_PLAN) if trace is None else (trace.prefill_plan, trace.decode_plan)
        return {name: plan.to_dict() for name, plan in zip(("prefill", "decode"), ran, strict=True)}

    def read_prompt(self, strategy: Strategy | None) -> ReadPrompt | None:
        """The state after the prompt of one sequence, out of the cache of its answer; None if it cannot be restored."""
        if not rewound(self.cache, self.prompt_tokens, strategy, self.new_tokens.shape[1] - 1):
            return None
        return ReadPrompt(self.cache, self.first_logits[0])


def _answer(
    model: PreTrainedModel,
    strategy: Strategy | None,
    prompts: tuple[Tensor, Tensor],
    ends: list[int],
    options: dict[str, Any],
) -> _Answered:
    """Generate and time the answers to left-padded prompts (ids, mask), [B, S]."""
    (ids, mask), clock, first = prompts, _TokenClock(), _FirstLogits()
    patched = nullcontext() if strategy is None else skipping(model, strategy, eos_token_id=ends)
    with patched as session:
        start_s = _now(ids.device)
        output = plain_generate(
            model,
            input_ids=ids,
            attention_mask=mask,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([clock]),
            logits_processor=LogitsProcessorList([first]),
            **options,
        )
        end_s = _now(ids.device)
        trace = None if session is None else session.last_request
    assert clock.first_token_s is not None
    assert first.logits is not None
    return _Answered(
        prompt_tokens=ids.shape[1],
        new_tokens=output.sequences[:, ids.shape[1] :],
        first_logits=first.logits,
        cache=getattr(output, CACHE),
        trace=trace,
        ttft_s=clock.first_token_s - start_s,
        later_tokens_s=end_s - clock.first_token_s,
    )


def _cache_options(
    model: PreTrainedModel, cache_implementation: CacheImplementation, compile: bool | CompileConfig
) -> dict[str, Any]:
    """The arguments of `model.generate` for its cache and for compilation."""
    if cache_implementation not in (allowed := get_args(CacheImplementation)):
        raise ValueError(f"unknown cache_implementation {cache_implementation!r}; allowed: {', '.join(allowed)}")
    if compile and cache_implementation != "static":
        raise ValueError(f"compile needs cache_implementation='static'; got {cache_implementation!r}")
    if cache_implementation == "dynamic":
        return {}
    if not compile:
        return {"cache_implementation": "static", "disable_compile": True}
    return {
        "cache_implementation": "static",
        "compile_config": on_any_device(CompileConfig() if compile is True else compile),
    }
