"""Counts and times of drafting and verification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass
class DraftStatistics:
    """Counts and times of the rounds of one request, or summed over several; prefills are not included.

    The judged tokens of a draft are the accepted ones and the first rejected one. draft_s, verify_s: seconds until the
    tokens are known on the host, so the device has finished its work; on the CPU, CPU time of the thread.
    """

    requests: int = 0
    new_tokens: int = 0
    """Tokens from verifications; the first token of an answer comes from the prefill and is not counted."""
    draft_forwards: int = 0
    """Tokens drafted by the skipped model."""
    copied: int = 0
    """Tokens drafted from n-grams of prompt and answer."""
    verify_forwards: int = 0
    """Forwards of the full model after the prefill, including rounds without a draft."""
    accepted: int = 0
    judged: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted tokens / judged tokens; None before the first draft."""
        return self.accepted / self.judged if self.judged else None

    @property
    def tokens_per_verify(self) -> float | None:
        """New tokens per forward of the full model; None before the first."""
        return self.new_tokens / self.verify_forwards if self.verify_forwards else None

    def __iadd__(self, other: DraftStatistics) -> DraftStatistics:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self


def counted(
    drafted: Sequence[Sequence[int]], kept: Sequence[Sequence[int]], free: bool, draft_s: float, verify_s: float
) -> DraftStatistics:
    """One verification. drafted, kept: the drafted and the new tokens of each row. free: drafted from n-grams."""
    pairs = [zip(*row, strict=False) for row in zip(drafted, kept, strict=True)]
    judged = [mine == token for row in pairs for mine, token in row]
    copies = sum(map(len, drafted))
    return DraftStatistics(
        new_tokens=sum(map(len, kept)),
        draft_forwards=0 if free else copies,
        copied=copies if free else 0,
        verify_forwards=1,
        accepted=sum(judged),
        judged=len(judged),
        draft_s=draft_s,
        verify_s=verify_s,
    )
