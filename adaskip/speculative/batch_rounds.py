"""The decoding loop of a batch: each row drafts from its own n-grams, one forward verifies all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaskip.speculative.accepting import Acceptance
from adaskip.speculative.batch_forwards import BatchForwards
from adaskip.speculative.drafting import Drafting
from adaskip.speculative.ngrams import NGrams
from adaskip.speculative.statistics import DraftStatistics, counted
from adaskip.speculative.step_costs import StepCosts


class Row:
    """One row of a batch. ids: its prompt with pads, and its answer, [1, S]."""

    def __init__(self, ids: Tensor, mask: Tensor, accept: Acceptance):
        self.ids, self.accept, self.finished = ids, accept, False
        self.ngrams = NGrams(ids[0, mask].tolist())

    def take(self, drafted: Sequence[int], logits: Tensor) -> list[int]:
        """Append what the full model accepts and return it. logits: [len(drafted) + 1, V]."""
        self.ids, kept, self.finished = self.accept(self.ids, drafted, logits)
        self.ngrams.add(kept, None)
        return kept


class RowsOfNGrams:
    """The n-grams of all rows as one source of drafts, since a forward has the same length for every row.

    The row with the fewest tokens decides how many are drafted: a batch takes as long as its slowest row, so what only
    the others gain is no gain.
    """

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def survival(self, most: int) -> list[float]:
        """Probabilities that the first 1, 2, ..., `most` tokens of the slowest row are all accepted."""
        unfinished = [row for row in self.rows if not row.finished]
        fewest = min(row.ids.shape[1] for row in unfinished)
        slowest = [row.ngrams.survival(most) for row in unfinished if row.ids.shape[1] == fewest]
        return min(slowest, key=sum)

    def draft_s(self, step_s: float) -> float:
        """Seconds of one drafted token."""
        return 0.0

    def draft(self, ids: Tensor, most: int, least_survival: float) -> list[int]:
        raise AssertionError("each row drafts for itself")

    def add(self, kept: Sequence[int], drafted: Sequence[int] | None) -> None:
        """Nothing: each row's n-grams learn its own tokens."""


class BatchRounds:
    """Decodes a batch in rounds of drafting and verification."""

    def __init__(
        self,
        *,
        forwards: BatchForwards,
        rows: Sequence[Row],
        costs: StepCosts,
        max_length: int,
        pad_token_id: int,
        statistics: DraftStatistics,
    ):
        self.forwards, self.rows, self.statistics = forwards, rows, statistics
        self.max_length, self.pad_token_id = max_length, pad_token_id
        self.drafting = Drafting([RowsOfNGrams(rows)], costs)

    def run(self, ids: Tensor) -> Tensor:
        """Decode until every row is finished. ids: the prompts, [B, S]. Returns prompts and answers, [B, S']."""
        for row, logits in zip(self.rows, self.forwards.prefill(ids).split(1), strict=True):
            row.take([], logits)
        while not all(row.finished for row in self.rows):
            self._round()
        longest = max(row.ids.shape[1] for row in self.rows)
        whole = ids.new_full((len(ids), longest), self.pad_token_id)
        for row, answered in zip(whole, self.rows, strict=True):
            row[: answered.ids.shape[1]] = answered.ids[0]
        return whole

    def _round(self) -> None:
        start_s = self.forwards.clock()
        rooms = [0 if row.finished else self.max_length - row.ids.shape[1] - 1 for row in self.rows]
        draft = self.drafting.next(max(rooms))
        drafts = [
            row.ngrams.draft(row.ids, min(draft.most, room), 0.0) for row, room in zip(self.rows, rooms, strict=True)
        ]
        fed = max(map(len, drafts)) + 1
        drafted_s = self.forwards.clock()
        logits = self.forwards.verify(self._tokens(drafts, fed))
        kept = [
            [] if row.finished else row.take(drafted, of[: len(drafted) + 1])
            for row, drafted, of in zip(self.rows, drafts, logits, strict=True)
        ]
        self.forwards.keep([len(tokens) for tokens in kept], fed)
        draft_s, verify_s = drafted_s - start_s, self.forwards.clock() - drafted_s
        self.drafting.add(draft, [0] * (fed - 1), [], draft_s, verify_s)
        self.statistics += counted(drafts, kept, True, draft_s, verify_s)

    def _tokens(self, drafts: Sequence[Sequence[int]], fed: int) -> Tensor:
        """The last token of every row and its draft, filled up, [B, fed]."""
        last = torch.cat([row.ids[:, -1:] for row in self.rows])
        filled = [[*drafted, *[self.pad_token_id] * (fed - 1 - len(drafted))] for drafted in drafts]
        return torch.cat([last, last.new_tensor(filled).reshape(len(last), fed - 1)], dim=-1)
