"""The state of one request: its decode step, its learning window and the FFNs it has learnt to skip.

A request lives as long as its KV cache. Chunks of one prompt, beams and later turns of a conversation belong to
the same request. A new or emptied cache begins a new request, which starts from the strategy's offline set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaskip.core.plan import EMPTY_PLAN, SkipPlan
from adaskip.core.similarity import cosine_and_ratio
from adaskip.core.strategy import FFNSimilarity, Strategy
from adaskip.core.token_ids import is_end


class LearningWindow:
    """IO similarity of FFNs over the first decoded tokens of a request.

    All rows of a batch share one set, so the mean is over all tokens of all live rows; a row is live until it has
    produced an end token, and again in a later turn. Everything stays on the device until the window closes, which
    costs one transfer.
    Paper: Eq. (5).
    """

    def __init__(self, size: int, ffns: frozenset[int], eos_token_ids: tuple[int, ...]):
        self.size, self.ffns, self.eos_token_ids = size, ffns, eos_token_ids
        self.sums: Tensor | None = None  # [3, F]: similarity, ratio and token count per FFN
        self.layers: tuple[int, ...] = ()
        self.live: Tensor | None = None  # [B, 1]

    def add(self, ffn_io: dict[int, tuple[Tensor, Tensor]], input_ids: Tensor | None) -> None:
        """Add a step. ffn_io: input and output of FFNs by layer, [B, q, D]. input_ids: [B, q], None for embeddings."""
        self.layers = tuple(sorted(ffn_io))
        device = ffn_io[self.layers[0]][0].device
        a, b = (torch.stack([ffn_io[i][side].to(device) for i in self.layers]) for side in (0, 1))  # [F, B, q, D]
        cosine, ratio = cosine_and_ratio(a, b)
        live = self._live(input_ids, cosine).to(cosine.dtype)  # [B, q]
        step = torch.stack([(x * live).sum(dim=(-2, -1)) for x in (cosine, ratio, torch.ones_like(cosine))])
        self.sums = step if self.sums is None else self.sums + step

    def _live(self, input_ids: Tensor | None, like: Tensor) -> Tensor:
        """Mask [B, q] of the step's tokens in rows that have not produced an end token yet."""
        if input_ids is None or not self.eos_token_ids:
            return torch.ones(like.shape[-2:], dtype=torch.bool, device=like.device)
        ended = is_end(input_ids, self.eos_token_ids).cumsum(dim=-1) > 0
        alive = ~ended if self.live is None or len(self.live) != len(ended) else self.live & ~ended
        self.live = alive[:, -1:]
        return alive.to(like.device)

    def close(self) -> dict[int, FFNSimilarity]:
        """The means over the window, by layer of the FFN; empty if no live token was seen."""
        if self.sums is None:
            return {}
        similarity, ratio, count = self.sums.cpu().tolist()
        rows = zip(self.layers, similarity, ratio, count, strict=True)
        return {i: FFNSimilarity(s / n, r / n) for i, s, r, n in rows if n > 0}


@dataclass(frozen=True)
class RequestTrace:
    """A record of one request: the plans of its last prompt and decode step, and the FFNs learnt online."""

    prefill_plan: SkipPlan
    decode_plan: SkipPlan
    online_ffns: tuple[int, ...]
    decode_steps: int
    window: dict[int, FFNSimilarity]


class Request:
    """Turns a strategy into the plan of each forward of one request."""

    def __init__(self, strategy: Strategy, eos_token_ids: tuple[int, ...], held: SkipPlan = EMPTY_PLAN):
        """held: attentions that already lack K/V in the request's cache, from an earlier context or a copied cache."""
        self.strategy, self.eos_token_ids = strategy, eos_token_ids
        self.decode_steps = 0
        self.learnt = EMPTY_PLAN
        self.window: LearningWindow | None = None
        self.window_result: dict[int, FFNSimilarity] = {}
        self.prompt_plan = self.answer_plan = EMPTY_PLAN
        self.released: SkipPlan | None = None  # the last plan for which the cache has freed K/V
        self.num_forwards = 0
        self._floor = held  # attentions that can no longer run because their K/V is gone
        self._merged: tuple[SkipPlan, SkipPlan, SkipPlan] | None = None

    def prefill(self) -> SkipPlan:
        """The plan for a prompt, a chunk of it, or a later turn."""
        self.prompt_plan = self._merge(self.strategy.prefill_plan, EMPTY_PLAN)
        return self.prompt_plan

    def begin_turn(self) -> None:
        """More of the prompt, or the prompt of a later turn, follows: rows that have ended answer again."""
        if self.window is not None:
            self.window.live = None

    def decode(self) -> SkipPlan:
        """The plan for the next decode step."""
        self.decode_steps += 1
        if self.window is not None and self.decode_steps > self.window.size:
            self._close_window()
        plan = self.strategy.decode_plan(self.decode_steps)
        if self.strategy.is_prompt_only:
            self._check_full_model(plan)
        self.answer_plan = self._merge(plan, self.learnt)
        if self.answer_plan.keeps_kv:
            raise ValueError(
                f"strategy {self.strategy.name} keeps the K/V of attentions that it skips in an answer; only the plan "
                "of a prompt can keep K/V"
            )
        if self.decode_steps == 1 and self.strategy.window_tokens:
            ffns = frozenset(range(self.strategy.num_layers)) - self.answer_plan.ffn
            if ffns:  # without live FFNs there is nothing to learn
                self.window = LearningWindow(self.strategy.window_tokens, ffns, self.eos_token_ids)
        return self.answer_plan

    def start_anew(self) -> None:
        """The cache was dropped: prompt and answer so far will be read again, which refills the K/V of live layers."""
        self.released = self._merged = None
        self._floor = EMPTY_PLAN

    def _close_window(self) -> None:
        assert self.window is not None
        self.window_result = self.window.close()
        self.learnt = self.strategy.learn(self.window_result)
        self.window = None

    def _merge(self, plan: SkipPlan, learnt: SkipPlan) -> SkipPlan:
        """`plan` with the learnt FFNs and the attentions whose K/V is gone; the same object while no input changes."""
        if self._merged is None or self._merged[0] is not plan or self._merged[1] is not learnt:
            self._check(plan)
            self._check(learnt)
            merged = plan.union(learnt).union(self._floor)
            self._floor = merged.attention_only()
            self._merged = (plan, learnt, merged)
        return self._merged[2]

    def _check_full_model(self, plan: SkipPlan) -> None:
        """Refuse what a strategy of the user's skips in an answer that it promises to be the full model's."""
        self._check(plan)
        if plan or self.learnt:
            raise ValueError(
                f"strategy {self.strategy.name} keeps the K/V of the prompt, so the full model answers, but it skips "
                f"{len(plan.union(self.learnt))} sublayers at decode step {self.decode_steps}; allowed: an empty "
                "decode_plan, nothing learnt"
            )

    def _check(self, plan: SkipPlan) -> None:
        """Check a plan when it changes: a strategy class of the user's may return anything."""
        if not isinstance(plan, SkipPlan):
            raise ValueError(f"strategy {self.strategy.name} returned {type(plan).__name__} instead of a SkipPlan")
        plan.check_fits(self.strategy.num_layers)

    @property
    def trace(self) -> RequestTrace:
        online = tuple(sorted(self.learnt.ffn))
        return RequestTrace(self.prompt_plan, self.answer_plan, online, self.decode_steps, self.window_result)
