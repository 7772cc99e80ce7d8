"""The loss of a reference answer after a prompt, under the plans of a strategy.

The answer is teacher-forced: its tokens are the inputs of decode steps 1, 2, ... of a request, each under the plan of
the strategy for that step, including the learning window. All tokens after the last change of plan share one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from adaskip.core.blocks import execution_device
from adaskip.core.context import skipping
from adaskip.core.hf import CACHE
from adaskip.core.in_place_cache import GROWING_CACHES, UNBOUNDED_LAYERS
from adaskip.core.kv_cache import SkippedLayer
from adaskip.core.model_plan import strategy_of
from adaskip.core.plan import SkipPlan
from adaskip.core.strategy import Strategy
from adaskip.core.wrappers import unwrapped


@dataclass(frozen=True)
class ReadPrompt:
    """The state after a prompt of one sequence: its KV cache, and the logits after its last token, [V]."""

    cache: Cache
    logits: Tensor


@torch.no_grad()
def reference_loss(
    model: PreTrainedModel,
    strategy: Strategy | SkipPlan | None,
    prompt: Tensor,
    answer: Tensor,
    *,
    eos_token_ids: Sequence[int] = (),
    read: ReadPrompt | None = None,
) -> float:
    """Mean negative log-likelihood of the answer's tokens, in nats per token.

    Args:
        strategy: a strategy or plan, None for the full model.
        prompt, answer: token ids, 1-D.
        eos_token_ids: tokens that end a row of the learning window.
        read: the state after the prompt under the same strategy, None to run the prompt; its cache grows.

    Raises:
        ValueError: prompt or answer is empty.
    """
    if not len(prompt) or not len(answer):
        raise ValueError(f"a loss needs a prompt and an answer; they have {len(prompt)} and {len(answer)} tokens")
    stock: Any = unwrapped(model)
    if strategy is not None:
        strategy = strategy_of(strategy, stock)
    device = execution_device(stock)
    prompt, answer = prompt.to(device)[None], answer.to(device)[None]
    patched = nullcontext() if strategy is None else skipping(model, strategy, eos_token_id=list(eos_token_ids))
    with patched as session:
        if read is None:
            cache = DynamicCache(config=stock.config)
            logits = stock(input_ids=prompt, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits[0, -1]
            read = ReadPrompt(cache, logits)
        rows = [read.logits.to(device)[None]]
        for step in _steps(strategy, answer[:, :-1]):
            with nullcontext() if session is None else session.decoding():
                rows.append(stock(input_ids=step, **{CACHE: read.cache}, use_cache=True).logits[0])
    return float(cross_entropy(torch.cat([row.float() for row in rows]), answer[0].to(rows[0].device)))


def _steps(strategy: Strategy | None, ids: Tensor) -> list[Tensor]:
    """Split ids [1, T] into the inputs of forwards: single tokens while the plan may change, then the rest at once."""
    count = ids.shape[1]
    if strategy is None or not count:
        return [ids] if count else []
    last = strategy.decode_plan(count)
    changing = max((step for step in range(1, count) if strategy.decode_plan(step) != last), default=0)
    single = min(count, max(changing, strategy.window_tokens))
    one_by_one = list(ids[:, :single].split(1, dim=1)) if single else []  # split would return one empty part
    return [*one_by_one, *([ids[:, single:]] if single < count else [])]


def rewound(cache: Any, prompt_tokens: int, strategy: Strategy | None, num_tokens: int) -> bool:
    """Remove an answer of `num_tokens` from the cache of one sequence, if that restores the state after the prompt.

    Returns False, without changing the cache, if layers drop tokens or have a fixed size, or if the set of skipped
    attentions changed within the answer: the cache then lacks K/V that its first step needs.
    """
    plain = type(cache) in GROWING_CACHES and all(
        type(layer) in (*UNBOUNDED_LAYERS, SkippedLayer) for layer in cache.layers
    )
    if not plain or getattr(cache, "offloading", False):
        return False
    steps = [] if strategy is None else [strategy.decode_plan(step).attention for step in range(1, num_tokens + 1)]
    if any(attention != steps[0] for attention in steps):
        return False
    if extra := int(cache.get_seq_length()) - prompt_tokens:
        cache.crop(-extra)
    return True
