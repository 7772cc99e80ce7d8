"""The predictions as a document with a figure, and a comparison with the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from adaskip.common.pipe_table import pipe_table
from adaskip.core.plan import SublayerKind
from adaskip.roofline import Ceilings, ModelShape, Work, attention_work, ffn_work, head_work
from adaskip.roofline.work import AttentionImplementation
from adaskip.strategies import FULL
from adaskip.studies.bench.results import NAMES
from adaskip.studies.bench.settings import Workload
from adaskip.studies.limits.predictions import (
    ADASKIP,
    ATTENTION_ALONE,
    PAPER_DEVICE,
    STEPS,
    Device,
    Record,
    Step,
    find_crossover,
    seconds,
    speedup_of_kind,
)
from adaskip.studies.plots.style import BLUE, ORANGE, SKY, Look, save, styled
from adaskip.studies.tables import labels

Shapes = Mapping[str, ModelShape]
"""By model."""
STRATEGIES = {**labels.STRATEGIES, ATTENTION_ALONE: "AdaSkip's budget, attention alone"}
CONTEXTS = (1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000)
KINDS: tuple[SublayerKind, ...] = ("attention", "ffn")
EXPLANATIONS = {"fused": "ceilings", "eager": "eager attention", "launches": "launches"}
"""The limits assumed one at a time, and the names of their columns."""

DRAWN = tuple(500 * 2**power for power in range(9))
"""500 to 128k positions."""
LINES: dict[tuple[SublayerKind, AttentionImplementation], tuple[str, Look]] = {
    ("ffn", "fused"): ("FFN", Look(ORANGE, "s", ())),
    ("attention", "fused"): ("attention (scores stay on the chip)", Look(BLUE, "o", ())),
    ("attention", "eager"): ("attention (scores through memory)", Look(SKY, "^", (4, 1.5))),
}

METHOD = (
    "The least times at which a device can run a model: a sublayer's operations over the device's rate of "
    "matrix multiplication or its bytes over the memory bandwidth, whichever takes longer, one sublayer after "
    "the other, and nothing else. Real runs take longer."
)
WHO_WINS = (
    "Below that, FFN skipping wins. While a long prompt is read, both are bound by arithmetic, and attention's "
    "grows with the square of the prompt. While one row is decoded, both are bound by memory: an FFN reads its "
    "weights, an attention its smaller weights and the K/V of the whole context, of which grouped heads keep "
    "little. An attention that sends its scores through memory overtakes far earlier in prefill."
)
PAPERS = (
    "The lengths behind the paper's speedups are not known here; predictions are for those above. Each column "
    "lets one thing alone take time. *ceilings*: the device's, with an attention that keeps its scores on the "
    "chip (SDPA, FlashAttention). *eager attention*: the same, but the scores go through memory, as in "
    "transformers' plain implementation. *launches*: every operator that stock transformers dispatches in a "
    "decode step takes the same time, as where Python and kernel launches are the limit; counted, not timed."
)
GAPS = (
    "Mean of predicted minus measured speedup. Whole layers take their share of the time whatever limits it, "
    "so there the columns agree, and what the paper falls short of is time that skipping does not save."
)
NOTHING_MEASURED = "Nothing is measured yet: `adaskip bench` times the strategies on a device and its ceilings."
MEASURED = (
    "Speedups over the full model in the same mode. Predicted: at the ceilings measured on the device itself, "
    "with the sets and lengths of the measurement. Measured: medians over the rounds with 95 % intervals, from "
    "`adaskip bench`. *Phase* is what skips; in phase prefill one set serves prompt and answer."
)
LAUNCHES = (
    "The time an operator of the full model's decode step may take, microseconds. Where Python and the driver "
    "take longer to launch one, launches are the limit and not bytes: decoding goes at the host's pace, and "
    "CUDA graphs or larger batches bring it nearer to the device's limit."
)


@dataclass(frozen=True)
class Roofline:
    """All predictions and comparisons.

    skip_set: the origin of AdaSkip's sets. predictions, explained, crossovers, measured: records (`predictions`).
    operators: by model, those of a decode step (`Launches.by_kind`).
    """

    work: Workload
    devices: Sequence[Device]
    shapes: Shapes
    skip_set: str
    predictions: Sequence[Record]
    explained: Sequence[Record]
    crossovers: Sequence[Record]
    operators: Mapping[str, Mapping[str, int]]
    measured: Sequence[Record]

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {
            "workload": asdict(self.work),
            "devices": [asdict(device) for device in self.devices],
            "adaskip_set": self.skip_set,
            "work": [
                {"model": model, "step": step, "part": part, **asdict(work)}
                for model, shape in self.shapes.items()
                for step in STEPS
                for part, work in work_of(shape, step, self.work).items()
            ],
            "crossovers": self.crossovers,
            "operators": self.operators,
            "predictions": self.predictions,
            "paper": self.explained,
            "measured": self.measured,
        }

    def to_markdown(self, figure: str) -> str:
        """The document. figure: the picture's file name."""
        work, device = self.work, self.devices[0].ceilings
        counts = "; ".join(
            f"{model} {count['step']}, of which each attention {count['attention']} and each FFN {count['ffn']}"
            for model, count in self.operators.items()
        )
        parts = [
            "# Roofline: what the hardware allows",
            f"{METHOD}\n\n{work.batch_size} x {work.prompt_tokens} prompt tokens, {work.new_tokens} new tokens. "
            f"AdaSkip's sets: {self.skip_set}. SkipDecode reaches its full depth at the last new token.",
            device_table(self.devices),
            "## When attention skipping wins, and when FFN skipping does",
            f"![What one sublayer takes at least, by context length]({figure})",
            "Skipping an attention saves more than skipping an FFN from that context on at which it takes as long "
            f"(rings in the figure; {device.name}, batch 1), in tokens:",
            crossover_table(self.crossovers),
            WHO_WINS,
            f"Speedup of one forward on {device.name} with a quarter of the sublayers skipped, all of them attention / "
            "all FFN, by context:",
            context_table(self.shapes, device),
        ]
        if self.explained:
            parts += [f"## Beside what the paper measured on one {PAPER_DEVICE}", PAPERS]
            parts += [f"Operators of a decode step: {counts}; of any context alike.", paper_table(self.explained)]
            parts += [GAPS, gap_table(self.explained), *_unexplained(self.explained)]
        parts += ["## Beside what the benchmark measured"]
        parts += [MEASURED, measured_table(self.measured)] if self.measured else [NOTHING_MEASURED]
        for phase, time, skips in (("prefill", "TTFT", "The prompt skips"), ("decode", "TPOT", "Decoding skips")):
            parts += [f"## {time}: milliseconds, and speedup over the full model", f"{skips} (phase {phase})."]
            for model in self.shapes:
                found = [p for p in self.predictions if (p["model"], p["way"]["phase"]) == (model, phase)]
                parts.append(f"### {model}\n\n{times_table(found, time.lower())}")
        parts += ["## Launches or bytes", LAUNCHES, launch_table(self.predictions, self.operators)]
        parts += ["## Operations and bytes of one sublayer", work_table(self.shapes, self.work, self.devices)]
        return "\n\n".join(parts) + "\n"


