"""Runs a benchmark: round after round, every cell once, and each whole round saved before the next begins."""

from __future__ import annotations

import logging
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from adaskip.common.provenance import device_name, git_commit
from adaskip.studies.bench.cells import Cell, Workload, cells_of, rotated
from adaskip.studies.bench.limits import lacks_limits, limits_of
from adaskip.studies.bench.results import Record, Result, open_result
from adaskip.studies.bench.settings import BenchConfig
from adaskip.studies.bench.subject import Subject, chosen_device, load_subject
from adaskip.studies.bench.summary import entries_of
from adaskip.studies.bench.trials import Trials
from adaskip.studies.engines.engines import ENGINE_MODES
from adaskip.studies.engines.processes import EngineProcesses

logger = logging.getLogger(__name__)

BUDGETS = (0.125, 0.25)
WARM_UP = 0
"""The number of the round that does not count."""
LACKS_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How CUDA and cuBLAS say it; torch's own allocators are known to accelerate."""


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
    with _engines(config, subject) as engines:
        trials = Trials(subject, config.clock, engines=engines)  # pyright: ignore[reportArgumentType]
        for workload in config.workloads:
            for cell in cells:
                trials.strategy(cell, workload)  # refuses an impossible budget before anything runs
        path = config.out_dir / folder_name(device) / f"{config.result_name}.json"
        result = open_result(path, describe(config, subject, device), fresh=config.fresh)
        runner = _Runner(config, trials, cells, result, began)
        notes = [note for workload in config.workloads if (note := runner.run(workload))]
    if config.study == "strategies" and lacks_limits(result):
        result.limits = limits_of(result, trials, config.attn_implementation)
    result.entries = entries_of(result)
    result.save()
    complete = all(result.failed(w) or result.rounds_of(w) >= config.rounds for w in config.workloads)
    return Outcome(result, tuple(notes), complete)


@contextmanager
def _engines(config: BenchConfig, subject: Subject) -> Iterator[EngineProcesses | None]:
    """The engines among the modes; their processes end with the benchmark."""
    if not set(config.modes) & set(ENGINE_MODES):
        yield None
        return
    most = {
        "batch_size": max(config.batch_sizes),
        "prompt_tokens": max(config.prompt_tokens),
        "new_tokens": config.new_tokens,
    }
    with EngineProcesses(subject.model, subject.tokenizer, subject.gguf_file, most, torch.get_num_threads()) as engines:
        yield engines


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
    saved: bool = False
    """Whether this command has added anything to the result."""
    round_s: float = 0.0
    """How long the last round took; a warm-up's time, which may hold compilation, until a round that counts follows."""
    running: Record = field(default_factory=dict)
    """Workload, cell and round of what runs."""

    def run(self, workload: Workload) -> str | None:
        """Run the missing rounds of a workload; returns a line on why some are still missing."""
        done = self.result.rounds_of(workload)
        if self.result.failed(workload) or done >= self.config.rounds:
            return None
        try:
            for number in (WARM_UP, *range(done + 1, self.config.rounds + 1)):
                if self._too_late():
                    return f"{workload}: {self._progress(workload)} so far; the same command continues"
                records = self._round(workload, number)
                if number != WARM_UP:
                    self._save(records)
                    logger.info("%s: round %d of %d, %.1f s", workload, number, self.config.rounds, self.round_s)
        except RuntimeError as error:
            if not _lacks_memory(error):
                raise
        else:
            return None
        return self._give_up(workload)  # outside of the handler, whose traceback keeps the tensors alive

    def _round(self, workload: Workload, number: int) -> list[Record]:
        start, records = time.monotonic(), []
        for cell in rotated(self.cells, number):
            self.running = {"workload": vars(workload), "cell": cell.to_dict(), "round": number}
            records.append({**self.running, **_rounded(self.trials.run(cell, workload))})
        self.round_s = time.monotonic() - start
        return records

    def _too_late(self) -> bool:
        """Whether another round would end behind the time limit.

        Never before something is saved: however slow the warm-up, a command that is repeated comes to an end.
        """
        limit = self.config.time_limit_s
        return limit is not None and self.saved and time.monotonic() - self.began + self.round_s > limit

    def _give_up(self, workload: Workload) -> str:
        """Note which cell lacked memory; the rounds before it stay."""
        self.trials.static_caches.forget()
        torch.cuda.empty_cache()
        self._save([{**self.running, "error": "out of memory"}])
        device, cell = self.trials.subject.model.device, Cell(**self.running["cell"])
        return f"{workload}: not enough memory on {device} for {cell.label}; {self._progress(workload)}"

    def _save(self, records: list[Record]) -> None:
        self.result.records += records
        self.result.save()
        self.saved = True

    def _progress(self, workload: Workload) -> str:
        return f"{self.result.rounds_of(workload)} of {self.config.rounds} rounds"


def _lacks_memory(error: RuntimeError) -> bool:
    told = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return told or any(text in str(error) for text in LACKS_MEMORY)


def _rounded(value: Any) -> Any:
    """Times to a tenth of a microsecond."""
    if isinstance(value, float):
        return round(value, 7)
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
