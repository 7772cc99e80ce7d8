"""The predictions as a document: what was predicted, from what, and how far it explains the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adaskip.roofline.shape import ModelShape
from adaskip.studies.limits.comparison import ATTENTION_ALONE, PAPER_DEVICE, Device, Explained, Prediction, Workload
from adaskip.studies.limits.crossover import STEPS, Crossover
from adaskip.studies.limits.measured import Measured, measured_table
from adaskip.studies.limits.tables import (
    EXPLANATIONS,
    context_table,
    crossover_table,
    device_table,
    gap_table,
    launch_table,
    paper_table,
    times_table,
    work_of,
    work_table,
)


@dataclass(frozen=True)
class Roofline:
    """Everything that was computed.

    shapes: by model. skip_set: where AdaSkip's sets come from. operators: by model, those of a decode step
    (`Launches.by_kind`). measured: what the benchmark timed, wherever that was.
    """

    work: Workload
    devices: Sequence[Device]
    shapes: Mapping[str, ModelShape]
    skip_set: str
    predictions: Sequence[Prediction]
    explained: Sequence[Explained]
    crossovers: Sequence[Crossover]
    operators: Mapping[str, Mapping[str, int]]
    measured: Sequence[Measured]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
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
            "crossovers": [asdict(crossover) for crossover in self.crossovers],
            "operators": self.operators,
            "predictions": [asdict(prediction) for prediction in self.predictions],
            "paper": [asdict(explained) for explained in self.explained],
            "measured": [asdict(measured) for measured in self.measured],
        }

    def to_markdown(self, figure: str) -> str:
        """The document. figure: the picture's file name."""
        parts = ["# Roofline: what the hardware allows", self._settings(), device_table(self.devices)]
        parts += ["## When attention skipping wins, and when FFN skipping does", *self._by_context(figure)]
        if self.explained:
            parts += [f"## Beside what the paper measured on one {PAPER_DEVICE}", *self._beside_the_paper()]
        parts += ["## Beside what the benchmark measured", *self._beside_the_benchmark()]
        parts += ["## TTFT: milliseconds, and speedup over the full model", "The prompt skips (phase prefill)."]
        parts += [f"### {model}\n\n{times_table(self._of(model, 'prefill'), 'ttft')}" for model in self.shapes]
        parts += ["## TPOT: milliseconds, and speedup over the full model", "Decoding skips (phase decode)."]
        parts += [f"### {model}\n\n{times_table(self._of(model, 'decode'), 'tpot')}" for model in self.shapes]
        parts += ["## Launches or bytes", *self._launches_or_bytes()]
        parts += ["## Operations and bytes of one sublayer", work_table(self.shapes, self.work, self.devices)]
        return "\n\n".join(parts) + "\n"

    def _launches_or_bytes(self) -> list[str]:
        return [
            "The time an operator of the full model's decode step may take, microseconds. Where Python and the driver "
            "take longer to launch one, launches are the limit and not bytes: decoding goes at the host's pace, and "
            "CUDA graphs or larger batches bring it nearer to the device's limit.",
            launch_table(self.predictions, self.operators),
        ]

    def _operators(self, model: str) -> str:
        count = self.operators[model]
        return f"{model} {count['step']}, of which each attention {count['attention']} and each FFN {count['ffn']}"

    def _of(self, model: str, phase: str) -> list[Prediction]:
        return [p for p in self.predictions if (p.model, p.way.phase) == (model, phase)]

    def _settings(self) -> str:
        work = self.work
        return (
            "The least times at which a device can run a model: a sublayer's operations over the device's rate of "
            "matrix multiplication or its bytes over the memory bandwidth, whichever takes longer, one sublayer after "
            "the other, and nothing else. Real runs take longer.\n\n"
            f"{work.batch_size} x {work.prompt_tokens} prompt tokens, {work.new_tokens} new tokens. AdaSkip's sets: "
            f"{self.skip_set}. SkipDecode reaches its full depth at the last new token."
        )

    def _by_context(self, figure: str) -> list[str]:
        device = self.devices[0].ceilings
        return [
            f"![What one sublayer takes at least, by context length]({figure})",
            "Skipping an attention saves more than skipping an FFN from that context on at which it takes as long "
            f"(rings in the figure; {device.name}, batch 1), in tokens:",
            crossover_table(self.crossovers),
            "Below that, FFN skipping wins. While a long prompt is read, both are bound by arithmetic, and attention's "
            "grows with the square of the prompt. While one row is decoded, both are bound by memory: an FFN reads its "
            "weights, an attention its smaller weights and the K/V of the whole context, of which grouped heads keep "
            "little. An attention that sends its scores through memory overtakes far earlier in prefill.",
            f"Speedup of one forward on {device.name} with a quarter of the sublayers skipped, all of them attention / "
            "all FFN, by context:",
            context_table(self.shapes, device),
        ]

    def _beside_the_benchmark(self) -> list[str]:
        if not self.measured:
            return ["Nothing is measured yet: `adaskip bench` times the strategies on a device and its ceilings."]
        return [
            "Speedups over the full model in the same mode. Predicted: at the ceilings measured on the device itself, "
            "with the sets and lengths of the measurement. Measured: medians over the rounds with 95 % intervals, from "
            "`adaskip bench`. *Phase* is what skips; in phase prefill one set serves prompt and answer.",
            measured_table(self.measured),
        ]

    def _beside_the_paper(self) -> list[str]:
        return [
            "The lengths behind the paper's speedups are not known here; predictions are for those above. Each column "
            "lets one thing alone take time. *ceilings*: the device's, with an attention that keeps its scores on the "
            "chip (SDPA, FlashAttention). *eager attention*: the same, but the scores go through memory, as in "
            "transformers' plain implementation. *launches*: every operator that stock transformers dispatches in a "
            "decode step takes the same time, as where Python and kernel launches are the limit; counted, not timed.",
            f"Operators of a decode step: {'; '.join(map(self._operators, self.shapes))}; of any context alike.",
            paper_table(self.explained),
            "Mean of predicted minus measured speedup. Whole layers take their share of the time whatever limits it, "
            "so there the columns agree, and what the paper falls short of is time that skipping does not save.",
            gap_table(self.explained),
            *_unexplained(self.explained),
        ]


def _unexplained(explained: Sequence[Explained]) -> list[str]:
    """Speedups above every prediction, even with attention alone skipped."""
    cases = []
    for e in explained:
        highest = max(value for name in EXPLANATIONS if (value := getattr(e, name)) is not None)
        if e.way.strategy == ATTENTION_ALONE and e.paper > highest:
            cases.append(f"{e.model}, {e.way.phase}, {e.way.sublayers} sublayers: {e.paper:.2f} > {highest:.2f}")
    if not cases:
        return []
    listed = "; ".join(cases)
    return [
        f"Above every column, even if AdaSkip had skipped nothing but attention, are: {listed}. There "
        "attention cost more than is counted here, or more was skipped."
    ]
