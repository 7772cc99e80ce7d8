"""What one cell does in one round, and what it reports: a mapping that goes into the result as it is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaskip.calibration.measure import measure
from adaskip.core.blocks import execution_device, find_decoder
from adaskip.core.plan import EMPTY_PLAN, Budget, check_phase
from adaskip.engines.fold import fold
from adaskip.strategies import FULL, FixedPlan, Strategy, build, needs_selection
from adaskip.studies.bench.cells import (
    ADASKIP,
    BREAKDOWN,
    COUNTS,
    EAGER,
    KV_CHECK,
    MEASURING_PREFILL,
    PATCHED,
    PLAIN_PREFILL,
    WINDOWLESS,
    Cell,
    Workload,
)
from adaskip.studies.bench.counts import count_work
from adaskip.studies.bench.generation import StaticCaches, compile_config, sublayer_times, timed_generation, undisturbed
from adaskip.studies.bench.kv_check import check_kv
from adaskip.studies.bench.skip_sets import decode_plans, shares
from adaskip.studies.bench.stopwatch import Clock, Stopwatch
from adaskip.studies.bench.subject import Subject
from adaskip.studies.engines.engines import ENGINE_MODES
from adaskip.studies.engines.processes import EngineProcesses

SEED = 0


@dataclass(frozen=True)
class Trials:
    """Runs cells of one subject with one clock."""

    subject: Subject
    clock: Clock
    static_caches: StaticCaches = field(default_factory=StaticCaches)
    engines: EngineProcesses | None = None

    def run(self, cell: Cell, workload: Workload) -> dict[str, Any]:
        """What `cell` measures on `workload`. Raises torch's error if the memory is not enough."""
        if cell.mode in ENGINE_MODES:
            return self._in_engine(cell, workload)
        special: dict[str, Callable[[Cell, Workload], dict[str, Any]]] = {
            BREAKDOWN: self._breakdown,
            COUNTS: self._counts,
            KV_CHECK: self._kv,
            PLAIN_PREFILL: self._prefill,
            MEASURING_PREFILL: self._prefill,
        }
        return special.get(cell.name, self._generation)(cell, workload)

    def strategy(self, cell: Cell, workload: Workload) -> Strategy | None:
        """What a cell skips; None for the stock model. Raises ValueError for an impossible budget.

        SkipDecode's schedule spans the workload's new tokens, so that a short run goes through all of it. A
        strategy of a selection without one is AdaSkip without its window: another set, the same work. An engine
        refuses what changes between prompt and answer.
        """
        num_layers = self.subject.num_layers
        if cell.name in (FULL, BREAKDOWN, COUNTS, PLAIN_PREFILL, MEASURING_PREFILL):
            return None
        if cell.name == PATCHED:
            return FixedPlan(num_layers=num_layers, plan=EMPTY_PLAN)
        phase = check_phase(cell.phase)
        searched = cell.name not in (WINDOWLESS, KV_CHECK) and needs_selection(cell.name)
        selection = self.subject.selections.get(phase) if searched else None
        windowless = cell.name in (WINDOWLESS, KV_CHECK) or (searched and selection is None)
        strategy = build(
            ADASKIP if windowless else cell.name,
            phase=phase,
            budget=Budget(sublayers=cell.sublayers),
            num_layers=num_layers,
            profile=selection or self.subject.profile,
            max_decode_steps=workload.new_tokens,
            **({"learning_window": 0} if windowless else {}),
        )
        if cell.mode in ENGINE_MODES:
            assert strategy is not None
            fold(strategy)
        return strategy

    def prompts(self, workload: Workload) -> Tensor:
        """Random token ids [B, S], the same ones in every cell and round."""
        model, generator = self.subject.model, torch.Generator().manual_seed(SEED)
        size = (workload.batch_size, workload.prompt_tokens)
        embeddings: Any = model.get_input_embeddings()
        return torch.randint(embeddings.num_embeddings, size, generator=generator).to(execution_device(model))

    def _generation(self, cell: Cell, workload: Workload) -> dict[str, Any]:
        strategy = self.strategy(cell, workload)
        timed = timed_generation(
            self.subject.model,
            strategy,
            self.prompts(workload),
            workload.new_tokens,
            self.clock,
            **self._mode_options(cell, workload),
        )
        measured = timed.to_dict()
        if strategy is not None and timed.trace is not None:
            plans = decode_plans(strategy, workload.decode_steps, timed.trace.online_ffns)
            measured["prefill_shares"] = shares([strategy.prefill_plan], strategy.num_layers)
            measured["decode_shares"] = shares(plans, strategy.num_layers)
        return measured

    def _in_engine(self, cell: Cell, workload: Workload) -> dict[str, Any]:
        assert self.engines is not None, "made where a mode is an engine"
        strategy = self.strategy(cell, workload)
        plan = EMPTY_PLAN if strategy is None else strategy.skipped
        return self.engines.run(cell.mode, plan, self.prompts(workload).tolist(), workload.new_tokens, self.clock)

    def _mode_options(self, cell: Cell, workload: Workload) -> dict[str, Any]:
        """The arguments of `generate` that make it decode in the cell's mode."""
        if cell.mode == EAGER:
            return {}
        cache = self.static_caches.emptied(cell, workload, self.subject.model)
        return {"past_key_values": cache, "compile_config": compile_config()}

    def _breakdown(self, cell: Cell, workload: Workload) -> dict[str, Any]:
        """Seconds of each sublayer in the prompt's forward and, by medians over the steps, in a decode step."""
        timed, forwards = sublayer_times(self.subject.model, self.prompts(workload), workload.new_tokens, self.clock)
        prefill, decode = forwards[0], [statistics.median(times) for times in zip(*forwards[1:], strict=True)]
        return {**timed.to_dict(), "prefill_sublayers_s": _by_kind(prefill), "decode_sublayers_s": _by_kind(decode)}

    def _prefill(self, cell: Cell, workload: Workload) -> dict[str, Any]:
        """A prompt through the decoder without cache and logits, measured or not: what a calibration does."""
        ids, stopwatch = self.prompts(workload), Stopwatch(execution_device(self.subject.model), self.clock)
        with undisturbed(ids.device), torch.no_grad():
            stopwatch.mark()
            if cell.name == MEASURING_PREFILL:
                for measured in measure(self.subject.model, list(ids), batch_size=len(ids)):
                    measured.means()
            else:
                find_decoder(self.subject.model)(input_ids=ids, use_cache=False)
            stopwatch.mark()
            return {"prefill_s": stopwatch.laps()[0]}

    def _counts(self, cell: Cell, workload: Workload) -> dict[str, Any]:
        ids = self.prompts(workload)
        both = {name: self.strategy(Cell(name), workload) for name in (FULL, PATCHED)}
        return {name: count_work(self.subject.model, strategy, ids) for name, strategy in both.items()}

    def _kv(self, cell: Cell, workload: Workload) -> dict[str, Any]:
        strategy = self.strategy(cell, workload)
        assert strategy is not None
        return check_kv(self.subject.model, strategy, self.prompts(workload), workload.new_tokens)


def _by_kind(times: Sequence[float]) -> dict[str, list[float]]:
    return {"attention": list(times[::2]), "ffn": list(times[1::2])}
