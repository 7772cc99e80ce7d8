"""From a result's rounds to what is reported: medians over the rounds, ratios within each round, intervals, references.

A ratio is the median of the rounds' own ratios, with a 95 % bootstrap interval over the rounds. Ideal is the full
model's time without the share that its breakdown, in the same run, gives the skipped sublayers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaskip.common.intervals import Estimate, median_estimate
from adaskip.strategies import FULL
from adaskip.strategies.adaskip import LEARNING_WINDOW
from adaskip.studies.bench.cells import (
    BREAKDOWN,
    EAGER,
    MEASURING_PREFILL,
    PATCHED,
    PLAIN_PREFILL,
    WINDOWLESS,
    Cell,
    Workload,
)
from adaskip.studies.bench.results import Record, Result

GENERATION_TOKENS = 256
"""The length of generation that the learning window's cost is told for."""
WINDOW_STEPS = LEARNING_WINDOW + 1
"""Decode steps that differ by the window: its own, and the one behind it."""


def tpot_s(record: Record) -> float:
    """Mean time of a decode step."""
    return statistics.fmean(record["steps_s"])


def ttft_s(record: Record) -> float:
    return record["ttft_s"]


TIMES = {"prefill": ttft_s, "decode": tpot_s}


@dataclass(frozen=True)
class Comparison:
    """One cell of one workload beside the full model of the same rounds."""

    result: Result
    workload: Workload
    cell: Cell

    @property
    def records(self) -> list[Record]:
        return self.result.of(self.workload, self.cell)

    @property
    def full(self) -> list[Record]:
        return self.result.of(self.workload, self.cell.baseline)

    def seconds(self, phase: str) -> float:
        """Median over the rounds of TTFT (prefill) or TPOT (decode)."""
        return statistics.median(map(TIMES[phase], self.records))

    def speedup(self, phase: str) -> Estimate:
        """Full model's time / this cell's."""
        return ratios(self.full, self.records, phase)

    def ideal_share(self, phase: str) -> float | None:
        """Share of the full model's time spent in the sublayers this cell skips; None without a breakdown.

        A decode step counts by medians over the steps, which are what the breakdown holds.
        """
        timed = self.result.of(self.workload, Cell(BREAKDOWN))
        if not timed or self.cell.mode != EAGER:
            return None
        skipped: Mapping[str, Sequence[float]] | None = self.records[0].get(f"{phase}_shares")
        if skipped is None:
            return 0.0
        per_round = []
        for record in timed:
            spent = record[f"{phase}_sublayers_s"]
            saved = sum(s * t for kind in spent for s, t in zip(skipped[kind], spent[kind], strict=True))
            whole = record["ttft_s"] if phase == "prefill" else statistics.median(record["steps_s"])
            per_round.append(saved / whole)
        return statistics.median(per_round)

    def realised(self, phase: str) -> Estimate | None:
        """Saving / ideal saving; None where nothing is skipped or nothing is known of the sublayers."""
        share = self.ideal_share(phase)
        if not share:
            return None
        time = TIMES[phase]
        pairs = zip(self.full, self.records, strict=True)
        return median_estimate([(1 - time(ours) / time(full)) / share for full, ours in pairs])

    def ideal_s(self, phase: str) -> float | None:
        share = self.ideal_share(phase)
        return None if share is None else statistics.median(map(TIMES[phase], self.full)) * (1 - share)

    def entry(self) -> Record:
        """Everything reported of the cell, in plain numbers."""
        records, limit = self.records, self.result.limit(self.workload, self.cell) or {}
        rows, tokens = self.workload.batch_size, self.workload.prompt_tokens
        entry: Record = {
            "phase": self.cell.phase,
            "strategy": self.cell.name,
            "budget": self.cell.sublayers,
            "mode": self.cell.mode,
            **vars(self.workload),
            "rounds": len(records),
            "ttft_s": self.seconds("prefill"),
            "tpot_s": self.seconds("decode"),
            "prefill_tokens_per_s": rows * tokens / self.seconds("prefill"),
            "decode_tokens_per_s": rows / self.seconds("decode"),
            "kv_bytes": records[-1]["kv_bytes"],
            "peak_memory_bytes": records[-1]["peak_memory_bytes"],
        }
        for phase in TIMES:
            name, speedup = "ttft_s" if phase == "prefill" else "tpot_s", self.speedup(phase)
            realised = self.realised(phase)
            entry[f"speedup_{phase}"] = speedup.value
            entry[f"speedup_{phase}_interval"] = [speedup.low, speedup.high]
            entry[f"ideal_{name}"] = self.ideal_s(phase)
            entry[f"realised_{phase}"] = None if realised is None else realised.value
            entry[f"realised_{phase}_interval"] = None if realised is None else [realised.low, realised.high]
            entry[f"limit_{name}"] = limit.get(name)
        return entry


