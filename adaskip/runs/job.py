"""What a run has to do, worked out from its configuration once, before any model is loaded.

`resolve` is the one place that interprets a `RunConfig`; everything below takes what it needs from the `Job`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from adaskip.benchmarks.protocol import Benchmark, Task
from adaskip.common.named_files import find_file
from adaskip.core.plan import Phase, check_phase
from adaskip.models.loading import LoadedModel
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from adaskip.runs.calibration import Calibration, find_calibration
from adaskip.runs.cells import Cell, grid
from adaskip.runs.config import GridConfig, RunConfig, WorkConfig
from adaskip.runs.folder import RunFolder
from adaskip.runs.loading import Loading, find_loading
from adaskip.runs.records import Records, Sample, find_records, prompt_ids
from adaskip.strategies import FULL, needs_profile, needs_selection, profile_type, strategy_class

Profile = ImportanceProfile | SelectionProfile


@dataclass(frozen=True)
class Part:
    """One task of a job: its samples in the data's order, and how many tokens each may generate."""

    benchmark: Benchmark
    name: str
    samples: tuple[Sample, ...]
    max_new_tokens: int

    @property
    def task(self) -> Task:
        return self.benchmark.task(self.name)

    @property
    def ids(self) -> list[str]:
        return [sample["_id"] for sample in self.samples]

    @property
    def template(self) -> str | list[str]:
        """What makes its prompts of its samples: the task's template, or where that alone does not, the prompts."""
        if type(self.benchmark).prompt is Benchmark.prompt:
            return self.task.template
        return [self.benchmark.prompt(self.name, sample) for sample in self.samples]

    def prompt_ids(self, batch: Sequence[Sample], loaded: LoadedModel) -> list[Tensor]:
        """The prompts of some of its samples, token ids, 1-D."""
        return prompt_ids(self.benchmark, self.name, batch, loaded)


@dataclass(frozen=True)
class SpeedupAsked:
    """`--target-speedup`. on: the device it is predicted for, None for the present one."""

    speedup: float
    on: str | None


