"""Predicted times and speedups of every strategy at every budget on every device, beside measured ones.

Records are dicts, as in the JSON file.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal, get_args

from adaskip.core.plan import EMPTY_PLAN, PHASES, Budget, Phase, SkipPlan, Sublayer, SublayerKind
from adaskip.profiles.assumed import ASSUMED_SCALE
from adaskip.profiles.importance import ImportanceProfile
from adaskip.roofline import Ceilings, ModelShape, forward_seconds, predict, sublayer_seconds
from adaskip.roofline.work import IMPLEMENTATIONS, AttentionImplementation
from adaskip.strategies import FULL, FixedPlan, Strategy, build
from adaskip.strategies.names import PAPER_STRATEGIES
from adaskip.studies.bench.results import NAMES, load_results
from adaskip.studies.bench.settings import Workload
from adaskip.studies.limits.launches import Launches
from adaskip.studies.tables.paper import load_paper

PAPER_DEVICE = "L20"
ADASKIP = "adaskip"
ATTENTION_ALONE = "attention_alone"
"""AdaSkip's budget spent on attention only, late layers first: an upper bound of what another set could change."""
SKIPPING = PAPER_STRATEGIES[1:]
"""The paper's own."""
Step = Literal["prefill", "decode"]
STEPS: tuple[Step, ...] = get_args(Step)
LONGEST = 2**22
"""Maximum context of the search for a crossover."""
Record = dict[str, Any]


@dataclass(frozen=True)
class Device:
    """Ceilings, and the bytes per value of their dtype."""

    ceilings: Ceilings
    bytes_per_value: int = 2


@dataclass(frozen=True)
class Way:
    """One way to run a model: `strategy` skips `sublayers` sublayers in `phase`."""

    phase: Phase
    strategy: str = FULL
    sublayers: int = 0

    def build(self, num_layers: int, profile: ImportanceProfile, new_tokens: int) -> Strategy | None:
        """The strategy, with `new_tokens` as the T_max of SkipDecode; None for the full model."""
        if self.strategy == ATTENTION_ALONE:
            late = range(num_layers - self.sublayers, num_layers)
            plan = SkipPlan.of_sublayers({Sublayer("attention", layer): ASSUMED_SCALE for layer in late})
            return FixedPlan(num_layers=num_layers, phase=self.phase, plan=plan)
        options = {"num_layers": num_layers, "profile": profile, "max_decode_steps": new_tokens}
        return build(self.strategy, phase=self.phase, budget=Budget(sublayers=self.sublayers), **options)


def ways(budgets: Sequence[int]) -> list[Way]:
    """The full model and every strategy of the paper at every budget, phase by phase."""
    skipping = [(strategy, count) for count in budgets for strategy in SKIPPING]
    return [Way(phase, *which) for phase in PHASES for which in [(FULL, 0), *skipping]]


def compare(
    model: str,
    shape: ModelShape,
    device: Device,
    work: Workload,
    asked: Sequence[Way],
    profile: ImportanceProfile,
    attention: AttentionImplementation = "fused",
) -> list[Record]:
    """TTFT and TPOT of ways at the ceilings of a device, and their speedups over the full model."""

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
    records = []
    for way in asked:
        ttft_s, tpot_s = times(way)
        about = {"model": model, "device": device.ceilings.name, "way": asdict(way)}
        speedups = {"ttft_speedup": full_ttft_s / ttft_s, "tpot_speedup": full_tpot_s / tpot_s}
        records.append({**about, "ttft_s": ttft_s, "tpot_s": tpot_s, **speedups})
    return records


def published_speedups(model: str) -> dict[Way, float]:
    """The paper's measured speedups ("actual SU") of a model; `ATTENTION_ALONE` has AdaSkip's number, too."""
    paper, published = load_paper(), {}
    for phase in PHASES:
        table = paper.tables[phase]
        for fraction in table.by_fraction:
            for strategy in (*SKIPPING, ATTENTION_ALONE):
                name = ADASKIP if strategy == ATTENTION_ALONE else strategy
                if (speedup := table.speedup(model, name, fraction)) is not None:
                    published[Way(phase, strategy, round(fraction * paper.num_sublayers))] = speedup
    return published


