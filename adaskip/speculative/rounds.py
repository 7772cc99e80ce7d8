"""The decoding loop of one request: draft some tokens, verify them, keep the accepted ones and one more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from adaskip.speculative.choice import Greedy, Sampling
from adaskip.speculative.drafting import Drafting, FixedLength
from adaskip.speculative.forwards import ForwardRunner
from adaskip.speculative.ngrams import NGrams
from adaskip.speculative.statistics import DraftStatistics


class Rounds:
    """Decodes one request in rounds of drafting and verification.

    scores, logits: one [1, V] tensor per answer token, if the generation config asks for them; else None.
    """

    def __init__(
        self,
        *,
        forwards: ForwardRunner,
        drafting: Drafting | FixedLength,
        choose: Greedy | Sampling,
        process: Callable[..., Any],
        stop: Callable[..., Any],
        config: GenerationConfig,
        streamer: BaseStreamer | None,
        statistics: DraftStatistics,
    ):
        self.forwards, self.drafting, self.choose, self.statistics = forwards, drafting, choose, statistics
        self.process, self.stop, self.streamer = process, stop, streamer
        self.max_length: int = config.max_length
        returned = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if returned and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if returned and config.output_logits else None

    def run(self, ids: Tensor) -> Tensor:
        """Decode until a stopping criterion is met. ids: the prompt, [1, S]. Returns prompt and answer, [1, S']."""
        ids, kept, finished = self._accept(ids, [], self.forwards.prefill(ids))
        self.drafting.begin(kept)
        clock = self.forwards.clock
        while not finished:
            start_s = clock()
            draft = self.drafting.next(self.max_length - ids.shape[1] - 1)
            drafted = draft.source.draft(ids, draft.most, draft.least_survival) if draft.source else []
            drafted_s = clock()
            ahead = torch.cat([ids, ids.new_tensor([drafted])], dim=-1) if drafted else ids
            logits = self.forwards.verify(ahead, len(drafted) + 1)
            ids, kept, finished = self._accept(ids, drafted, logits)
            self.forwards.forget_rejected(len(drafted) + 1 - len(kept))  # without any, sliding layers still shrink
            draft_s, verify_s = drafted_s - start_s, clock() - drafted_s
            self.drafting.add(draft, drafted, kept, draft_s, verify_s)
            self._count(drafted, kept, isinstance(draft.source, NGrams), draft_s, verify_s)
        if self.streamer is not None:
            self.streamer.end()
        return ids

    def _accept(self, ids: Tensor, drafted: Sequence[int], logits: Tensor) -> tuple[Tensor, list[int], bool]:
        """Append the accepted tokens and one token of the full model: (ids, these tokens, whether the answer ends).

        logits: of the full model, [len(drafted) + 1, V]. A drafted token is accepted if the full model chooses it, too.
        Processors, criteria and streamer are called as if the full model decoded alone.
        """
        kept: list[int] = []
        for i, row in enumerate(logits.split(1)):
            if drafted:
                row = row.clone()  # a processor may change it in place; returned rows must not keep all logits alive
            scores: Tensor = self.process(ids, row)
            if self.logits is not None:
                self.logits += (row,)
            if self.scores is not None:
                self.scores += (scores,)
            token = self.choose(scores)
            ids = torch.cat([ids, token[None]], dim=-1)
            if self.streamer is not None:
                self.streamer.put(token.cpu())
            finished = bool(self.stop(ids, self.scores).all())
            kept.append(int(token))
            if finished or i == len(drafted) or kept[-1] != drafted[i]:
                return ids, kept, finished
        raise AssertionError("the last row always returns")

    def _count(self, drafted: Sequence[int], kept: Sequence[int], free: bool, draft_s: float, verify_s: float) -> None:
        judged = [mine == token for mine, token in zip(drafted, kept, strict=False)]
        self.statistics += DraftStatistics(
            new_tokens=len(kept),
            draft_forwards=0 if free else len(drafted),
            copied=len(drafted) if free else 0,
            verify_forwards=1,
            accepted=sum(judged),
            judged=len(judged),
            draft_s=draft_s,
            verify_s=verify_s,
        )
