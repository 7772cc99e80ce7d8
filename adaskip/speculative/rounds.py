"""The decoding loop of one request: draft some tokens, verify them, keep the accepted ones and one more."""

from __future__ import annotations

import torch
from torch import Tensor

from adaskip.speculative.accepting import Acceptance
from adaskip.speculative.drafting import Drafting, FixedLength
from adaskip.speculative.forwards import ForwardRunner
from adaskip.speculative.ngrams import NGrams
from adaskip.speculative.statistics import DraftStatistics, counted


class Rounds:
    """Decodes one request in rounds of drafting and verification."""

    def __init__(
        self,
        *,
        forwards: ForwardRunner,
        drafting: Drafting | FixedLength,
        accept: Acceptance,
        max_length: int,
        statistics: DraftStatistics,
    ):
        self.forwards, self.drafting, self.accept = forwards, drafting, accept
        self.max_length, self.statistics = max_length, statistics

    def run(self, ids: Tensor) -> Tensor:
        """Decode until a stopping criterion is met. ids: the prompt, [1, S]. Returns prompt and answer, [1, S']."""
        ids, kept, finished = self.accept(ids, [], self.forwards.prefill(ids))
        self.drafting.begin(kept)
        clock = self.forwards.clock
        while not finished:
            start_s = clock()
            draft = self.drafting.next(self.max_length - ids.shape[1] - 1)
            drafted = draft.source.draft(ids, draft.most, draft.least_survival) if draft.source else []
            drafted_s = clock()
            ahead = torch.cat([ids, ids.new_tensor([drafted])], dim=-1) if drafted else ids
            logits = self.forwards.verify(ahead, len(drafted) + 1)
            ids, kept, finished = self.accept(ids, drafted, logits)
            self.forwards.forget_rejected(len(drafted) + 1 - len(kept))  # without any, sliding layers still shrink
            draft_s, verify_s = drafted_s - start_s, clock() - drafted_s
            self.drafting.add(draft, drafted, kept, draft_s, verify_s)
            self.statistics += counted([drafted], [kept], isinstance(draft.source, NGrams), draft_s, verify_s)
        if self.accept.streamer is not None:
            self.accept.streamer.end()
        return ids
