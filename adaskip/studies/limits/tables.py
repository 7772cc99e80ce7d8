"""The tables of the roofline document, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from statistics import mean
from typing import Literal

from adaskip.common.pipe_table import pipe_table
from adaskip.core.plan import SublayerKind
from adaskip.roofline.ceilings import Ceilings
from adaskip.roofline.shape import ModelShape
from adaskip.roofline.work import Work, attention_work, ffn_work, head_work
from adaskip.strategies import FULL
from adaskip.studies.limits.comparison import ADASKIP, ATTENTION_ALONE, Device, Explained, Prediction, Way, Workload
from adaskip.studies.limits.crossover import STEPS, Crossover, Step, speedup_of_kind
from adaskip.studies.tables import labels

Shapes = Mapping[str, ModelShape]
"""By model."""
STRATEGIES = {**labels.STRATEGIES, ATTENTION_ALONE: "AdaSkip's budget, attention alone"}
CONTEXTS = (1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000)
EXPLANATIONS = {"fused": "ceilings", "eager": "eager attention", "launches": "launches"}
"""Fields of `Explained` and what their columns are called."""


def device_table(devices: Sequence[Device]) -> str:
    lines = []
    for device in devices:
        limits = device.ceilings
        rates = [f"{limits.matmul_flops / 1e12:.4g}", f"{limits.bandwidth / 1e9:.4g}"]
        lines.append([limits.name, *rates, str(device.bytes_per_value), limits.source])
    return pipe_table(["Device", "TFLOP/s", "GB/s", "Bytes a value", "Source"], lines)


def crossover_table(crossovers: Sequence[Crossover]) -> str:
    header = ["Model", *(f"{step}, {how}" for how in ("scores on the chip", "scores through memory") for step in STEPS)]
    by_model = groupby(crossovers, key=lambda crossover: crossover.model)
    return pipe_table(header, [[model, *(_tokens(c.context) for c in found)] for model, found in by_model])


def _tokens(context: int | None) -> str:
    return "never" if context is None else f"{context:,}"


def context_table(shapes: Shapes, device: Ceilings) -> str:
    """Speedup of one forward with a quarter of the sublayers skipped: `all attention / all FFN`."""
    kinds: tuple[SublayerKind, ...] = ("attention", "ffn")

    def cell(shape: ModelShape, step: Step, context: int) -> str:
        count = shape.num_layers // 2
        return " / ".join(labels.ratio(speedup_of_kind(shape, kind, step, context, device, count)) for kind in kinds)

    lines = [
        [model, step, *(cell(shape, step, context) for context in CONTEXTS)]
        for model, shape in shapes.items()
        for step in STEPS
    ]
    return pipe_table(["Model", "Step", *(f"{context // 1000}k" for context in CONTEXTS)], lines)


def paper_table(explained: Sequence[Explained]) -> str:
    def line(e: Explained) -> list[str]:
        predicted = (labels.ratio(getattr(e, name)) for name in EXPLANATIONS)
        way = e.way
        return [e.model, way.phase, str(way.sublayers), STRATEGIES[way.strategy], labels.ratio(e.paper), *predicted]

    header = ["Model", "Phase", "Skipped", "Strategy", "Paper", *EXPLANATIONS.values()]
    return pipe_table(header, map(line, explained))


def gap_table(explained: Sequence[Explained]) -> str:
    """Mean of predicted minus measured speedup, whole layers and AdaSkip apart."""
    groups: dict[tuple[str, str, str], list[Explained]] = {}
    for e in explained:
        if e.way.strategy != ATTENTION_ALONE:
            which = STRATEGIES[ADASKIP] if e.way.strategy == ADASKIP else "whole layers"
            groups.setdefault((e.model, e.way.phase, which), []).append(e)
    lines = [[*key, *map(_signed, gaps), _nearest(gaps)] for key, gaps in _gaps(groups).items()]
    return pipe_table(["Model", "Phase", "Skipping", *EXPLANATIONS.values(), "Nearest"], lines)


def _gaps(groups: Mapping[tuple[str, str, str], Sequence[Explained]]) -> dict[tuple[str, str, str], list[float | None]]:
    """By group, a mean gap for each of `EXPLANATIONS`."""
    return {
        key: [
            None if getattr(group[0], name) is None else mean(getattr(e, name) - e.paper for e in group)
            for name in EXPLANATIONS
        ]
        for key, group in groups.items()
    }


def _signed(gap: float | None) -> str:
    return labels.MISSING if gap is None else f"{gap:+.2f}"


def _nearest(gaps: Sequence[float | None]) -> str:
    """All that are nearest as printed."""
    sizes = {name: abs(round(gap, 2)) for name, gap in zip(EXPLANATIONS.values(), gaps, strict=True) if gap is not None}
    return " = ".join(name for name, size in sizes.items() if size == min(sizes.values()))


def times_table(predictions: Sequence[Prediction], quantity: Literal["ttft", "tpot"]) -> str:
    """One model's milliseconds and speedups in one phase: a line per strategy and budget, a column per device."""
    by_way = {(p.way, p.device): p for p in predictions}
    devices = list(dict.fromkeys(p.device for p in predictions))

    def cell(prediction: Prediction) -> str:
        value = f"{1000 * getattr(prediction, f'{quantity}_s'):.4g}"
        speedup = labels.ratio(getattr(prediction, f"{quantity}_speedup"))
        return value if prediction.way.strategy == FULL else f"{value} ({speedup})"

    def lines() -> Iterator[list[str]]:
        for way in dict.fromkeys(p.way for p in predictions):
            cells = (cell(by_way[way, device]) for device in devices)
            yield [str(way.sublayers), STRATEGIES[way.strategy], *cells]

    return pipe_table(["Skipped", "Strategy", *devices], lines())


