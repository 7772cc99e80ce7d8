"""Every strategy at every budget on every device: predicted times and speedups, beside those the paper measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from adaskip.core.plan import EMPTY_PLAN, PHASES, Budget, Phase, SkipPlan, Sublayer
from adaskip.profiles.assumed import ASSUMED_SCALE
from adaskip.profiles.importance import ImportanceProfile
from adaskip.roofline.ceilings import Ceilings
from adaskip.roofline.predict import predict
from adaskip.roofline.shape import ModelShape
from adaskip.roofline.work import AttentionImplementation
from adaskip.strategies import FULL, FixedPlan, Strategy, build
from adaskip.strategies.names import PAPER_STRATEGIES
from adaskip.studies.limits.launches import Launches
from adaskip.studies.tables.paper import load_paper

PAPER_DEVICE = "L20"
ADASKIP = "adaskip"
ATTENTION_ALONE = "attention_alone"
"""AdaSkip's budget spent on nothing but attention, late layers first: how far its set can move the numbers."""
SKIPPING = PAPER_STRATEGIES[1:]
"""The paper's own."""


@dataclass(frozen=True)
class Workload:
    """What is predicted: a batch of prompts of equal length, and at least two new tokens of each."""

    prompt_tokens: int
    new_tokens: int
    batch_size: int = 1


@dataclass(frozen=True)
class Device:
    """Ceilings, and the bytes of a value in the dtype they hold for."""

    ceilings: Ceilings
    bytes_per_value: int = 2


@dataclass(frozen=True)
class Way:
    """One way to run a model: skip `sublayers` of it as `strategy` does in `phase`."""

    phase: Phase
    strategy: str = FULL
    sublayers: int = 0

    def build(self, num_layers: int, profile: ImportanceProfile, new_tokens: int) -> Strategy | None:
        """The strategy itself, SkipDecode's with `new_tokens` as its T_max; None for the full model."""
        if self.strategy == ATTENTION_ALONE:
            late = range(num_layers - self.sublayers, num_layers)
            plan = SkipPlan.of_sublayers({Sublayer("attention", layer): ASSUMED_SCALE for layer in late})
            return FixedPlan(num_layers=num_layers, phase=self.phase, plan=plan)
        options = {"num_layers": num_layers, "profile": profile, "max_decode_steps": new_tokens}
        return build(self.strategy, phase=self.phase, budget=Budget(sublayers=self.sublayers), **options)


@dataclass(frozen=True)
class Prediction:
    """A way to run a model on a device, at its ceilings; speedups are over the full model on the same device."""

    model: str
    device: str
    way: Way
    ttft_s: float
    tpot_s: float
    ttft_speedup: float
    tpot_speedup: float

    @property
    def speedup(self) -> float:
        """Of what the phase is about: the prompt, or a generated token."""
        return self.ttft_speedup if self.way.phase == "prefill" else self.tpot_speedup


@dataclass(frozen=True)
class Explained:
    """A speedup the paper measured, and what it would be if one thing alone took time.

    fused, eager: at the device's ceilings, by how attention is computed. launches: if the number of dispatched
    operators decided; None for a prompt, whose operators are few for their size.
    """

    model: str
    way: Way
    paper: float
    fused: float
    eager: float
    launches: float | None


def ways(budgets: Sequence[int]) -> list[Way]:
    """The full model and every strategy of the paper at every budget, phase by phase."""
    return [
        Way(phase, *which) for phase in PHASES for which in [(FULL, 0), *((s, n) for n in budgets for s in SKIPPING)]
    ]


def compare(
    model: str,
    shape: ModelShape,
    device: Device,
    work: Workload,
    asked: Sequence[Way],
    profile: ImportanceProfile,
    attention: AttentionImplementation = "fused",
) -> list[Prediction]:
    """What is predicted of one model on one device for the ways asked for."""

    def times(way: Way) -> tuple[float, float]:
        strategy = way.build(shape.num_layers, profile, work.new_tokens)
        predicted = predict(
            shape,
            prefill_plan=EMPTY_PLAN if strategy is None else strategy.prefill_plan,
            decode_plan=EMPTY_PLAN if strategy is None else strategy.decode_plan,
            **vars(work),
            ceilings=device.ceilings,
            bytes_per_value=device.bytes_per_value,
            attention=attention,
        )
        assert predicted.tpot_s is not None, "a workload has at least two new tokens"
        return predicted.ttft_s, predicted.tpot_s

    full_ttft_s, full_tpot_s = times(Way("e2e"))
    return [
        Prediction(model, device.ceilings.name, way, ttft_s, tpot_s, full_ttft_s / ttft_s, full_tpot_s / tpot_s)
        for way in asked
        for ttft_s, tpot_s in [times(way)]
    ]


def published_speedups(model: str) -> dict[Way, float]:
    """What the paper measured ("actual SU") of this model; AdaSkip's number stands for `ATTENTION_ALONE`, too."""
    paper, published = load_paper(), {}
    for phase in PHASES:
        table = paper.tables[phase]
        for fraction in table.by_fraction:
            sublayers = round(fraction * paper.num_sublayers)
            for strategy in (*SKIPPING, ATTENTION_ALONE):
                name = ADASKIP if strategy == ATTENTION_ALONE else strategy
                if (speedup := table.speedup(model, name, fraction)) is not None:
                    published[Way(phase, strategy, sublayers)] = speedup
    return published


def explain(
    model: str, shape: ModelShape, device: Device, work: Workload, profile: ImportanceProfile, launches: Launches
) -> list[Explained]:
    """Every speedup the paper measured on this model, beside the predictions for `device`."""
    published = published_speedups(model)
    asked = list(published)
    fused = compare(model, shape, device, work, asked, profile, "fused")
    eager = compare(model, shape, device, work, asked, profile, "eager")
    decode = [None if way.phase == "prefill" else _launch_speedup(launches, way, work, profile) for way in asked]
    return [
        Explained(model, way, published[way], at_ceilings.speedup, with_eager.speedup, by_launches)
        for way, at_ceilings, with_eager, by_launches in zip(asked, fused, eager, decode, strict=True)
    ]


def _launch_speedup(launches: Launches, way: Way, work: Workload, profile: ImportanceProfile) -> float:
    """The full model's operators over those of `way`, by the mean over its decode steps."""
    strategy = way.build(launches.num_layers, profile, work.new_tokens)
    assert strategy is not None, "the paper's full model is what its speedups are over"
    return launches.of(EMPTY_PLAN) / mean(launches.of(strategy.decode_plan(step)) for step in range(1, work.new_tokens))
