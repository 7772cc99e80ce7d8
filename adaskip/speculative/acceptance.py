"""How often drafted tokens are accepted, learned while decoding."""

from __future__ import annotations

DECAY = 0.95
"""Weight of earlier tokens, for each later one."""
PRIOR_WEIGHT = 2.0
"""Tokens that the assumed rate at the start of a request counts for."""


class AcceptanceRate:
    """Share of accepted tokens among the judged ones, with decaying weights."""

    def __init__(self, assumed: float):
        self.accepted, self.judged = PRIOR_WEIGHT * assumed, PRIOR_WEIGHT

    def add(self, accepted: bool) -> None:
        self.accepted = DECAY * self.accepted + accepted
        self.judged = DECAY * self.judged + 1.0

    @property
    def value(self) -> float:
        return self.accepted / self.judged
