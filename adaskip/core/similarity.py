"""IO similarity and norm ratio per token: cos(a, b) and |b| / |a|. Paper: Eq. (1) and (3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS_PER_CHUNK = 128  # float32 copies of this many rows fit into the L2 cache of a CPU


def norm(x: Tensor) -> Tensor:
    """|x| per token in float32, without a float32 copy of x. x: [..., D], any floating dtype."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).float()


class RecentNorms:
    """`norm` with a cache for the last three tensors, so that each tensor of the residual stream is read only once.

    The input of a sublayer is the output of the previous one, and a layer's input and output are those of its
    sublayers.
    """

    def __init__(self) -> None:
        self.known: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        for tensor, known in self.known:
            if tensor is x:
                return known
        self.known = [*self.known[-2:], (x, norm(x))]
        return self.known[-1][1]

    def forget(self) -> None:
        """Drop the references to the tensors."""
        self.known = []


def cosine_and_ratio(
    a: Tensor, b: Tensor, change: Tensor | None = None, norm_of: Callable[[Tensor], Tensor] = norm
) -> tuple[Tensor, Tensor]:
    """Per-token cos(a, b) and |b| / |a| in float32, without a host synchronisation.

    a, b: [..., D], any floating dtype. change: b - a as the sublayer computed it, if available. CUDA then needs only
    three norms and no float32 copies, since <a, b> = (|a|^2 + |b|^2 - |b - a|^2) / 2. norm_of: `norm` or a
    `RecentNorms`. Returns two tensors [...].
    A token whose input or output is all zeros gets similarity 0 and ratio 0, as neither is defined.
    Paper: Eq. (1), and the summand of Eq. (3).
    """
    norm_a, norm_b = norm_of(a), norm_of(b)
    if a.is_cuda:
        norm_change = norm(b - a if change is None else change)
        dot = (norm_a.square() + norm_b.square() - norm_change.square()) / 2
    else:
        dot = _chunked_dot(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])).reshape(a.shape[:-1])
    defined = (norm_a > 0) & (norm_b > 0)
    cosine = torch.where(defined, dot / (norm_a * norm_b), 0.0).clamp_(-1.0, 1.0)
    return cosine, torch.where(defined, norm_b / norm_a, 0.0)


def _chunked_dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise <a, b> of two [T, D] tensors, in float32."""
    chunks = zip(a.split(ROWS_PER_CHUNK), b.split(ROWS_PER_CHUNK), strict=True)
    return torch.cat([torch.linalg.vecdot(rows_a.float(), rows_b.float()) for rows_a, rows_b in chunks])
