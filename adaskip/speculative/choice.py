"""Drafts and accepts tokens, greedily or by speculative sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class DraftedToken:
    """token: its id. probabilities: the draft's distribution that it was sampled from, [V]; None if greedy."""

    token: int
    probabilities: Tensor | None


class Chooser(Protocol):
    """Chooses tokens from processed scores [1, V]."""

    def draft(self, scores: Tensor) -> DraftedToken: ...

    def verify(self, scores: Tensor, drafted: DraftedToken | None) -> Tensor:
        """The token of the full model, [1]; it is `drafted` if that is accepted."""
        ...


class Greedy:
    """The most likely token; a drafted token is accepted if it is that token."""

    def draft(self, scores: Tensor) -> DraftedToken:
        return DraftedToken(int(scores.argmax(dim=-1)), None)

    def verify(self, scores: Tensor, drafted: DraftedToken | None) -> Tensor:
        return scores.argmax(dim=-1)


class Sampling:
    """Speculative sampling: tokens are distributed as if the full model had sampled them.

    With p the full model's and q the draft's distribution, a drafted token x is accepted with probability
    min(1, p(x) / q(x)); otherwise a token is sampled from max(0, p - q), normalised.
    Paper: Leviathan et al. 2023, Algorithm 1; Chen et al. 2023, Algorithm 2.
    """

    def draft(self, scores: Tensor) -> DraftedToken:
        # an overflow makes a bad draft, not an error
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
        # if p and q are equal, rounding can still reject a token
        return torch.multinomial(residual if residual.any() else p, num_samples=1)