@dataclass(frozen=True)
class Job:
    """A cell, and all that is needed to fill its folder. What is read from files is read once, when first asked for.

    protocol: its name in `configs/phases.yaml`. sublayers: the budget; None while a speedup is asked for and not yet
    chosen for. answer_caps: most new tokens of each task's answers. calibration: what the profile is made on, None if
    the strategy uses none. up_to: the largest set of a selection that is searched. profile_name: the profile that is
    given and that the strategy uses.
    """

    protocol: str
    strategy: str
    phase: Phase
    sublayers: int | None
    speedup: SpeedupAsked | None
    strategy_options: dict[str, bool | int | float | str | None]
    loading: Loading
    records: Records
    answer_caps: dict[str, int]
    limit: int | None
    subset: int | None
    batch_size: int
    seed: int
    runs_dir: Path
    calibration: Calibration | None
    up_to: int
    profile_name: str | None
    allow_other_weights: bool

    @property
    def cell(self) -> Cell:
        """Which entry of the tables it fills."""
        assert self.sublayers is not None, "the budget is chosen first (adaskip.runs.speedup)"
        return Cell(self.loading.source.name, self.phase, self.strategy, self.sublayers)

    @property
    def folder(self) -> RunFolder:
        """Where its records go."""
        return RunFolder(self.cell.folder(self.runs_dir))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Its tasks with their samples.

        Raises:
            BenchmarkError: the data is missing or damaged, or has no such samples.
        """
        return tuple(
            Part(self.records.benchmark, task, self.records.scored(task, self.limit, self.subset), cap)
            for task, cap in self.answer_caps.items()
        )

    @property
    def num_samples(self) -> int:
        return sum(len(part.samples) for part in self.parts)

    @property
    def num_wanted(self) -> int | None:
        """How many samples of each task are asked for; None for all."""
        return self.subset or self.limit

    @property
    def profile_kind(self) -> type[ImportanceProfile] | type[SelectionProfile] | None:
        """The kind of profile that the strategy chooses by; None where it needs none."""
        return profile_type(self.strategy)

    @property
    def selection_phase(self) -> Phase | None:
        """The phase that a selection is searched for; None where the strategy needs none."""
        return self.phase if needs_selection(self.strategy) else None

    @cached_property
    def given_profile(self) -> Profile | None:
        """What `--profile` names, for whatever model it was made; None where it names nothing that the strategy uses.

        Raises:
            ValueError: there is no such file, or it is no profile of the strategy's kind.
        """
        if self.profile_name is None or (kind := self.profile_kind) is None:
            return None
        return kind.load(find_profile(self.profile_name, kind))

    def with_sublayers(self, sublayers: int) -> Job:
        """The job with the budget that was chosen for the speedup asked for."""
        return replace(self, sublayers=sublayers, speedup=None)


def find_profile(name: str, kind: type[Profile]) -> Path:
    """The file of what `--profile` names: a path, a published name, or a repository. ValueError if there is none."""
    try:
        return find_file(name, kind.FILE)
    except FileNotFoundError as error:
        raise ValueError(f"--profile {name} does not exist; `adaskip calibrate` makes one ({error})") from None


def resolve(config: RunConfig) -> Job:
    """What a configuration asks for; what it leaves open is taken from `configs/phases.yaml`.

    Of files, only the checkpoint's config.json is read.

    Raises:
        ValueError: the model is not there, or the budget is not one of a model of its depth.
    """
    loading = find_loading(config, config.model, config.max_prompt_tokens)
    loading.check_limit()
    setup = config.setup
    budgets = setup.budgets_for(loading.num_layers)
    sublayers = None if config.target_speedup is not None else _sublayers(config, loading.num_layers, budgets)
    wants_profile = needs_profile(config.strategy)
    phase, spec = check_phase(config.phase), setup.phases[config.phase]
    records = find_records(config, loading)
    tasks = config.tasks or spec.tasks
    caps = {name: config.max_new_tokens or spec.cap(records.benchmark.task(name)) for name in tasks}
    return Job(
        protocol=setup.name,
        strategy=config.strategy,
        phase=phase,
        sublayers=sublayers,
        speedup=None if config.target_speedup is None else SpeedupAsked(config.target_speedup, config.speedup_on),
        strategy_options=config.strategy_options,
        loading=loading,
        records=records,
        answer_caps=caps,
        limit=None if config.subset else config.limit or spec.limit,
        subset=config.subset,
        batch_size=config.batch_size or setup.batch_size,
        seed=config.seed,
        runs_dir=config.runs_dir,
        calibration=find_calibration(config, records, tasks) if wants_profile else None,
        up_to=max(sublayers or 0, *budgets),
        profile_name=config.profile if wants_profile else None,
        allow_other_weights=config.allow_other_weights,
    )


def _sublayers(config: RunConfig, num_layers: int, budgets: tuple[int, ...]) -> int:
    """The budget in sublayers, the setup's smallest where none is given; ValueError if the model cannot hold it."""
    if config.strategy == FULL:
        return 0
    whole_layers = strategy_class(config.strategy).whole_layers
    if config.fraction is not None:
        return fraction_of(config.fraction, num_layers, whole_layers=whole_layers)
    budget = config.skip_budget
    if budget is None:
        return min(budgets)
    if budget.alpha is not None and whole_layers:
        return 2 * budget.num_whole_layers(num_layers, most=num_layers)
    return budget.num_sublayers(num_layers)


def fraction_of(fraction: float, num_layers: int, *, whole_layers: bool) -> int:
    """The nearest number of sublayers to a fraction of all of them; of whole layers, two for each.

    Raises:
        ValueError: that is none at all, or all.
    """
    unit = 2 if whole_layers else 1
    count = unit * round(fraction * 2 * num_layers / unit)
    most = 2 * num_layers - unit
    if not 0 < count <= most:
        raise ValueError(
            f"--fraction {fraction:g} of {2 * num_layers} sublayers ({num_layers} layers) is "
            f"{'none' if not count else 'all of them'} to the nearest {'layer' if whole_layers else 'sublayer'}; "
            f"allowed: {unit / (2 * num_layers):.4g} to {most / (2 * num_layers):.4g}"
        )
    return count


def find_cells(config: GridConfig) -> list[RunConfig]:
    """One configuration per cell of the grid, ordered by model, phase, strategy and budget."""
    shared: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(WorkConfig)}
    shared["output_dir"] = str(config.runs_dir)  # the processes that run the cells need not know it
    return [
        RunConfig(**shared, model=model, phase=cell.phase, strategy=cell.strategy, budget=cell.sublayers or None)
        for model in config.models
        for cell in grid((model,), config.phases, config.strategies, config.budgets or _budgets(config, model))
    ]


def _budgets(config: WorkConfig, model: str) -> tuple[int, ...]:
    loading = find_loading(config, model)
    return config.setup_of(loading.source.entry).budgets_for(loading.num_layers)
