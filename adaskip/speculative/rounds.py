"""The decoding loop of one request: draft some tokens, verify them, keep the accepted ones and one more."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from adaskip.core.strategy import Strategy
from adaskip.core.token_ids import end_token_ids
from adaskip.speculative.choice import Chooser, DraftedToken, Greedy, Sampling
from adaskip.speculative.draft_length import DraftLength
from adaskip.speculative.forwards import ForwardRunner
from adaskip.speculative.statistics import DraftStatistics


class Rounds:
    """Decodes one request in rounds of drafting and verification.

    scores, logits: one [1, V] tensor per answer token, if the generation config asks for them; else None.
    """

    def __init__(
        self,
        *,
        forwards: ForwardRunner,
        strategy: Strategy,
        length: DraftLength,
        process: Callable[..., Any],
        process_draft: Callable[..., Any],
        stop: Callable[..., Any],
        config: GenerationConfig,
        streamer: BaseStreamer | None,
        statistics: DraftStatistics,
    ):
        self.forwards, self.strategy, self.length, self.statistics = forwards, strategy, length, statistics
        self.process, self.process_draft, self.stop, self.streamer = process, process_draft, stop, streamer
        self.max_length: int = config.max_length
        eos = config.eos_token_id
        self.ends = () if eos is None else end_token_ids(forwards.model, eos)
        self.choose: Chooser = Sampling() if config.do_sample else Greedy()
        returned = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if returned and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if returned and config.output_logits else None

    def run(self, ids: Tensor) -> Tensor:
        """Decode until a stopping criterion is met. ids: the prompt, [1, S]. Returns prompt and answer, [1, S']."""
        prompt_length = ids.shape[1]
        ids, finished = self._accept(ids, [], self.forwards.prefill(ids))
        while not finished:
            start_s = time.perf_counter()
            drafted = self._draft(ids, step=ids.shape[1] - prompt_length)
            drafted_s = time.perf_counter()
            tokens = ids.new_tensor([[each.token for each in drafted]])
            logits = self.forwards.verify(torch.cat([ids, tokens], dim=-1), len(drafted) + 1)
            before = ids.shape[1]
            ids, finished = self._accept(ids, drafted, logits)
            new = ids.shape[1] - before
            self.forwards.forget_rejected(len(drafted) + 1 - new)
            self._count(drafted, ids[0, before:].tolist(), drafted_s - start_s, time.perf_counter() - drafted_s)
        if self.streamer is not None:
            self.streamer.end()
        return ids

    def _draft(self, ids: Tensor, step: int) -> list[DraftedToken]:
        """Draft until the draft length is reached, an end token is drafted, or only one more token may follow.

        Only stateless processors are called here (`for_draft`).
        """
        wanted = min(self.length.next(), self.max_length - ids.shape[1] - 1)
        if wanted < 1:
            return []
        plan = self.strategy.decode_plan(step)
        drafted: list[DraftedToken] = []
        while len(drafted) < wanted:
            scores = self.process_draft(ids, self.forwards.draft(ids, plan))
            drafted.append(self.choose.draft(scores))
            if drafted[-1].token in self.ends:
                break
            ids = torch.cat([ids, ids.new_tensor([[drafted[-1].token]])], dim=-1)
        self.forwards.forget_draft(plan, len(drafted))
        return drafted

    def _accept(self, ids: Tensor, drafted: list[DraftedToken], logits: Tensor) -> tuple[Tensor, bool]:
        """Append the accepted tokens and one token of the full model; returns (ids, whether the answer is finished).

        logits: of the full model, [len(drafted) + 1, V]. Processors, criteria and streamer are called as if the full
        model decoded alone.
        """
        for i, row in enumerate(logits.split(1)):
            row = row.clone()  # a processor may change it in place, and returned rows must not keep all logits alive
            scores: Tensor = self.process(ids, row)
            if self.logits is not None:
                self.logits += (row,)
            if self.scores is not None:
                self.scores += (scores,)
            token = self.choose.verify(scores, drafted[i] if i < len(drafted) else None)
            ids = torch.cat([ids, token[None]], dim=-1)
            if self.streamer is not None:
                self.streamer.put(token.cpu())
            finished = bool(self.stop(ids, self.scores).all())
            if finished or i == len(drafted) or int(token) != drafted[i].token:
                return ids, finished
        raise AssertionError("the last row always returns")

    def _count(self, drafted: list[DraftedToken], tokens: list[int], draft_s: float, verify_s: float) -> None:
        judged = [each.token == token for each, token in zip(drafted, tokens, strict=False)]
        self.length.add(sum(judged), len(judged))
        self.statistics += DraftStatistics(
            new_tokens=len(tokens),
            draft_forwards=len(drafted),
            verify_forwards=1,
            accepted=sum(judged),
            judged=len(judged),
            draft_s=draft_s,
            verify_s=verify_s,
        )
