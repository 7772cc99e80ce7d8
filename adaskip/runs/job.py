"""What a run has to do, worked out from its configuration before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from adaskip.longbench import TaskSpec, get_task
from adaskip.runs.cells import Cell
from adaskip.runs.config import RunConfig
from adaskip.runs.folder import RunFolder
from adaskip.runs.sources import Sample, num_layers, scored_samples
from adaskip.strategies import AdaSkip


@dataclass(frozen=True)
class Part:
    """One task of a job: its samples in the data's order, and how many tokens each may generate."""

    name: str
    task: TaskSpec
    samples: tuple[Sample, ...]
    max_new_tokens: int

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
    setup = config.setup
    phase = setup.phases[config.phase]
    limit = None if config.subset else config.limit or phase.limit
    cell = find_cell(config)
    return Job(
        config=config,
        cell=cell,
        folder=RunFolder(cell.folder(config.runs_dir)),
        parts=tuple(_find_part(config, name, limit, phase.max_new_tokens) for name in config.tasks or phase.tasks),
        limit=limit,
        subset=config.subset,
        batch_size=config.batch_size or setup.batch_size,
    )


def _find_part(config: RunConfig, name: str, limit: int | None, phase_cap: int) -> Part:
    task = get_task(name)
    cap = config.max_new_tokens or min(phase_cap, task.max_new_tokens)
    return Part(name, task, scored_samples(config, name, limit=limit, subset=config.subset), cap)


def find_cell(config: RunConfig) -> Cell:
    """The cell a configuration fills; a budget given as alpha depends on the model's depth and loads the model."""
    return Cell(config.model, config.phase, config.strategy, _num_sublayers(config))


def _num_sublayers(config: RunConfig) -> int:
    budget = config.skip_budget
    if budget is None:
        return 0
    if budget.alpha is None:
        return budget.sublayers if budget.sublayers is not None else 2 * (budget.layers or 0)
    layers = num_layers(config, config.model)
    if config.strategy == AdaSkip.name:
        return budget.num_sublayers(layers)
    return 2 * budget.num_whole_layers(layers, most=layers)