def ratios(numerators: Sequence[Record], denominators: Sequence[Record], phase: str) -> Estimate:
    """The median over the rounds of one cell's time / another's."""
    time = TIMES[phase]
    estimate = median_estimate([time(a) / time(b) for a, b in zip(numerators, denominators, strict=True)])
    assert estimate is not None
    return estimate


def comparisons(result: Result) -> list[Comparison]:
    """Every cell of a study of strategies that has the full model beside it."""
    if result.study != "strategies":
        return []
    return [Comparison(result, w, cell) for w in result.workloads for cell in result.cells(w) if cell.name != BREAKDOWN]


def entries_of(result: Result) -> list[Record]:
    """By workload; the full model first."""
    entries = [comparison.entry() for comparison in comparisons(result)]
    return sorted(entries, key=_order)


def _order(entry: Record) -> tuple:
    work = tuple(entry[name] for name in ("batch_size", "prompt_tokens", "mode"))
    return *work, entry["strategy"] != FULL, entry["phase"], entry["strategy"], entry["budget"]


def patched_over_stock(result: Result, workload: Workload, mode: str, phase: str) -> Estimate:
    """Time inside `skipping` with nothing to skip / the stock model's."""
    return ratios(result.of(workload, Cell(PATCHED, mode=mode)), result.of(workload, Cell(FULL, mode=mode)), phase)


def window_cost(result: Result, workload: Workload, cell: Cell) -> Estimate:
    """Time the learning window adds to a generation of 256 tokens / that generation's decoding without it.

    The window's bookkeeping ends with the step behind it; only these steps are compared, and the time they add is
    set against 255 mean steps: so a machine's noise over the rest does not drown it.

    Raises ValueError if the answers end before the window does.
    """
    if workload.decode_steps < WINDOW_STEPS:
        raise ValueError(
            f"the learning window's cost shows in {WINDOW_STEPS} decode steps; {workload} have {workload.decode_steps}"
        )
    without = Cell(WINDOWLESS, cell.phase, cell.sublayers, cell.mode)
    costs = []
    for ours, plain in zip(result.of(workload, cell), result.of(workload, without), strict=True):
        added = sum(ours["steps_s"][:WINDOW_STEPS]) - sum(plain["steps_s"][:WINDOW_STEPS])
        costs.append(added / (tpot_s(plain) * (GENERATION_TOKENS - 1)))
    estimate = median_estimate(costs)
    assert estimate is not None
    return estimate


def calibration_over_plain(result: Result, workload: Workload) -> Estimate:
    """Time of a prefill that measures IO similarity / a plain one's."""
    pairs = zip(*(result.of(workload, Cell(name)) for name in (MEASURING_PREFILL, PLAIN_PREFILL)), strict=True)
    estimate = median_estimate([measuring["prefill_s"] / plain["prefill_s"] for measuring, plain in pairs])
    assert estimate is not None
    return estimate
