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
from adaskip.core.plan import EMPTY_PLAN
from adaskip.core.reference_loss import ReadPrompt, reference_loss, rewound
from adaskip.core.strategy import Strategy
from adaskip.core.token_ids import end_token_ids, left_padded

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
    strategy: Strategy | None,
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

    strategy: None for the full, unpatched model. input_ids: one 1-D tensor of token ids per sample. eos_token_ids:
    tokens that end an answer; if empty, those of the model's generation config. references: per sample, token ids of an
    answer whose loss after the prompt is also measured; the times exclude it. compile: run compiled decode steps;
    this needs a static cache, and compiles a graph for each set of skipped sublayers when it first occurs, so time a
    second generation of the same lengths. True means transformers' default config, CUDA graphs on CUDA.
    Raises ValueError for a compiled generation on a cache that is not static.
    """
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode; call model.eval() before generating")
    if references is not None and len(references) != len(input_ids):
        raise ValueError(f"one reference for each of {len(input_ids)} prompts is needed, not {len(references)}")
    caching = _cache_options(model, cache_implementation, compile)
    ids, mask = left_padded(input_ids, pad_token_id, execution_device(model))
    clock, first = _TokenClock(), _FirstLogits()
    ends = list(end_token_ids(model, eos_token_ids))
    patched = nullcontext() if strategy is None else skipping(model, strategy, eos_token_id=ends)
    with patched as session:
        start_s = _now(ids.device)
        output = plain_generate(
            model,
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens or None,
            eos_token_id=ends or None,
            pad_token_id=pad_token_id,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([clock]),
            logits_processor=LogitsProcessorList([first] if references else []),
            **caching,
        )
        end_s = _now(ids.device)
        trace = None if session is None else session.last_request
    assert clock.first_token_s is not None
    further = output.sequences.shape[1] - ids.shape[1] - 1
    cache = getattr(output, CACHE)
    held_bytes = kv_bytes(cache) // len(ids)
    read = None
    unchanged = len(ids) == 1 and not min_new_tokens  # min_new_tokens masks the end tokens' logits
    if references and unchanged and rewound(cache, ids.shape[1], strategy, further):
        assert first.logits is not None
        read = ReadPrompt(cache, first.logits[0])
    losses = [
        None if answer is None else reference_loss(model, strategy, prompt, answer, eos_token_ids=ends, read=read)
        for prompt, answer in zip(input_ids, references or [None] * len(ids), strict=True)
    ]
    ran = (EMPTY_PLAN, EMPTY_PLAN) if trace is None else (trace.prefill_plan, trace.decode_plan)
    plan = {name: each.to_dict() for name, each in zip(("prefill", "decode"), ran, strict=True)}
    return [
        Generation(
            token_ids=list(takewhile(lambda token: token not in ends, row[ids.shape[1] :].tolist())),
            ttft_s=clock.first_token_s - start_s,
            tpot_ms=1000 * (end_s - clock.first_token_s) / further if further else None,
            kv_bytes=held_bytes,
            plan=plan,
            online_ffns=[] if trace is None else list(trace.online_ffns),
            reference_loss=loss,
        )
        for row, loss in zip(output.sequences, losses, strict=True)
    ]


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
