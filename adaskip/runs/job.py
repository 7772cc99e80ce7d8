"""Resolves the configuration of a run once, before any model is loaded, into a `Job`.

Only `resolve` interprets a `RunConfig`; all other code reads the `Job`.
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
from adaskip.profiles.selection import METHODS, SEARCH, SelectionProfile
from adaskip.runs.calibration import Calibration, find_calibration
from adaskip.runs.cells import Cell, grid
from adaskip.runs.config import GridConfig, RunConfig, WorkConfig
from adaskip.runs.folder import RunFolder
from adaskip.runs.loading import Loading, find_loading
from adaskip.runs.records import Records, Sample, find_records, prompt_ids
from adaskip.strategies import FULL, needs_profile, profile_type, selection_method, strategy_class

Profile = ImportanceProfile | SelectionProfile


@dataclass(frozen=True)
class Part:
    """One task of a job: its samples in the order of the data, and the cap of new tokens per sample."""

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
        """The task's template; the prompts themselves if the benchmark builds prompts in another way."""
        if type(self.benchmark).prompt is Benchmark.prompt:
            return self.task.template
        return [self.benchmark.prompt(self.name, sample) for sample in self.samples]

    def prompt_ids(self, batch: Sequence[Sample], loaded: LoadedModel) -> list[Tensor]:
        """The prompts of the samples in `batch`: token ids, each 1-D."""
        return prompt_ids(self.benchmark, self.name, batch, loaded)


@dataclass(frozen=True)
class SpeedupAsked:
    """The value of `--target-speedup`. on: the device of the prediction, None for this machine."""

    speedup: float
    on: str | None


@dataclass(frozen=True)
class Job:
    """A cell with everything that is needed to run it. Files are read at most once, at first use.

    protocol: its name in `configs/phases.yaml`. sublayers: the budget; None until one is chosen for a target speedup.
    answer_caps: maximum new tokens by task. calibration: the calibration data, None if the strategy uses no profile.
    budgets: those of the protocol for this depth, in sublayers. profile_name: the value of `--profile`, None if it is
    not given or the strategy uses no profile.
    """

    protocol: str
    strategy: str
    phase: Phase
    sublayers: int | None
    speedup: SpeedupAsked | None
    strategy_options: dict[str, bool | int | float | str | None]
    compensation: str
    loading: Loading
    records: Records
    answer_caps: dict[str, int]
    limit: int | None
    subset: int | None
    batch_size: int
    seed: int
    runs_dir: Path
    calibration: Calibration | None
    budgets: tuple[int, ...]
    profile_name: str | None
    allow_other_weights: bool

    @property
    def cell(self) -> Cell:
        """The cell of the results tables that this job is for."""
        assert self.sublayers is not None, "the budget is chosen first (adaskip.runs.speedup)"
        return Cell(self.loading.source.name, self.phase, self.strategy, self.sublayers)

    @property
    def folder(self) -> RunFolder:
        """The folder of its records."""
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
        """Requested number of samples per task; None for all."""
        return self.subset or self.limit

    @property
    def profile_kind(self) -> type[ImportanceProfile] | type[SelectionProfile] | None:
        """The class of the profile that the strategy needs; None if it needs none."""
        return profile_type(self.strategy)

    @property
    def selection_method(self) -> str | None:
        """The method by which a selection is made; None if the strategy needs no selection."""
        return selection_method(self.strategy)

    @property
    def keeps_kv(self) -> bool:
        """Whether `--keep-kv` is given."""
        return bool(self.strategy_options.get("keep_kv"))

    @property
    def searches_kept_kv(self) -> bool:
        """Whether the run uses a selection that is searched with keep_kv; other methods' sets are as without it."""
        return self.keeps_kv and self.selection_method == SEARCH and self.profile_name is None

    @property
    def up_to(self) -> int:
        """Size of the largest set if a selection is made."""
        return max(self.sublayers or 0, *self.budgets)

    @property
    def counts(self) -> list[int]:
        """The numbers of sublayers for which the strategy's method makes sets."""
        assert self.selection_method is not None, "of a strategy that needs a selection"
        method = METHODS[self.selection_method]
        if not method.one_by_one:
            return method.counts(self.up_to)
        return list(self.budgets) if self.sublayers in (None, 0, *self.budgets) else [self.sublayers]

    @cached_property
    def given_profile(self) -> Profile | None:
        """The profile given by `--profile`, whichever model it was made for; None if none is given or used.

        Raises:
            ValueError: there is no such file, or it is not a profile of the class that the strategy needs.
        """
        if self.profile_name is None or (kind := self.profile_kind) is None:
            return None
        return kind.load(find_profile(self.profile_name, kind))

    def with_sublayers(self, sublayers: int) -> Job:
        """The job with the budget that was chosen for the target speedup."""
        return replace(self, sublayers=sublayers, speedup=None)


def find_profile(name: str, kind: type[Profile], option: str = "--profile") -> Path:
    """The file that an option names: a path, a published name, or a repository. ValueError if there is none."""
    try:
        return find_file(name, kind.FILE)
    except FileNotFoundError as error:
        raise ValueError(f"{option} {name} does not exist; `adaskip calibrate` makes one ({error})") from None


def resolve(config: RunConfig) -> Job:
    """The job of a configuration; defaults are taken from `configs/phases.yaml`.

    The only file that is read is the checkpoint's config.json.

    Raises:
        ValueError: the model is not available, or the budget is too large for its depth.
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
        compensation=config.compensation,
        loading=loading,
        records=records,
        answer_caps=caps,
        limit=None if config.subset else config.limit or spec.limit,
        subset=config.subset,
        batch_size=config.batch_size or setup.batch_size,
        seed=config.seed,
        runs_dir=config.runs_dir,
        calibration=find_calibration(config, records, tasks) if wants_profile else None,
        budgets=budgets,
        profile_name=config.profile if wants_profile else None,
        allow_other_weights=config.allow_other_weights,
    )


def _sublayers(config: RunConfig, num_layers: int, budgets: tuple[int, ...]) -> int:
    """The budget in sublayers, by default the smallest of the protocol; ValueError if it is too large."""
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
    """A fraction of all sublayers, rounded to sublayers or, for `whole_layers`, to whole layers; in sublayers.

    Raises:
        ValueError: the result is none or all of the sublayers.
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
    shared["output_dir"] = str(config.runs_dir)  # so that worker processes do not depend on the current folder
    return [
        RunConfig(**shared, model=model, phase=cell.phase, strategy=cell.strategy, budget=cell.sublayers or None)
        for model in config.models
        for cell in grid((model,), config.phases, config.strategies, config.budgets or _budgets(config, model))
    ]


def _budgets(config: WorkConfig, model: str) -> tuple[int, ...]:
    loading = find_loading(config, model)
    return config.setup_of(loading.source.entry).budgets_for(loading.num_layers)
