"""Chooses the source and the length of each draft by expected tokens per second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from adaskip.speculative.step_costs import MOST, StepCosts

VERSION = 2
"""Of the choices made here and in the sources; measurements with different ones are not continued."""
GAIN = 1.05
"""Expected tokens per second of a draft, as a multiple of a plain step's, from which it is made."""
FIRST_TRIAL = 4
"""Round in which a forward over two tokens is measured, if no draft has led to one."""
TRIAL_SHARE = 0.01
"""Tokens that trials of sources that do not seem to pay may cost, for each round, all together."""


class DraftSource(Protocol):
    """Where drafted tokens come from."""

    def survival(self, most: int) -> list[float]:
        """Probabilities that the first 1, 2, ..., `most` tokens of the next draft are all accepted; [] for no draft."""
        ...

    def draft_s(self, step_s: float) -> float:
        """Seconds of one drafted token. step_s: of a step of the full model."""
        ...

    def draft(self, ids: Tensor, most: int, least_survival: float) -> list[int]:
        """At most `most` tokens that may follow `ids` [1, S], fewer if the source has no confidence in more."""
        ...

    def add(self, kept: Sequence[int], drafted: Sequence[int] | None) -> None:
        """Learn from a round. kept: the new tokens of the answer. drafted: by this source; None for none."""
        ...


@dataclass(frozen=True)
class NextDraft:
    """How the next tokens are made. source: None for a step of the full model alone. most: drafted tokens.

    least_survival: probability of being kept from which one more drafted token is worth its time.
    """

    source: DraftSource | None = None
    most: int = 0
    least_survival: float = 0.0


NO_DRAFT = NextDraft()


def best_length(survival: Sequence[float], draft_s: float, curve: Sequence[float]) -> tuple[float, int]:
    """Expected tokens per second of the best draft, and its number of tokens; (0.0, 0) if `survival` is empty.

    survival: probabilities that the first 1, 2, ... tokens are all accepted. curve: seconds of a forward of the full
    model by its number of tokens.
    """
    rate, best = 0.0, 0
    for drafted, accepted in enumerate(accumulate(survival), start=1):
        each = (1.0 + accepted) / (drafted * draft_s + curve[drafted + 1])
        if each > rate:
            rate, best = each, drafted
    return rate, best


class Drafting:
    """The sources of one request, and the forwards that they pay for.

    Sources learn how often they are right, so a source that is wrong is not asked for long.
    """

    def __init__(self, sources: Sequence[DraftSource], costs: StepCosts):
        self.sources, self.costs, self.round = sources, costs, 0
        self.last_drafts = {id(source): 0 for source in sources}

    def begin(self, kept: Sequence[int]) -> None:
        """Learn the first token of the answer, which the prefill gives."""
        for source in self.sources:
            source.add(kept, None)

    def next(self, most: int) -> NextDraft:
        """The way with the most expected tokens per second. most: tokens that a draft may have."""
        self.round += 1
        if self.round == 1 or most < 1:
            return NO_DRAFT
        most, curve = min(most, MOST - 1), self.costs.curve()
        best_rate, best = GAIN / curve[1], NO_DRAFT
        for source in self.sources:
            rate, way = self._best(source, source.survival(most), curve)
            if rate > best_rate:
                best_rate, best = rate, way
        if best.source is not None and not best.source.draft_s(curve[1]):
            return best
        return self._trial(most, curve, best, best_rate) or best

    def _best(self, source: DraftSource, survival: list[float], curve: list[float]) -> tuple[float, NextDraft]:
        """The best length of a draft whose tokens survive so, and its tokens per second."""
        draft_s = source.draft_s(curve[1])
        rate, best = best_length(survival, draft_s, curve)
        if not best:
            return 0.0, NO_DRAFT
        added_s = best * draft_s + curve[best + 1] - curve[1]
        return rate, NextDraft(source, best, rate * added_s / best)

    def _trial(self, most: int, curve: list[float], best: NextDraft, best_rate: float) -> NextDraft | None:
        """One drafted token to learn from, of a source that would be better than `best` if all its tokens were
        accepted. best_rate: tokens per second from which a draft is better."""
        if best is NO_DRAFT and self.round == FIRST_TRIAL and not self.costs.measured:
            return next((NextDraft(source, 1) for source in self.sources if source.survival(1)), None)
        rate = 1.0 / curve[1] if best is NO_DRAFT else best_rate
        tried = [(source, draft_s) for source in self.sources if (draft_s := source.draft_s(curve[1])) > 0]
        for source, draft_s in tried:
            lost = (draft_s + curve[2]) * rate - 1.0
            due = (self.round - self.last_drafts[id(source)]) * TRIAL_SHARE >= lost * len(tried)
            if source is not best.source and due and self._best(source, [1.0] * most, curve)[0] > best_rate:
                return NextDraft(source, 1)
        return None

    def add(
        self, draft: NextDraft, drafted: Sequence[int], kept: Sequence[int], draft_s: float, verify_s: float
    ) -> None:
        """Learn from a round."""
        self.costs.add(len(drafted) + 1, verify_s)
        for source in self.sources:
            source.add(kept, drafted if source is draft.source else None)
        if drafted:
            self.last_drafts[id(draft.source)] = self.round


class FixedLength:
    """`gamma` tokens of one source in every round."""

    def __init__(self, source: DraftSource, gamma: int):
        self.source, self.gamma = source, gamma

    def begin(self, kept: Sequence[int]) -> None: ...

    def next(self, most: int) -> NextDraft:
        return NextDraft(self.source, min(self.gamma, most)) if most > 0 else NO_DRAFT

    def add(
        self, draft: NextDraft, drafted: Sequence[int], kept: Sequence[int], draft_s: float, verify_s: float
    ) -> None: ...
