"""Alternatives to the scale of Eq. (3) for compensating a skipped sublayer, fitted in closed form on prompts.

    compensate = fit_compensation(model, "affine", prompts)
    with skipping(model, compensate(plan)): ...

At inference each costs one element-wise operation and no matrix product. The fits minimise the squared error of the
sublayer's output `b`, given its input `a`, over all prompt tokens of the full model. They need only sums over tokens,
so activations are not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.common.choices import check_choice
from adaskip.core.blocks import execution_device, find_decoder
from adaskip.core.patching import patches_of
from adaskip.core.plan import Affine, Compensation, SkipPlan, Sublayer
from adaskip.core.wrappers import unwrapped


class StreamMoments:
    """Per-channel sums over tokens of a sublayer's input `a` and its change `b - a`, in float64 on their device."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sums: Tensor | None = None  # [4, D]: a, change, a * change, a * a

    def add(self, a: Tensor, change: Tensor) -> None:
        """a, change: [..., D], any floating dtype."""
        a, change = (x.reshape(-1, x.shape[-1]).double() for x in (a, change))
        sums = torch.stack([x.sum(dim=0) for x in (a, change, a * change, a * a)])
        self._sums = sums if self._sums is None else self._sums + sums
        self.tokens += len(a)

    def least_squares_scale(self) -> float:
        """The factor s that minimises the sum over tokens of |b - s a|^2."""
        _, _, product, square = self._means()
        return 1.0 + float(product.sum() / square.sum())

    def affine(self) -> Affine:
        """For each channel, the scale w and the shift c that minimise the sum of (b - w a - c)^2.

        A channel with constant input gets scale 1 and a shift.
        """
        a, change, product, square = self._means()
        variance, covariance = square - a * a, product - a * change
        slope = torch.where(variance > 0, covariance / variance, 0.0)
        return Affine(tuple((1.0 + slope).tolist()), tuple((change - slope * a).tolist()))

    def shift(self, scale: float) -> Affine:
        """The same `scale` for every channel, with fitted shifts: the limit of `affine` under a ridge to `scale`."""
        a, change, _, _ = self._means()
        return Affine((scale,) * len(a), tuple((change - (scale - 1.0) * a).tolist()))

    def _means(self) -> Tensor:
        if self._sums is None:
            raise ValueError("no tokens were added, so there is nothing to fit")
        return self._sums.cpu() / self.tokens


class _Probe:
    def __init__(self) -> None:
        self.moments: dict[Sublayer, StreamMoments] = {}

    def record(self, kind: str, layer: int, a: Tensor, b: Tensor, change: Tensor | None) -> None:
        if kind not in ("attention", "ffn"):
            return
        assert change is not None
        self.moments.setdefault(Sublayer(kind, layer), StreamMoments()).add(a, change)


@torch.no_grad()
def stream_moments(model: PreTrainedModel, prompts: Iterable[Tensor]) -> dict[Sublayer, StreamMoments]:
    """The moments of every sublayer of the full model over the tokens of `prompts` (token ids, each 1-D)."""
    model = unwrapped(model)
    patches, probe = patches_of(model), _Probe()
    with patches.install():
        patches.set_probe(probe)
        for prompt in prompts:
            find_decoder(model)(input_ids=prompt[None].to(execution_device(model)), use_cache=False)
    return probe.moments


def _shift(moments: StreamMoments, scale: Compensation) -> Affine:
    if isinstance(scale, Affine):
        raise ValueError("shifts are fitted to a plan whose scales are numbers; this one has a scale per channel")
    return moments.shift(scale)


NONE, SCALE, LEAST_SQUARES, AFFINE, SHIFT = "none", "scale", "least_squares", "affine", "shift"
COMPENSATIONS: Mapping[str, Callable[[StreamMoments, Compensation], Compensation]] = {
    NONE: lambda moments, scale: 1.0,
    SCALE: lambda moments, scale: scale,
    LEAST_SQUARES: lambda moments, scale: moments.least_squares_scale(),
    AFFINE: lambda moments, scale: moments.affine(),
    SHIFT: _shift,
}
"""By name, from the moments of a sublayer and the scale that a plan gives it: what replaces the sublayer."""


@dataclass(frozen=True)
class FittedCompensation:
    """Gives the sublayers of a plan a compensation of this kind. moments: those of every sublayer of the model."""

    kind: str
    moments: Mapping[Sublayer, StreamMoments]

    def __call__(self, plan: SkipPlan) -> SkipPlan:
        """The plan with the same sublayers and other scales."""
        fit = COMPENSATIONS[self.kind]
        return replace(plan, scales={s: fit(self.moments[s], plan.scale(s.kind, s.layer)) for s in plan.sublayers})


def fit_compensation(model: PreTrainedModel, kind: str, prompts: Iterable[Tensor]) -> FittedCompensation:
    """Fit what replaces each sublayer: one of `COMPENSATIONS`.

    scale: the plan's own. none: nothing. least_squares: one factor. affine: a factor and a shift per channel. shift:
    the plan's scale and a shift per channel.

    Args:
        prompts: token ids, each 1-D.

    Raises:
        ValueError: unknown kind, or no prompts.
    """
    check_choice("compensation", kind, COMPENSATIONS)
    if not (moments := stream_moments(model, prompts)):
        raise ValueError("a compensation is fitted on at least one prompt; there are none")
    return FittedCompensation(kind, moments)
