"""Chooses a set by a target speedup: among the sets of a selection, the least divergent one that reaches it.

Speedups are predicted by the roofline model, which ignores the time of kernel launches. It is accurate if the sublayers
keep the device busy, and too high for small models, short prompts and small batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adaskip.core.plan import EMPTY_PLAN, Phase, SkipPlan
from adaskip.profiles.selection import SelectionProfile
from adaskip.roofline import Ceilings, ModelShape, known_ceilings, measure_ceilings, predict
from adaskip.roofline.work import AttentionImplementation


class UnreachableSpeedupError(ValueError):
    """No set of the selection is predicted to reach the target speedup."""


@dataclass(frozen=True)
class Request:
    """`count` requests with prompts of `prompt_tokens` and answers of `new_tokens` tokens."""

    prompt_tokens: int
    new_tokens: int
    count: int = 1


@dataclass(frozen=True)
class Predictor:
    """Predicts the minimum time of requests on a device.

    In phase "prefill" it counts TTFT, in "decode" the time of the tokens after the first, in "e2e" both.
    """

    shape: ModelShape
    phase: Phase
    requests: Sequence[Request]
    ceilings: Ceilings
    batch_size: int = 1
    bytes_per_value: int = 2
    attention: AttentionImplementation = "fused"

    def __post_init__(self) -> None:
        if self.phase == "decode" and all(request.new_tokens < 2 for request in self.requests):
            raise ValueError(
                "phase decode is timed over the tokens after the first, so answers need at least 2 tokens; all have 1"
            )

    @classmethod
    def on(
        cls,
        name: str | None,
        device: torch.device,
        dtype: torch.dtype,
        attn_implementation: str,
        *,
        shape: ModelShape,
        phase: Phase,
        requests: Sequence[Request],
        batch_size: int = 1,
    ) -> Predictor:
        """For a named device with 16-bit values as in its data sheet; without a name, for `device`, whose ceilings are
        measured, with values of `dtype`."""
        return cls(
            shape=shape,
            phase=phase,
            requests=requests,
            ceilings=measure_ceilings(device, dtype) if name is None else known_ceilings(name),
            batch_size=batch_size,
            bytes_per_value=dtype.itemsize if name is None else 2,
            attention="eager" if attn_implementation == "eager" else "fused",
        )

    def speedup(self, plan: SkipPlan) -> float:
        """Time of all requests with the full model divided by their time under `plan`."""
        return self._seconds(EMPTY_PLAN) / self._seconds(plan)

    def _seconds(self, plan: SkipPlan) -> float:
        return sum(request.count * self._request_seconds(plan, request) for request in self.requests)

    def _request_seconds(self, plan: SkipPlan, request: Request) -> float:
        times = predict(
            self.shape,
            prefill_plan=EMPTY_PLAN if self.phase == "decode" else plan,
            decode_plan=plan,
            prompt_tokens=request.prompt_tokens,
            new_tokens=1 if self.phase == "prefill" else request.new_tokens,
            batch_size=self.batch_size,
            ceilings=self.ceilings,
            bytes_per_value=self.bytes_per_value,
            attention=self.attention,
        )
        return phase_seconds(self.phase, times.ttft_s, times.tpot_s, request.new_tokens)


def phase_seconds(phase: Phase, ttft_s: float, tpot_s: float | None, new_tokens: int) -> float:
    """The part of a request's time that counts in a phase; `tpot_s` is None if there was only one token."""
    decode_s = (new_tokens - 1) * (tpot_s or 0.0)
    return {"prefill": ttft_s, "decode": decode_s, "e2e": ttft_s + decode_s}[phase]


def choose(profile: SelectionProfile, target: float, speedups: Mapping[int, float], where: str) -> int:
    """The number of sublayers of the least divergent set that reaches `target`; the smaller set in a tie.

    speedups: predicted, by number of sublayers. where: phase and device of the prediction, for the error message.

    Raises:
        UnreachableSpeedupError: no set reaches the target.
    """
    reaching = [count for count, speedup in speedups.items() if speedup >= target]
    if not reaching:
        raise UnreachableSpeedupError(
            f"--target-speedup {target:g} cannot be reached: the sets of this selection, of {min(profile.selected)} to "
            f"{profile.largest} sublayers, are predicted to reach {min(speedups.values()):.3f} to "
            f"{max(speedups.values()):.3f} {where}; "
            f"adaskip calibrate --select {profile.phase} --up-to N searches larger sets, which --profile takes"
        )
    return min(reaching, key=lambda count: (profile.selected[count].divergence, count))
