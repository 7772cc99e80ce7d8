"""What a run has to do, worked out from its configuration before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from adaskip.benchmarks.longbench import TaskSpec, get_task
from adaskip.runs.cells import Cell, grid
from adaskip.runs.config import GridConfig, RunConfig, WorkConfig
from adaskip.runs.folder import RunFolder
from adaskip.runs.sources import Sample, num_layers, scored_samples, set_name
from adaskip.strategies import FULL, strategy_class


@dataclass(frozen=True)
class Part:
    """One task of a job: its samples in the data's order, and how many tokens each may generate.

    set_name: the set of LongBench that they are of, `trec` or `trec_e`; None on the testbed.
    """

    name: str
    task: TaskSpec
    samples: tuple[Sample, ...]
    max_new_tokens: int
    set_name: str | None

    @property
    def ids(self) -> list[str]:
        return [sample["_id"] for sample in self.samples]


@dataclass(frozen=True)
class Job:
    """A cell, the folder it fills, and the work of filling it."""

    config: RunConfig
    cell: Cell
    folder: RunFolder
    parts: tuple[Part, ...]
    limit: int | None
    subset: int | None
    batch_size: int

    @property
    def num_samples(self) -> int:
        return sum(len(part.samples) for part in self.parts)


def find_job(config: RunConfig) -> Job:
    """Resolve a configuration: what it leaves open is taken from `configs/phases.yaml`."""
    assert config.target_speedup is None, "the budget is chosen first (adaskip.runs.speedup)"
    config = _with_budget(config)
    cell = find_cell(config)
    return Job(
        config=config,
        cell=cell,
        folder=RunFolder(cell.folder(config.runs_dir)),
        parts=find_parts(config),
        limit=_limit(config),
        subset=config.subset,
        batch_size=batch_size_of(config),
    )


def find_parts(config: RunConfig) -> tuple[Part, ...]:
    """The tasks of a configuration with their samples; its budget does not matter."""
    return tuple(_find_part(config, name) for name in tasks_of(config))


def _find_part(config: RunConfig, name: str) -> Part:
    samples = scored_samples(
        config, name, _limit(config), config.subset, min_length=config.min_length or None, extended=config.extended
    )
    return Part(name, get_task(name), samples, answer_cap(config, name), set_name(config, name, config.extended))


def tasks_of(config: RunConfig) -> tuple[str, ...]:
    """The tasks a run is scored on."""
    return config.tasks or config.setup.phases[config.phase].tasks


def batch_size_of(config: RunConfig) -> int:
    """Samples generated together."""
    return config.batch_size or config.setup.batch_size


def answer_cap(config: RunConfig, task: str) -> int:
    """How many tokens a task's answers may have."""
    return config.max_new_tokens or min(config.setup.phases[config.phase].max_new_tokens, get_task(task).max_new_tokens)


def num_wanted(config: RunConfig) -> int | None:
    """How many samples of each task are asked for; None for all."""
    return config.subset or _limit(config)


def _limit(config: RunConfig) -> int | None:
    return None if config.subset else config.limit or config.setup.phases[config.phase].limit


def find_cell(config: RunConfig) -> Cell:
    """The cell a configuration fills; no model is loaded."""
    return Cell(config.model, config.phase, config.strategy, _num_sublayers(_with_budget(config)))


def find_cells(config: GridConfig) -> list[RunConfig]:
    """One configuration per cell of the grid, ordered by model, phase, strategy and budget."""
    shared: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(WorkConfig)}
    shared["output_dir"] = str(config.runs_dir)  # the processes that run the cells need not know it
    return [
        RunConfig(**shared, model=cell.model, phase=cell.phase, strategy=cell.strategy, budget=cell.sublayers or None)
        for model in config.models
        for cell in grid((model,), config.phases, config.strategies, config.budgets or _budgets(config, model))
    ]


def _budgets(config: WorkConfig, model: str) -> tuple[int, ...]:
    return config.setup.budgets_for(num_layers(config, model))


def _with_budget(config: RunConfig) -> RunConfig:
    """The configuration with the setup's smallest budget where it gives none."""
    if config.strategy == FULL or config.skip_budget is not None:
        return config
    return replace(config, budget=min(_budgets(config, config.model)))


def _num_sublayers(config: RunConfig) -> int:
    budget = config.skip_budget
    if budget is None:
        return 0
    layers = num_layers(config, config.model)
    if budget.alpha is not None and strategy_class(config.strategy).whole_layers:
        return 2 * budget.num_whole_layers(layers, most=layers)
    return budget.num_sublayers(layers)
