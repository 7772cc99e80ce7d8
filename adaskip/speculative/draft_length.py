"""Draft lengths and expected speedups of speculative decoding.

A drafted token is accepted with probability a. A round drafts g tokens and verifies them in one forward of the full
model, which yields one token more than it accepts. Times are in decode steps of the full model; a drafted token costs
c, which is its draft forward plus the time it adds to the verification.
"""

from __future__ import annotations

from typing import Protocol

MAX_DRAFT = 8  # tokens
DECAY = 0.95  # weight, per round, of earlier rounds in the acceptance rate
PRIOR_ACCEPTED = PRIOR_JUDGED = 2.0  # tokens; a request starts with an acceptance rate of 1
PROBE_EVERY = 16  # rounds between single drafted tokens while drafting is not worthwhile


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Mean number of tokens per round, (1 - a^(g+1)) / (1 - a). Paper: Leviathan et al. 2023, Eq. (1)."""
    return sum(acceptance**i for i in range(drafted + 1))


def expected_speedup(acceptance: float, drafted: int, draft_cost: float) -> float:
    """Mean number of tokens per round divided by its time, 1 + g * c. Paper: Leviathan et al. 2023, Theorem 3.8."""
    return expected_tokens(acceptance, drafted) / (1.0 + drafted * draft_cost)


def best_draft_length(acceptance: float, draft_cost: float, most: int) -> int:
    """The g in 0..most with the largest expected speedup; the smallest one in a tie."""
    return max(range(most + 1), key=lambda drafted: expected_speedup(acceptance, drafted, draft_cost))


def break_even_acceptance(draft_cost: float, drafted: int = 1) -> float | None:
    """The acceptance rate at which rounds of `drafted` tokens are as fast as the full model; None if there is none.

    It solves a + a^2 + ... + a^g = g * c. For g = 1 this is a = c, and no larger g breaks even below it.
    """
    if draft_cost > 1.0:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if expected_speedup(middle, drafted, draft_cost) >= 1.0 else (middle, high)
    return high


class DraftLength(Protocol):
    """The draft lengths of one request."""

    def next(self) -> int:
        """Number of tokens to draft in the next round."""
        ...

    def add(self, accepted: int, judged: int) -> None:
        """Record the result of a verification."""
        ...


class FixedDraftLength:
    """gamma tokens in every round."""

    def __init__(self, gamma: int):
        self.gamma = gamma

    def next(self) -> int:
        return self.gamma

    def add(self, accepted: int, judged: int) -> None: ...


class AdaptiveDraftLength:
    """Chooses the draft length of each round from the acceptance rate of the request so far.

    The acceptance rate is the share of accepted tokens among the judged ones, with decaying weights for earlier rounds
    (`DECAY`); `best_draft_length` gives the length. If drafting would lose time, the full model decodes alone, and one
    token is drafted every `PROBE_EVERY` rounds to update the estimate. No time is measured, so seeded runs repeat.
    """

    def __init__(self, draft_cost: float, most: int = MAX_DRAFT):
        self.draft_cost, self.most = draft_cost, most
        self.accepted, self.judged = PRIOR_ACCEPTED, PRIOR_JUDGED
        self.rounds_alone = 0

    def next(self) -> int:
        length = best_draft_length(self.accepted / self.judged, self.draft_cost, self.most)
        if length:
            self.rounds_alone = 0
            return length
        self.rounds_alone += 1
        return 1 if self.rounds_alone % PROBE_EVERY == 0 else 0

    def add(self, accepted: int, judged: int) -> None:
        if judged:
            self.accepted = DECAY * self.accepted + accepted
            self.judged = DECAY * self.judged + judged