def launch_table(predictions: Sequence[Prediction], operators: Mapping[str, Mapping[str, int]]) -> str:
    """Microseconds an operator of the full model's decode step may take until launches and not bytes decide."""
    full = {(p.model, p.device): p.tpot_s for p in predictions if p.way == Way("decode")}
    devices = list(dict.fromkeys(device for _, device in full))
    lines = [
        [model, str(counts["step"]), *(f"{1e6 * full[model, device] / counts['step']:.1f}" for device in devices)]
        for model, counts in operators.items()
    ]
    return pipe_table(["Model", "Operators a step", *devices], lines)


def work_of(shape: ModelShape, step: Step, work: Workload, bytes_per_value: int = 2) -> dict[str, Work]:
    """Operations and bytes of one attention and one FFN of the first layer, and of embeddings and head together."""
    tokens = work.prompt_tokens if step == "prefill" else 1
    context = work.prompt_tokens + (step == "decode")
    rows = work.batch_size
    return {
        "attention": attention_work(
            shape, tokens=tokens, context=context, batch_size=rows, bytes_per_value=bytes_per_value
        ),
        "FFN": ffn_work(shape, tokens=tokens, batch_size=rows, bytes_per_value=bytes_per_value),
        "embeddings and head": head_work(shape, tokens=tokens, batch_size=rows, bytes_per_value=bytes_per_value),
    }


def work_table(shapes: Shapes, work: Workload, devices: Sequence[Device]) -> str:
    def milliseconds(shape: ModelShape, step: Step, part: str, device: Device) -> str:
        return f"{1000 * work_of(shape, step, work, device.bytes_per_value)[part].seconds(device.ceilings):.3g}"

    lines = []
    for model, shape in shapes.items():
        for step in STEPS:
            for part, done in work_of(shape, step, work).items():
                amounts = f"{done.flops / 1e9:.4g}", f"{done.bytes / 1e6:.4g}", f"{done.flops / done.bytes:.3g}"
                times = (milliseconds(shape, step, part, device) for device in devices)
                lines.append([model, step, part, *amounts, *times])
    header = ["Model", "Step", "Part", "GFLOP", "MB", "FLOP/byte", *(f"{d.ceilings.name}, ms" for d in devices)]
    return pipe_table(header, lines)
