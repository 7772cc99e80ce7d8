"""How many tokens to draft, and what drafting earns: the arithmetic of speculative decoding.

A drafted token is accepted with probability a. A round drafts g tokens and verifies them in one forward of the full
model, which yields one token more than it accepts. Times are in units of one decode step of the full model; a drafted
token costs c: its draft forward and what it adds to the verification.
"""

from __future__ import annotations

from typing import Protocol

MAX_DRAFT = 8  # tokens
DECAY = 0.95  # of what earlier rounds said about the acceptance rate, per round
PRIOR_ACCEPTED = PRIOR_JUDGED = 2.0  # tokens; a request begins hopeful and finds out
PROBE_EVERY = 16  # rounds, while drafting does not pay


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Mean tokens of one round, (1 - a^(g+1)) / (1 - a). Paper: Leviathan et al. 2023, Eq. (1)."""
    return sum(acceptance**i for i in range(drafted + 1))


def expected_speedup(acceptance: float, drafted: int, draft_cost: float) -> float:
    """Mean tokens of a round over its time, 1 + g * c. Paper: Leviathan et al. 2023, Theorem 3.8."""
    return expected_tokens(acceptance, drafted) / (1.0 + drafted * draft_cost)


def best_draft_length(acceptance: float, draft_cost: float, most: int) -> int:
    """The g of 0..most with the greatest expected speedup, the smallest of equals."""
    return max(range(most + 1), key=lambda drafted: expected_speedup(acceptance, drafted, draft_cost))


def break_even_acceptance(draft_cost: float, drafted: int = 1) -> float | None:
    """The acceptance rate at which rounds of `drafted` tokens are as fast as the full model; None if none is enough.

    It solves a + a^2 + ... + a^g = g * c. For g = 1 that is a = c, and no g breaks even below it.
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
        """Tokens to draft in the coming round."""
        ...

    def add(self, accepted: int, judged: int) -> None:
        """What a round's verification said."""
        ...


class FixedDraftLength:
    """gamma tokens in every round."""

    def __init__(self, gamma: int):
        self.gamma = gamma

    def next(self) -> int:
        return self.gamma

    def add(self, accepted: int, judged: int) -> None: ...


class AdaptiveDraftLength:
    """The draft length of each round of one request, from the acceptance seen so far in it.

    The acceptance rate is the share of accepted tokens among those judged, earlier rounds counting less and less
    (`DECAY`); the length is the one of `best_draft_length` for it. Where drafting would lose time, the full model
    decodes alone, and one token is drafted every `PROBE_EVERY` rounds to see whether that has changed. No clock is
    asked, so that a seeded run repeats.
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
