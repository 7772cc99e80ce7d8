"""Chooses the tokens of the full model, and keeps drafted ones as long as they are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from adaskip.speculative.choice import Greedy, RowSampling, Sampling


class Acceptance:
    """Processors, choice, criteria and streamer of one answer, called as if the full model decoded alone.

    scores, logits: one [1, V] tensor per answer token, if the generation config asks for them; else None.
    """

    def __init__(
        self,
        *,
        choose: Greedy | Sampling | RowSampling,
        process: Callable[..., Any],
        stop: Callable[..., Any],
        config: GenerationConfig,
        streamer: BaseStreamer | None = None,
    ):
        self.choose, self.process, self.stop, self.streamer = choose, process, stop, streamer
        returned = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if returned and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if returned and config.output_logits else None

    def __call__(self, ids: Tensor, drafted: Sequence[int], logits: Tensor) -> tuple[Tensor, list[int], bool]:
        """Append the accepted tokens and one token of the full model: (ids, these tokens, whether the answer ends).

        ids: prompt and answer, [1, S]. logits: of the full model, [len(drafted) + 1, V]. A drafted token is accepted if
        the full model chooses it, too.
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
