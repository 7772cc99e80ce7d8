"""Runs a benchmark: round after round, every cell once, and each whole round saved before the next begins."""

from __future__ import annotations

import logging
import platform
import re
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from adaskip.bench.cells import Cell, Workload, cells_of, rotated
from adaskip.bench.limits import lacks_limits, limits_of
from adaskip.bench.results import Record, Result, open_result
from adaskip.bench.settings import BenchConfig
from adaskip.bench.subject import Subject, chosen_device, load_subject
from adaskip.bench.summary import entries_of
from adaskip.bench.trials import Trials
from adaskip.runs.manifest import device_name, git_commit

logger = logging.getLogger(__name__)

BUDGETS = (0.125, 0.25)


@dataclass(frozen=True)
class Outcome:
    """result: what is saved. notes: what a user should know of it, one line each."""

    result: Result
    notes: tuple[str, ...]
    complete: bool


def run_bench(config: BenchConfig) -> Outcome:
    """Measure what is missing of a benchmark's rounds and save it.

    Raises:
        ValueError: an impossible device, checkpoint, profile or budget, or a saved result of another kind.
    """
    began = time.monotonic()
    device = chosen_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    subject = load_subject(config)
    budgets = config.budgets or tuple(round(2 * subject.num_layers * share) for share in BUDGETS)
    cells = cells_of(config.study, config.phases, config.strategies, budgets, config.modes)
    trials = Trials(subject, config.clock)  # pyright: ignore[reportArgumentType]
    for workload in config.workloads:
        for cell in cells:
            trials.strategy(cell, workload)  # refuses an impossible budget before anything runs
    path = Path(config.output_dir) / folder_name(device) / f"{config.result_name}.json"
    result = open_result(path, describe(config, subject, device), fresh=config.fresh)
    runner = _Runner(config, trials, cells, result, began)
    notes = [note for workload in config.workloads if (note := runner.run(workload))]
    if config.study == "strategies" and lacks_limits(result):
        result.limits = limits_of(result, trials, config.attn_implementation)
    result.entries = entries_of(result)
    result.save()
    complete = all(result.failed(w) or result.rounds_of(w) >= config.rounds for w in config.workloads)
    return Outcome(result, tuple(notes), complete)


def folder_name(device: torch.device) -> str:
    """What a device's folder is called: `cpu`, or the GPU's name in letters and digits."""
    return "cpu" if device.type == "cpu" else re.sub(r"\W+", "-", device_name(device)).strip("-").lower()


def describe(config: BenchConfig, subject: Subject, device: torch.device) -> dict[str, Any]:
    """A result's manifest: what must not change when it is continued, and which code measured it."""
    identity = {
        **config.identity,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "adaskip")},
        },
        "subject": subject.describe(),
    }
    return {"figure": config.figure, "identity": identity, "rounds": config.rounds, "git_commits": [git_commit()]}


@dataclass
class _Runner:
    config: BenchConfig
    trials: Trials
    cells: list[Cell]
    result: Result
    began: float

    def run(self, workload: Workload) -> str | None:
        """Run the missing rounds of a workload; returns a line on why some are still missing."""
        if self.result.failed(workload) or self.result.rounds_of(workload) >= self.config.rounds:
            return None
        try:
            took = self._round(workload, 0)[1]  # warms up, and shows how long a round takes
            for number in range(self.result.rounds_of(workload) + 1, self.config.rounds + 1):
                if self._too_late(took):
                    return f"{workload}: {number - 1} of {self.config.rounds} rounds so far; the same command continues"
                records, took = self._round(workload, number)
                self.result.records += records
                self.result.save()
                logger.info("%s: round %d of %d, %.1f s", workload, number, self.config.rounds, took)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        else:
            return None
        self._give_up(workload)  # outside of the handler, whose traceback keeps the tensors alive
        return f"{workload}: not enough memory on {self.trials.subject.model.device}; passed over"

    def _round(self, workload: Workload, number: int) -> tuple[list[Record], float]:
        start, records = time.monotonic(), []
        for cell in rotated(self.cells, number):
            about = {"workload": vars(workload), "cell": cell.to_dict(), "round": number}
            records.append({**about, **_rounded(self.trials.run(cell, workload))})
        return records, time.monotonic() - start

    def _too_late(self, round_s: float) -> bool:
        limit = self.config.time_limit_s
        return limit is not None and time.monotonic() - self.began + round_s > limit

    def _give_up(self, workload: Workload) -> None:
        torch.cuda.empty_cache()
        self.result.records = [record for record in self.result.records if record["workload"] != vars(workload)]
        self.result.records.append({"workload": vars(workload), "cell": {}, "round": 0, "error": "out of memory"})
        self.result.save()


def _rounded(value: Any) -> Any:
    """Times to a tenth of a microsecond."""
    if isinstance(value, float):
        return round(value, 7)
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
