"""`adaskip bench` and `adaskip bench-report`: measure what is missing, and report saved results.

A benchmark runs in rounds, in each of which every cell runs once, and the full model several times if others are
compared with it. Each complete round is saved before the next starts.
"""

from __future__ import annotations

import logging
import re
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers.utils import logging as transformers_logging

from adaskip.common.locks import exclusive
from adaskip.common.optional import optional_import
from adaskip.common.options import option
from adaskip.common.paths import given_or_default
from adaskip.common.provenance import device_name, git_commit, versions
from adaskip.core.plan import EMPTY_PLAN
from adaskip.roofline import ModelShape, measure_ceilings, predict
from adaskip.studies.bench.memory import keep_freed_memory
from adaskip.studies.bench.results import Record, Result, open_result, what_failed
from adaskip.studies.bench.settings import (
    BREAKDOWN,
    RESULTS_DIR,
    TURNS,
    BenchConfig,
    Cell,
    Workload,
    cells_of,
    groups_of,
    rotated,
)
from adaskip.studies.bench.subject import Subject, chosen_device, load_subject
from adaskip.studies.bench.trials import Trials, decode_plans
from adaskip.studies.engines.engines import ENGINE_MODES
from adaskip.studies.engines.processes import EngineProcesses

logger = logging.getLogger(__name__)

BUDGETS = (0.125, 0.25)
WARM_UP = 0
"""Number of the warm-up round, which does not count."""
LACKS_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Messages of CUDA and cuBLAS; accelerate knows those of torch's allocators."""


@dataclass(frozen=True)
class Outcome:
    """result: the saved result. notes: lines for the user."""

    result: Result
    notes: tuple[str, ...]
    complete: bool


def run_bench(config: BenchConfig) -> Outcome:
    """Measure and save the missing rounds of a benchmark.

    Raises:
        ValueError: an impossible device, checkpoint, profile or budget, or a saved result of another configuration.
    """
    began = time.monotonic()
    device = chosen_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    subject = load_subject(config)
    budgets = config.budgets or tuple(round(2 * subject.num_layers * share) for share in BUDGETS)
    cells = cells_of(config.study, config.phases, config.strategies, budgets, config.modes)
    path = config.out_dir / folder_name(device) / f"{config.result_name}.json"
    identity = {
        **{**config.identity, "device_name": device_name(device), "threads": torch.get_num_threads()},
        **{"versions": versions(), "subject": subject.describe()},
        **({"freed_memory": "kept"} if config.clock == TURNS and keep_freed_memory() else {}),
    }
    manifest = {"figure": config.figure, "identity": identity, "rounds": config.rounds, "git_commits": [git_commit()]}
    with exclusive(path.with_suffix(".lock"), of=path), _engines(config, subject) as engines:
        clock: Any = config.clock
        trials = Trials(subject, clock, engines=engines, keep_kv=config.keep_kv)
        for workload in config.workloads:
            for cell in cells:
                trials.strategy(cell, workload)  # refuses an impossible budget before anything runs
        if config.time_limit_s == 0 and not path.is_file():
            raise ValueError(
                f"--time-limit-s 0 adds the limits of the device to a saved result; there is none at {path}"
            )
        result = open_result(path, manifest, config.workloads, fresh=config.fresh)
        runner = _Runner(config, trials, cells, result, began)
        notes = [note for workload in config.workloads if (note := runner.run(workload))]
    timed = [(w, cell) for w in result.workloads for cell in result.cells(w) if cell.name != BREAKDOWN]
    if config.study == "strategies" and any(result.limit(w, cell) is None for w, cell in timed):
        result.limits = limits_of(result, timed, trials, config.attn_implementation)
    result.save()
    complete = all(result.has(workload, config.rounds) for workload in config.workloads)
    return Outcome(result, tuple(notes), complete)


def _engines(config: BenchConfig, subject: Subject) -> AbstractContextManager[EngineProcesses | None]:
    """The engines among the modes; their processes end with the benchmark."""
    if not set(config.modes) & set(ENGINE_MODES):
        return nullcontext()
    largest = Workload(max(config.prompt_tokens), config.new_tokens, max(config.batch_sizes))
    return EngineProcesses(subject.model, subject.tokenizer, subject.gguf_file, vars(largest), torch.get_num_threads())


def folder_name(device: torch.device) -> str:
    """The name of a device's folder: `cpu`, or the name of the GPU in letters and digits."""
    return "cpu" if device.type == "cpu" else re.sub(r"\W+", "-", device_name(device)).strip("-").lower()


