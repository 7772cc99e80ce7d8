"""Drafts of the skipped model, which stop when it is no longer sure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from adaskip.core.strategy import Strategy
from adaskip.speculative.acceptance import AcceptanceRate
from adaskip.speculative.choice import Greedy, Sampling
from adaskip.speculative.forwards import ForwardRunner

ASSUMED = 0.9
"""Acceptance rate at the start of a request."""
CONFIDENCE = (0.0, 0.4, 0.7, 0.9, 0.98)
"""Classes of the draft's own probability of a token, from this bound on; each has an acceptance rate."""
LATEST = 15


class SkippedModel:
    """A source of drafts."""

    def __init__(
        self,
        forwards: ForwardRunner,
        strategy: Strategy,
        process: Callable[..., Any],
        choose: Greedy | Sampling,
        ends: Sequence[int],
    ):
        self.forwards, self.strategy, self.process, self.choose, self.ends = forwards, strategy, process, choose, ends
        self.live = 1.0 - len(strategy.skipped) / (2 * strategy.num_layers)
        self.rate = AcceptanceRate(ASSUMED)
        self.rates = [AcceptanceRate(bound) for bound in (*CONFIDENCE[1:], 1.0)]
        self.classes: list[int] = []
        self.seconds: deque[float] = deque(maxlen=LATEST)

    def survival(self, most: int) -> list[float]:
        """Probabilities that the first 1, 2, ..., `most` tokens of the next draft are all accepted."""
        return [self.rate.value**i for i in range(1, most + 1)]

    def draft_s(self, step_s: float) -> float:
        """Seconds of one drafted token; before the first, the share of the sublayers that still run of a step."""
        return median(self.seconds) if self.seconds else self.live * step_s

    def draft(self, ids: Tensor, most: int, least_survival: float) -> list[int]:
        """Draft until there are `most` tokens, an end token is drafted, or the next token would be kept with a
        probability below `least_survival`. ids: [1, S]."""
        plan = self.strategy.decode_plan(ids.shape[1] - self.forwards.prompt_length)
        drafted, together, start_s = [], 1.0, self.forwards.clock()
        self.classes = []
        with self.choose.ahead():
            while len(drafted) < most and (not drafted or together * self.rate.value >= least_survival):
                # an overflow makes a bad draft, not an error
                scores: Tensor = self.process(ids, self.forwards.draft(ids, plan))
                scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).min)
                token = self.choose(scores)
                probability = float(scores.softmax(dim=-1)[0, token])
                self.classes.append(sum(probability >= bound for bound in CONFIDENCE) - 1)
                together *= self.rates[self.classes[-1]].value
                drafted.append(int(token))
                if drafted[-1] in self.ends:
                    break
                ids = torch.cat([ids, token[None]], dim=-1)
        self.forwards.forget_draft(plan, len(drafted))
        self.seconds.append((self.forwards.clock() - start_s) / len(drafted))
        return drafted

    def add(self, kept: Sequence[int], drafted: Sequence[int] | None) -> None:
        """kept: the new tokens of the answer. drafted: by this source in this round; None for none."""
        for i, (token, mine) in enumerate(zip(kept, drafted or (), strict=False)):
            self.rate.add(token == mine)
            self.rates[self.classes[i]].add(token == mine)