def explain(
    model: str, shape: ModelShape, device: Device, work: Workload, profile: ImportanceProfile, launches: Launches
) -> list[Record]:
    """Every speedup that the paper measured on a model, and predictions that each assume a single limit.

    fused, eager: the ceilings of the device, by the implementation of attention. launches: the number of dispatched
    operators; None for prefill, where operators are large.
    """
    published = published_speedups(model)
    fused, eager = (compare(model, shape, device, work, [*published], profile, how) for how in IMPLEMENTATIONS)
    records = []
    for (way, measured), *predicted in zip(published.items(), fused, eager, strict=True):
        speedup = "ttft_speedup" if way.phase == "prefill" else "tpot_speedup"
        by_ceilings = {how: record[speedup] for how, record in zip(IMPLEMENTATIONS, predicted, strict=True)}
        by_launches = None
        if way.phase != "prefill":
            strategy = way.build(shape.num_layers, profile, work.new_tokens)
            assert strategy is not None, "the paper's full model is what its speedups are over"
            steps = [launches.of(strategy.decode_plan(step)) for step in range(1, work.new_tokens)]
            by_launches = launches.of(EMPTY_PLAN) / mean(steps)
        about = {"model": model, "way": asdict(way), "paper": measured}
        records.append({**about, **by_ceilings, "launches": by_launches})
    return records


def seconds(
    shape: ModelShape,
    kind: SublayerKind,
    step: Step,
    context: int,
    ceilings: Ceilings,
    attention: AttentionImplementation = "fused",
) -> float:
    """Time of a sublayer of the first layer at batch size 1, over a prompt of `context` tokens or for its last
    token."""
    tokens = context if step == "prefill" else 1
    return sublayer_seconds(shape, kind, tokens=tokens, context=context, ceilings=ceilings, attention=attention)


def find_crossover(
    shape: ModelShape, step: Step, ceilings: Ceilings, attention: AttentionImplementation = "fused"
) -> int | None:
    """The smallest context at which attention takes as long as the FFN; None if it is beyond `LONGEST`."""

    def overtaken(context: int) -> bool:
        one, other = (seconds(shape, kind, step, context, ceilings, attention) for kind in ("attention", "ffn"))
        return one >= other

    context = 1 + bisect_left(range(1, LONGEST), True, key=overtaken)
    return context if context < LONGEST else None


def crossovers(model: str, shape: ModelShape, ceilings: Ceilings) -> list[Record]:
    """The context at which attention takes as long as the FFN, by phase and implementation of attention."""
    records = []
    for attention in IMPLEMENTATIONS:
        for step in STEPS:
            context = find_crossover(shape, step, ceilings, attention)
            about = {"model": model, "device": ceilings.name, "step": step, "attention": attention}
            records.append({**about, "context": context})
    return records


def speedup_of_kind(
    shape: ModelShape, kind: SublayerKind, step: Step, context: int, ceilings: Ceilings, count: int
) -> float:
    """Speedup of a forward at batch size 1 if the last `count` sublayers of one kind are skipped."""
    last, tokens = frozenset(range(shape.num_layers - count, shape.num_layers)), context if step == "prefill" else 1
    plan = SkipPlan(attention=last) if kind == "attention" else SkipPlan(ffn=last)
    full, skipped = (
        forward_seconds(shape, each, tokens=tokens, context=context, ceilings=ceilings) for each in (EMPTY_PLAN, plan)
    )
    return full / skipped


def read_measured(folder: Path) -> list[Record]:
    """Speedups over the full model in the same mode from the saved benchmarks in `folder`: measured, and predicted at
    the measured ceilings of the device.

    Benchmarks without measured ceilings are left out.
    """
    records, work = [], ("batch_size", "prompt_tokens", "new_tokens", "mode")
    for result in load_results(folder):
        entries = [
            e for e in result.entries if result.study == "strategies" and e["limit_ttft_s"] and e["limit_tpot_s"]
        ]
        full = {tuple(e[name] for name in work): e for e in entries if e["strategy"] == FULL}
        for entry in entries:
            beside = full.get(tuple(entry[name] for name in work))
            if entry["strategy"] == FULL or beside is None:
                continue
            record = {"device": result.device, "model": result.identity["model"]}
            record |= {name: entry[name] for name in ("prompt_tokens", "new_tokens", "batch_size", "strategy", "phase")}
            record |= {"sublayers": entry["budget"], "mode": entry["mode"]}
            for phase, time in NAMES.items():
                low, high = entry[f"speedup_{phase}_interval"]
                record[f"predicted_{phase}"] = beside[f"limit_{time}"] / entry[f"limit_{time}"]
                record[f"measured_{phase}"] = {"value": entry[f"speedup_{phase}"], "low": low, "high": high}
            records.append({**record, "result": result.name})
    return records
