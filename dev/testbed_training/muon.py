"""Muon for many small matrices: the orthogonalisation runs once per shape, batched, instead of once per matrix.

`torch.optim.Muon` loops over parameters, which for 112 matrices of 128 x 128 costs as much as a forward pass on a CPU.
The update rule is the same (Keller Jordan's Newton-Schulz coefficients, step scaled to match AdamW's RMS).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Map each matrix of `[N, rows, columns]` to approximately its nearest (semi-)orthogonal one, in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(torch.bfloat16)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix; one parameter group per matrix shape."""

    def __init__(self, matrices: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        super().__init__([{"params": group} for group in by_shape.values()], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every matrix."""
        assert closure is None, "no closure is supported"
        for group in self.param_groups:
            matrices, momentum = group["params"], group["momentum"]
            nesterov = torch.stack([self._nesterov(matrix, momentum) for matrix in matrices])
            size = group["lr"] * 0.2 * max(matrices[0].shape) ** 0.5
            for matrix, update in zip(matrices, orthogonalize(nesterov), strict=True):
                matrix.add_(update, alpha=-size)

    def _nesterov(self, matrix: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        average = state["momentum"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(average, momentum)
