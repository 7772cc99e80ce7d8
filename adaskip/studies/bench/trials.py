"""What one cell does in one round, and what it reports: a mapping that goes into the result as it is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.calibration.measure import measure
from adaskip.core.blocks import execution_device, find_decoder
from adaskip.core.hf import CACHE
from adaskip.core.in_place_cache import InPlaceCache
from adaskip.core.plan import EMPTY_PLAN, KINDS, Budget, SkipPlan, Sublayer, check_phase
from adaskip.engines.fold import fold
from adaskip.strategies import FULL, FixedPlan, Strategy, build, needs_selection
from adaskip.studies.bench.plain_steps import NeverDrafting
from adaskip.studies.bench.settings import (
    ADASKIP,
    BREAKDOWN,
    COUNTS,
    EAGER,
    IN_PLACE,
    KV_CHECK,
    MEASURING_PREFILL,
    PATCHED,
    PLAIN_PREFILL,
    PLAIN_STEPS,
    WINDOWLESS,
    Cell,
    Clock,
    Workload,
)
from adaskip.studies.bench.subject import Subject
from adaskip.studies.bench.timing import (
    StaticCaches,
    Stopwatch,
    check_kv,
    compile_config,
    count_work,
    sublayer_times,
    timed_generation,
    undisturbed,
)
from adaskip.studies.bench.turns import in_turns, shared_copy, taking_turns
from adaskip.studies.engines.engines import ENGINE_MODES
from adaskip.studies.engines.processes import EngineProcesses

SEED = 0
WITHOUT_WINDOW = (WINDOWLESS, KV_CHECK, PLAIN_STEPS)
"""Cells that skip, or draft with, AdaSkip's sets without its learning window."""


