"""What drafting and verifying took, and what it brought."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class DraftStatistics:
    """Counts and times of the rounds of one request, or summed over several; prefills are not in it.

    A token counts as judged up to and including the first one that was not accepted. draft_s, verify_s: seconds,
    taken when the tokens are known on the host, so a device has done its work.
    """

    requests: int = 0
    new_tokens: int = 0
    """Tokens of the verifications; the first token of an answer is the prefill's."""
    draft_forwards: int = 0
    verify_forwards: int = 0
    """Forwards of the full model after the prefill, rounds without a draft included."""
    accepted: int = 0
    judged: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted tokens / judged tokens, the estimate of a; None before the first draft."""
        return self.accepted / self.judged if self.judged else None

    @property
    def tokens_per_verify(self) -> float | None:
        """New tokens for each forward of the full model; None before the first."""
        return self.new_tokens / self.verify_forwards if self.verify_forwards else None

    def __iadd__(self, other: DraftStatistics) -> DraftStatistics:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self