def limits_of(
    result: Result, timed: list[tuple[Workload, Cell]], trials: Trials, attn_implementation: str
) -> list[Record]:
    """`ttft_s` and `tpot_s` of every timed cell at the measured copy bandwidth and matmul rate, which are saved in the
    manifest of the result."""
    model = trials.subject.model
    ceilings, shape = measure_ceilings(model.device, model.dtype), ModelShape.of(model.config)
    rates = {"matmul_flops": ceilings.matmul_flops, "bandwidth_bytes_per_s": ceilings.bandwidth}
    result.manifest["ceilings"] = {**rates, "source": ceilings.source}
    limits = []
    for workload, cell in timed:
        strategy, plans = trials.strategy(cell, workload), [EMPTY_PLAN] * workload.decode_steps
        if strategy is not None:
            online = result.of(workload, cell)[-1].get("online_ffns", [])
            plans = decode_plans(strategy, workload.decode_steps, online)
        times = predict(
            shape,
            prefill_plan=EMPTY_PLAN if strategy is None else strategy.prefill_plan,
            decode_plan=lambda step, plans=plans: plans[step - 1],
            **vars(workload),
            ceilings=ceilings,
            bytes_per_value=model.dtype.itemsize,
            attention="eager" if attn_implementation == "eager" else "fused",
        )
        about = {"workload": vars(workload), "cell": vars(cell)}
        limits.append({**about, "ttft_s": times.ttft_s, "tpot_s": times.tpot_s})
    return limits


@dataclass
class _Runner:
    """saved: whether this command has added a round to the result. round_s: duration of the last round, at first of the
    warm-up, which may include compilation. running: current workload, cell and round."""

    config: BenchConfig
    trials: Trials
    cells: list[Cell]
    result: Result
    began: float
    saved: bool = False
    round_s: float = 0.0
    running: Record = field(default_factory=dict)

    def run(self, workload: Workload) -> str | None:
        """Run the missing rounds of a workload; returns a line that explains why some are still missing, else None."""
        done, rounds = self.result.rounds_of(workload), self.config.rounds
        if self.result.has(workload, rounds):
            return None
        try:
            for number in (WARM_UP, *range(done + 1, rounds + 1)):
                if self._too_late():
                    told = f"{self.result.rounds_of(workload)} of {rounds} rounds"
                    more = (
                        "--time-limit-s 0 runs none" if self.config.time_limit_s == 0 else "the same command continues"
                    )
                    return f"{workload}: {told} so far; {more}"
                start, records = time.monotonic(), self._round(workload, number)
                self.round_s = time.monotonic() - start
                if number == WARM_UP and self.config.clock == TURNS:
                    self.round_s *= len(groups_of(self.cells, self.config.study, TURNS))  # it ran the first of them
                if number != WARM_UP:
                    self._save(records)
                    logger.info("%s: round %d of %d, %.1f s", workload, number, rounds, self.round_s)
        except RuntimeError as error:
            told = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
            if not told and not any(text in str(error) for text in LACKS_MEMORY):
                raise
        else:
            return None
        # Outside the handler, since its traceback keeps the tensors alive. Earlier rounds are kept.
        self.trials.static_caches.caches.clear()
        torch.cuda.empty_cache()
        self._save([{**self.running, "error": "out of memory"}])
        device, told = self.trials.subject.model.device, f"{self.result.rounds_of(workload)} of {rounds} rounds"
        return f"{workload}: not enough memory on {device} for {what_failed(self.running)}; {told}"

    def _round(self, workload: Workload, number: int) -> list[Record]:
        """Run every cell, and return the records in the order in which they ran, or took turns."""
        groups, records = groups_of(rotated(self.cells, number), self.config.study, self.config.clock), []
        if self.config.clock == TURNS and number == WARM_UP:
            groups = groups[:1]  # each copy of the model runs once
        for group in groups:
            alone, trials, about = len(group) == 1, self.trials, {"workload": vars(workload), "round": number}
            self.running = {**about, "cell": vars(group[0]), **({} if alone else {"in_turns": len(group)})}
            measured = [trials.run(group[0], workload)] if alone else trials.run_in_turns(group, workload)
            for cell, one in zip(group, measured, strict=True):
                records.append({**about, "cell": vars(cell), **_rounded(one)})
        return records

    def _too_late(self) -> bool:
        """Whether another round would end after the time limit.

        False until a round is saved, so that a repeated command completes, however slow its warm-up is. A limit of 0
        starts none.
        """
        limit = self.config.time_limit_s
        if limit == 0:
            return True
        return limit is not None and self.saved and time.monotonic() - self.began + self.round_s > limit

    def _save(self, records: list[Record]) -> None:
        self.result.records += records
        self.result.save()
        self.saved = True


def _rounded(value: Any) -> Any:
    """Round times to a tenth of a microsecond."""
    if isinstance(value, float):
        return round(value, 7)
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


INCOMPLETE = 1


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The options of `adaskip bench-report`."""

    results_dir: str | None = option(f"folder of the results; default: {RESULTS_DIR}")


def bench(config: BenchConfig) -> int:
    """Run a benchmark; returns the exit code."""
    with optional_import():
        from adaskip.studies.bench.report import result_markdown
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("adaskip.studies.bench").setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()  # random weights have no generation config to be warned of
    outcome = run_bench(config)
    table = [result_markdown(outcome.result)] if outcome.result.entries else []
    state = "complete" if outcome.complete else "incomplete"
    print(*table, *outcome.notes, f"{state}: {outcome.result.path}", sep="\n")
    return 0 if outcome.complete else INCOMPLETE


def bench_report(config: ReportConfig) -> int:
    """Write tables and plots of saved results; returns the exit code."""
    with optional_import():
        from adaskip.studies.bench.report import write_bench_report
    written = write_bench_report(given_or_default(config.results_dir, RESULTS_DIR))
    print(f"wrote {len(written)} files, first {written[0]}")
    return 0
