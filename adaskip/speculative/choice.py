"""How a token is drafted and how it is accepted: greedily, or by speculative sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class DraftedToken:
    """token: its id. probabilities: the draft's distribution, [V], that it was drawn from; None when greedy."""

    token: int
    probabilities: Tensor | None


class Chooser(Protocol):
    """Draws tokens from processed scores [1, V]."""

    def draft(self, scores: Tensor) -> DraftedToken: ...

    def verify(self, scores: Tensor, drafted: DraftedToken | None) -> Tensor:
        """The token, [1], of the full model: `drafted` if it is accepted."""
        ...


class Greedy:
    """The likeliest token; a drafted one is accepted if it is that."""

    def draft(self, scores: Tensor) -> DraftedToken:
        return DraftedToken(int(scores.argmax(dim=-1)), None)

    def verify(self, scores: Tensor, drafted: DraftedToken | None) -> Tensor:
        return scores.argmax(dim=-1)


class Sampling:
    """Speculative sampling: tokens are distributed as if the full model had drawn them.

    A drafted token x is accepted with probability min(1, p(x) / q(x)), p the full model's and q the draft's
    distribution; otherwise a token is drawn from max(0, p - q), normalised.
    Paper: Leviathan et al. 2023, Algorithm 1; Chen et al. 2023, Algorithm 2.
    """

    def draft(self, scores: Tensor) -> DraftedToken:
        # a draft that overflowed is a bad one, not an error
        probabilities = scores.nan_to_num(nan=torch.finfo(scores.dtype).min).softmax(dim=-1)[0]
        return DraftedToken(int(torch.multinomial(probabilities, num_samples=1)), probabilities)

    def verify(self, scores: Tensor, drafted: DraftedToken | None) -> Tensor:
        p = scores.softmax(dim=-1)[0]
        if drafted is None:
            return torch.multinomial(p, num_samples=1)
        q = drafted.probabilities
        assert q is not None
        if torch.rand((), device=p.device) * q[drafted.token] < p[drafted.token]:
            return torch.tensor([drafted.token], device=p.device)
        residual = (p - q).clamp(min=0)
        # rounding alone can reject a token where p and q are the same
        return torch.multinomial(residual if residual.any() else p, num_samples=1)