@dataclass(frozen=True)
class Trials:
    """Runs the cells of one subject with one clock.

    keep_kv: every strategy skips only while the prompt is read. copies: of the model, for cells that run in turns.
    """

    subject: Subject
    clock: Clock
    static_caches: StaticCaches = field(default_factory=StaticCaches)
    engines: EngineProcesses | None = None
    keep_kv: bool = False
    copies: list[PreTrainedModel] = field(default_factory=list)

    def run(self, cell: Cell, workload: Workload) -> dict[str, Any]:
        """Run `cell` on `workload` and return what it measured. Raises torch's error if memory is insufficient."""
        ids, model = self.prompts(workload), self.subject.model
        if cell.mode in ENGINE_MODES:
            assert self.engines is not None, "started if a mode is an engine"
            strategy = self.strategy(cell, workload)
            plan = EMPTY_PLAN if strategy is None else strategy.skipped
            return self.engines.run(cell.mode, plan, ids.tolist(), workload.new_tokens, self.clock)
        if cell.name == BREAKDOWN:
            return self._breakdown(ids, workload)
        if cell.name == COUNTS:
            both = {name: self.strategy(Cell(name), workload) for name in (FULL, PATCHED)}
            return {name: count_work(model, strategy, ids) for name, strategy in both.items()}
        if cell.name == KV_CHECK:
            strategy = self.strategy(cell, workload)
            assert strategy is not None, "it skips attention"
            return check_kv(model, strategy, ids, workload.new_tokens)
        if cell.name in (PLAIN_PREFILL, MEASURING_PREFILL):
            return self._prefill(cell, ids)
        if cell.name == PLAIN_STEPS:
            strategy = self.strategy(cell, workload)
            assert strategy is not None, "it drafts"
            decoder = NeverDrafting.with_strategy(model, strategy)
            timed = timed_generation(model, None, ids, workload.new_tokens, self.clock, custom_generate=decoder)
            assert len(timed.steps_s) == workload.decode_steps, "no draft, so every token has a step"
            return timed.to_dict()
        return self._generation(cell, ids, workload)

    def run_in_turns(self, cells: Sequence[Cell], workload: Workload) -> list[dict[str, Any]]:
        """Run `cells` at once on `workload`, in turns, and return what each measured, in order."""

        def work(cell: Cell, model: PreTrainedModel, pass_on: Callable[[], None]) -> dict[str, Any]:
            own = replace(self, subject=replace(self.subject, model=model))
            with taking_turns(model, pass_on):
                return own.run(cell, workload)

        while len(self.copies) < len(cells):
            self.copies.append(shared_copy(self.subject.model))
        with undisturbed(self.subject.model.device):
            return in_turns([partial(work, cell, model) for cell, model in zip(cells, self.copies, strict=False)])

    def strategy(self, cell: Cell, workload: Workload) -> Strategy | None:
        """The strategy of a cell; None for the stock model. Raises ValueError for an impossible budget.

        SkipDecode's schedule spans the new tokens of the workload, so that a short run goes through all of it. Without
        a selection, strategy calibrated is replaced by AdaSkip without its window: another set, the same work. Engines
        take only strategies with a constant plan.
        """
        num_layers = self.subject.num_layers
        if cell.name in (FULL, BREAKDOWN, COUNTS, IN_PLACE, PLAIN_PREFILL, MEASURING_PREFILL):
            return None
        if cell.name == PATCHED:
            return FixedPlan(num_layers=num_layers, plan=EMPTY_PLAN)
        phase = check_phase(cell.phase)
        searched = cell.name not in WITHOUT_WINDOW and needs_selection(cell.name)
        selection = self.subject.selections.get((cell.name, phase)) if searched else None
        windowless = cell.name in WITHOUT_WINDOW or (searched and selection is None)
        strategy = build(
            ADASKIP if windowless else cell.name,
            phase=phase,
            budget=Budget(sublayers=cell.sublayers),
            num_layers=num_layers,
            profile=selection or self.subject.profile,
            max_decode_steps=workload.new_tokens,
            keep_kv=self.keep_kv,
            **({"learning_window": 0} if windowless else {}),
        )
        if cell.mode in ENGINE_MODES and strategy is not None:
            fold(strategy)
        return strategy

    def prompts(self, workload: Workload) -> Tensor:
        """Random token ids [B, S], the same in every cell and round."""
        model, generator = self.subject.model, torch.Generator().manual_seed(SEED)
        size = (workload.batch_size, workload.prompt_tokens)
        embeddings: Any = model.get_input_embeddings()
        return torch.randint(embeddings.num_embeddings, size, generator=generator).to(execution_device(model))

    def _generation(self, cell: Cell, ids: Tensor, workload: Workload) -> dict[str, Any]:
        """Time a generation in the cell's mode, and find the share of forwards in which each sublayer was skipped."""
        strategy, model, options = self.strategy(cell, workload), self.subject.model, {}
        if cell.name == IN_PLACE:
            options = {CACHE: InPlaceCache(config=model.config)}
        if cell.mode != EAGER:
            cache = self.static_caches.emptied(cell, workload, model)
            options = {CACHE: cache, "compile_config": compile_config()}
        timed = timed_generation(model, strategy, ids, workload.new_tokens, self.clock, **options)
        assert len(timed.steps_s) == workload.decode_steps, "an answer has its full length"
        measured = timed.to_dict()
        if strategy is not None and timed.trace is not None:
            plans = decode_plans(strategy, workload.decode_steps, timed.trace.online_ffns)
            measured["prefill_shares"] = shares([strategy.prefill_plan], strategy.num_layers)
            measured["decode_shares"] = shares(plans, strategy.num_layers)
        return measured

    def _breakdown(self, ids: Tensor, workload: Workload) -> dict[str, Any]:
        """Seconds of each sublayer in the prompt's forward and in a decode step (median over the steps)."""
        timed, forwards = sublayer_times(self.subject.model, ids, workload.new_tokens, self.clock)
        prefill, decode = forwards[0], [statistics.median(times) for times in zip(*forwards[1:], strict=True)]
        return {**timed.to_dict(), "prefill_sublayers_s": _by_kind(prefill), "decode_sublayers_s": _by_kind(decode)}

    @torch.no_grad()
    def _prefill(self, cell: Cell, ids: Tensor) -> dict[str, Any]:
        """Time a prompt through the decoder without cache and logits, as in calibration, with or without measuring."""
        stopwatch = Stopwatch(ids.device, self.clock)
        with undisturbed(ids.device):
            stopwatch.mark()
            if cell.name == MEASURING_PREFILL:
                for measured in measure(self.subject.model, list(ids), batch_size=len(ids)):
                    measured.means()
            else:
                find_decoder(self.subject.model)(input_ids=ids, use_cache=False)
            stopwatch.mark()
            return {"prefill_s": stopwatch.laps()[0]}


def _by_kind(times: Sequence[float]) -> dict[str, list[float]]:
    return {"attention": list(times[::2]), "ffn": list(times[1::2])}


def decode_plans(strategy: Strategy, steps: int, online_ffns: Collection[int]) -> list[SkipPlan]:
    """The plan of each decode step of a request, given the FFNs added after its learning window.

    An attention that was skipped in the prompt has no K/V and stays skipped.
    """
    floor, joined, plans = strategy.prefill_plan.attention_only(), SkipPlan(ffn=frozenset(online_ffns)), []
    for step in range(1, steps + 1):
        plan = strategy.decode_plan(step).union(floor)
        floor = plan.attention_only()
        plans.append(plan.union(joined) if step > strategy.window_tokens else plan)
    return plans


def shares(plans: Collection[SkipPlan], num_layers: int) -> dict[str, list[float]]:
    """The share of plans in which each sublayer is skipped: kind -> [M]."""
    return {
        kind: [sum(Sublayer(kind, layer) in plan for plan in plans) / max(len(plans), 1) for layer in range(num_layers)]
        for kind in KINDS
    }
