"""Drafts without a forward: what followed the last tokens where they occurred before, in prompt or answer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adaskip.speculative.acceptance import AcceptanceRate

ASSUMED = {16: 0.98, 8: 0.85, 4: 0.7, 3: 0.6, 2: 0.4, 1: 0.25, 0: 0.02}
"""Acceptance rate by the number of last tokens that occurred before, at the start of a request. 0: none did, and the
last token is repeated, which pays only where a forward over two tokens is faster than one over one token."""
LENGTHS = tuple(ASSUMED)


class NGrams:
    """A source of drafts.

    Every kept token is compared with the one that would have been drafted, so the acceptance rates are learned even
    while nothing is drafted.
    """

    def __init__(self, prompt: Sequence[int]):
        self.tokens: list[int] = []
        self.rates = {length: AcceptanceRate(assumed) for length, assumed in ASSUMED.items()}
        self.next_of: dict[tuple[int, ...], int] = {}
        for token in prompt:
            self._append(token)

    def _append(self, token: int) -> None:
        for length in LENGTHS[:-1]:
            if len(self.tokens) >= length:
                self.next_of[tuple(self.tokens[-length:])] = len(self.tokens)
        self.tokens.append(token)

    def _match(self) -> tuple[int, int]:
        """How many of the last tokens occurred before, of `LENGTHS`, and the position after their last occurrence."""
        for length in LENGTHS[:-1]:
            position = self.next_of.get(tuple(self.tokens[-length:]))
            if position is not None:
                return length, position
        return 0, len(self.tokens) - 1

    def survival(self, most: int) -> list[float]:
        """Probabilities that the first 1, 2, ..., `most` tokens of the next draft are all accepted."""
        if not self.tokens:
            return []
        matched, together, survival = self._match()[0], 1.0, []
        for i in range(most):
            length = next(length for length in LENGTHS if length <= matched + i)
            together *= self.rates[length].value
            survival.append(together)
        return survival

    def draft_s(self, step_s: float) -> float:
        """Seconds of one drafted token."""
        return 0.0

    def draft(self, ids: Tensor, most: int, least_survival: float) -> list[int]:
        """The next `most` tokens; a copy that reaches the last token goes on with what it copied."""
        copied, position = list(self.tokens), self._match()[1]
        for i in range(most):
            copied.append(copied[position + i])
        return copied[len(self.tokens) :]

    def add(self, kept: Sequence[int], drafted: Sequence[int] | None) -> None:
        """kept: the new tokens of the answer. drafted: by this source in this round; None for none."""
        for token in kept:
            if self.tokens:
                length, position = self._match()
                self.rates[length].add(self.tokens[position] == token)
            self._append(token)