def device_table(devices: Sequence[Device]) -> str:
    lines = []
    for device in devices:
        limits = device.ceilings
        rates = [f"{limits.matmul_flops / 1e12:.4g}", f"{limits.bandwidth / 1e9:.4g}"]
        lines.append([limits.name, *rates, str(device.bytes_per_value), limits.source])
    return pipe_table(["Device", "TFLOP/s", "GB/s", "Bytes a value", "Source"], lines)


def crossover_table(crossovers: Sequence[Record]) -> str:
    header = ["Model", *(f"{step}, {how}" for how in ("scores on the chip", "scores through memory") for step in STEPS)]
    lines: dict[str, list[str]] = {}
    for found in crossovers:
        context = "never" if found["context"] is None else f"{found['context']:,}"
        lines.setdefault(found["model"], [found["model"]]).append(context)
    return pipe_table(header, [*lines.values()])


def context_table(shapes: Shapes, device: Ceilings) -> str:
    """Speedup of one forward with a quarter of the sublayers skipped: `all attention / all FFN`."""
    lines = []
    for model, shape in shapes.items():
        for step in STEPS:
            line = [model, step]
            for context in CONTEXTS:
                both = (speedup_of_kind(shape, k, step, context, device, shape.num_layers // 2) for k in KINDS)
                line.append(" / ".join(map(labels.ratio, both)))
            lines.append(line)
    return pipe_table(["Model", "Step", *(f"{context // 1000}k" for context in CONTEXTS)], lines)


def paper_table(explained: Sequence[Record]) -> str:
    lines = []
    for e in explained:
        way, numbers = e["way"], (labels.ratio(e[name]) for name in ("paper", *EXPLANATIONS))
        lines.append([e["model"], way["phase"], str(way["sublayers"]), STRATEGIES[way["strategy"]], *numbers])
    return pipe_table(["Model", "Phase", "Skipped", "Strategy", "Paper", *EXPLANATIONS.values()], lines)


def gap_table(explained: Sequence[Record]) -> str:
    """Mean of predicted minus measured speedup, for whole layers and AdaSkip; nearest: the smallest as printed."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for e in explained:
        if (strategy := e["way"]["strategy"]) != ATTENTION_ALONE:
            which = STRATEGIES[ADASKIP] if strategy == ADASKIP else "whole layers"
            groups.setdefault((e["model"], e["way"]["phase"], which), []).append(e)
    lines = []
    for key, group in groups.items():
        told = {name: column for name, column in EXPLANATIONS.items() if group[0][name] is not None}
        gaps = {column: mean(e[name] - e["paper"] for e in group) for name, column in told.items()}
        sizes = {column: abs(round(gap, 2)) for column, gap in gaps.items()}
        nearest = " = ".join(column for column, size in sizes.items() if size == min(sizes.values()))
        shown = (f"{gaps[column]:+.2f}" if column in gaps else labels.MISSING for column in EXPLANATIONS.values())
        lines.append([*key, *shown, nearest])
    return pipe_table(["Model", "Phase", "Skipping", *EXPLANATIONS.values(), "Nearest"], lines)


def _unexplained(explained: Sequence[Record]) -> list[str]:
    """Speedups above every prediction, even if only attention is skipped."""
    cases = []
    for e in explained:
        way, highest = e["way"], max(value for name in EXPLANATIONS if (value := e[name]) is not None)
        if way["strategy"] == ATTENTION_ALONE and e["paper"] > highest:
            where = f"{e['model']}, {way['phase']}, {way['sublayers']} sublayers"
            cases.append(f"{where}: {e['paper']:.2f} > {highest:.2f}")
    if not cases:
        return []
    return [
        f"Above every column, even if AdaSkip had skipped nothing but attention, are: {'; '.join(cases)}. There "
        "attention cost more than is counted here, or more was skipped."
    ]


def measured_table(measured: Sequence[Record]) -> str:
    """A line per way to run a model; speedups with 95 % intervals over the rounds."""
    lines = []
    for m in measured:
        strategy = labels.STRATEGIES.get(m["strategy"], m["strategy"])
        line = [m["device"], m["model"], f"{m['batch_size']} x {m['prompt_tokens']} + {m['new_tokens']}"]
        line += [strategy, m["phase"], str(m["sublayers"]), m["mode"]]
        for phase in NAMES:
            timed = m[f"measured_{phase}"]
            between = "" if timed["low"] is None else f" [{timed['low']:.2f}, {timed['high']:.2f}]"
            line += [labels.ratio(m[f"predicted_{phase}"]), f"{labels.ratio(timed['value'])}{between}"]
        lines.append([*line, m["result"]])
    header = ["Device", "Model", "Batch x prompt + new", "Strategy", "Phase", "Skipped", "Mode"]
    header += ["Prefill, predicted", "measured", "Decode, predicted", "measured", "Result"]
    return pipe_table(header, lines)


def times_table(predictions: Sequence[Record], time: str) -> str:
    """One model's milliseconds and speedups in one phase: a line per strategy and budget, a column per device.

    time: ttft or tpot.
    """
    lines: dict[tuple[int, str], list[str]] = {}
    for p in predictions:
        strategy, sublayers = p["way"]["strategy"], p["way"]["sublayers"]
        value, speedup = f"{1000 * p[f'{time}_s']:.4g}", labels.ratio(p[f"{time}_speedup"])
        line = lines.setdefault((sublayers, strategy), [str(sublayers), STRATEGIES[strategy]])
        line.append(value if strategy == FULL else f"{value} ({speedup})")
    return pipe_table(["Skipped", "Strategy", *dict.fromkeys(p["device"] for p in predictions)], [*lines.values()])


def launch_table(predictions: Sequence[Record], operators: Mapping[str, Mapping[str, int]]) -> str:
    """Microseconds per operator of the full model's decode step above which launches, not bytes, are the limit."""
    full = {"phase": "decode", "strategy": FULL, "sublayers": 0}
    lines = {model: [model, str(counts["step"])] for model, counts in operators.items()}
    devices = dict.fromkeys(p["device"] for p in predictions)
    for p in predictions:
        if p["way"] == full:
            lines[p["model"]].append(f"{1e6 * p['tpot_s'] / operators[p['model']]['step']:.1f}")
    return pipe_table(["Model", "Operators a step", *devices], [*lines.values()])


def work_of(shape: ModelShape, step: Step, work: Workload, bytes_per_value: int = 2) -> dict[str, Work]:
    """Operations and bytes of one attention and one FFN of the first layer, and of embeddings and head together."""
    tokens = work.prompt_tokens if step == "prefill" else 1
    sizes: Any = {"tokens": tokens, "batch_size": work.batch_size, "bytes_per_value": bytes_per_value}
    return {
        "attention": attention_work(shape, context=work.prompt_tokens + (step == "decode"), **sizes),
        "FFN": ffn_work(shape, **sizes),
        "embeddings and head": head_work(shape, **sizes),
    }


def work_table(shapes: Shapes, work: Workload, devices: Sequence[Device]) -> str:
    lines = []
    for model, shape in shapes.items():
        for step in STEPS:
            for part, done in work_of(shape, step, work).items():
                times = [work_of(shape, step, work, d.bytes_per_value)[part].seconds(d.ceilings) for d in devices]
                amounts = [f"{done.flops / 1e9:.4g}", f"{done.bytes / 1e6:.4g}", f"{done.flops / done.bytes:.3g}"]
                lines.append([model, step, part, *amounts, *(f"{1000 * seconds:.3g}" for seconds in times)])
    header = ["Model", "Step", "Part", "GFLOP", "MB", "FLOP/byte", *(f"{d.ceilings.name}, ms" for d in devices)]
    return pipe_table(header, lines)


def plot_sublayers(shapes: Mapping[str, ModelShape], ceilings: Ceilings, stem: Path) -> list[Path]:
    """Write `stem`.png and `.svg`: a row per phase, a column per model, milliseconds against context on one device."""
    with styled():
        figure = Figure(figsize=(2.4 * len(shapes) + 0.7, 4.9), layout="constrained")
        axes = figure.subplots(len(STEPS), len(shapes), sharex=True, sharey="row", squeeze=False)
        for step, row in zip(STEPS, axes, strict=True):
            for shape, panel in zip(shapes.values(), row, strict=True):
                _draw(panel, shape, step, ceilings)
            label = "prefill: whole prompt" if step == "prefill" else "decode: one token"
            row[-1].annotate(label, (1.03, 0.5), xycoords="axes fraction", rotation=270, va="center", fontsize=9)
        for model, panel in zip(shapes, axes[0], strict=True):
            panel.set_title(model)
        figure.supxlabel("context, tokens", fontsize=8)
        figure.supylabel(f"least time of one sublayer on {ceilings.name}, ms", fontsize=8)
        handles = [Line2D([], [], **look.line, label=label) for label, look in LINES.values()]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        return save(figure, stem)


def _draw(panel: Axes, shape: ModelShape, step: Step, ceilings: Ceilings) -> None:
    """Draw the lines, and a ring with the context at which attention takes as long as the FFN."""
    for (kind, attention), (_, look) in LINES.items():
        times = [1000 * seconds(shape, kind, step, context, ceilings, attention) for context in DRAWN]
        panel.plot(DRAWN, times, **{**look.line, "markersize": 3})
        context = find_crossover(shape, step, ceilings, attention) if kind == "attention" else None
        if context is not None and DRAWN[0] <= context <= DRAWN[-1]:
            at, fused = (context, 1000 * seconds(shape, "ffn", step, context, ceilings)), attention == "fused"
            panel.plot(*at, marker="o", markersize=8, markerfacecolor="none", markeredgecolor="black", linestyle="none")
            place = {"xytext": (4, -11), "ha": "left"} if fused else {"xytext": (-4, 7), "ha": "right"}
            panel.annotate(f"{context / 1000:.1f}k", at, textcoords="offset points", fontsize=7, **place)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    ticks = DRAWN[1::2]
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticklabels([f"{tick // 1000}k" for tick in ticks])
    panel.grid(axis="both")
