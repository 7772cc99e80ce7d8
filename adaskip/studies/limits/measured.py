"""Predictions beside what the benchmark measured on the same device, whose ceilings were measured with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaskip.common.intervals import Estimate
from adaskip.common.pipe_table import pipe_table
from adaskip.strategies import FULL
from adaskip.studies.bench.results import Record, Result, load_results
from adaskip.studies.tables import labels

TIMES = {"prefill": "ttft_s", "decode": "tpot_s"}
"""Part of a request: the time a benchmark's entries tell it by."""
HEADER = ("Device", "Model", "Batch x prompt + new", "Strategy", "Phase", "Skipped", "Mode")
HEADER += ("Prefill, predicted", "measured", "Decode, predicted", "measured", "Result")


@dataclass(frozen=True)
class Measured:
    """Speedups of one way to run a model over the full model in the same mode: predicted and timed.

    predicted_*: at the ceilings measured on the device. phase: what skips. result: name of the benchmark's result.
    """

    device: str
    model: str
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    strategy: str
    phase: str
    sublayers: int
    mode: str
    predicted_prefill: float
    measured_prefill: Estimate
    predicted_decode: float
    measured_decode: Estimate
    result: str


def read_measured(folder: Path) -> list[Measured]:
    """What the studies of strategies in the device folders below `folder` measured; nothing if there are none."""
    return [found for result in load_results(folder) if result.study == "strategies" for found in _of(result)]


def _of(result: Result) -> Iterator[Measured]:
    full = {_work(entry): entry for entry in result.entries if entry["strategy"] == FULL}
    for entry in result.entries:
        beside = full.get(_work(entry))
        if entry["strategy"] == FULL or beside is None or not (_has_limits(entry) and _has_limits(beside)):
            continue
        yield Measured(
            device=result.device,
            model=result.manifest["identity"]["model"],
            **{name: entry[name] for name in ("prompt_tokens", "new_tokens", "batch_size")},
            **{name: entry[name] for name in ("strategy", "phase", "mode")},
            sublayers=entry["budget"],
            predicted_prefill=_predicted(beside, entry, "prefill"),
            measured_prefill=_timed(entry, "prefill"),
            predicted_decode=_predicted(beside, entry, "decode"),
            measured_decode=_timed(entry, "decode"),
            result=result.name,
        )


def _work(entry: Record) -> tuple:
    return tuple(entry[name] for name in ("batch_size", "prompt_tokens", "new_tokens", "mode"))


def _has_limits(entry: Record) -> bool:
    """Not so if the measurement was interrupted before its end."""
    return all(entry[f"limit_{time}"] for time in TIMES.values())


def _predicted(full: Record, entry: Record, part: str) -> float:
    limit = f"limit_{TIMES[part]}"
    return full[limit] / entry[limit]


def _timed(entry: Record, part: str) -> Estimate:
    return Estimate(entry[f"speedup_{part}"], *entry[f"speedup_{part}_interval"])


def measured_table(measured: Sequence[Measured]) -> str:
    """A line per way to run a model; speedups with 95 % intervals over the rounds."""
    return pipe_table(HEADER, [_line(m) for m in measured])


def _line(m: Measured) -> list[str]:
    work = f"{m.batch_size} x {m.prompt_tokens} + {m.new_tokens}"
    way = [labels.STRATEGIES.get(m.strategy, m.strategy), m.phase, str(m.sublayers), m.mode]
    prefill = [labels.ratio(m.predicted_prefill), _speedup(m.measured_prefill)]
    decode = [labels.ratio(m.predicted_decode), _speedup(m.measured_decode)]
    return [m.device, m.model, work, *way, *prefill, *decode, m.result]


def _speedup(timed: Estimate) -> str:
    between = "" if timed.low is None else f" [{timed.low:.2f}, {timed.high:.2f}]"
    return f"{labels.ratio(timed.value)}{between}"
