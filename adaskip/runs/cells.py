"""Cells (one model with one strategy in one phase at one budget), the names of their runs, and the setup of phases.

Run names are those of the paper's artifact (`llama-EE-PREFILL`); `configs/phases.yaml` defines what a phase runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaskip.benchmarks.protocol import BENCHMARKS, DEFAULT, Task
from adaskip.common.choices import check_choice
from adaskip.common.configs import load_yaml
from adaskip.common.plugins import PLUGINS
from adaskip.core.plan import PHASES
from adaskip.models.registry import registry
from adaskip.strategies import phases_of
from adaskip.strategies.names import SHORT_NAMES

MODELS = ("llama", "internlm", "vicuna")
"""The models of the paper. Any other model is named after its entry in `configs/models.yaml`, or after its weights."""


@dataclass(frozen=True)
class Cell:
    """One entry of a results table: a model, phase, strategy and budget."""

    model: str
    phase: str
    strategy: str
    sublayers: int
    """Number of skipped sublayers; always 0 for the full model."""

    def __post_init__(self) -> None:
        check_choice("phase", self.phase, PHASES)
        check_choice("strategy", self.strategy, SHORT_NAMES)
        if self.sublayers < 0 or (self.sublayers and self.strategy == "full"):
            allowed = "0" if self.strategy == "full" else "at least 0"
            raise ValueError(f"strategy {self.strategy!r} cannot skip {self.sublayers} sublayers; allowed: {allowed}")

    @property
    def run_name(self) -> str:
        """The run name of the artifact, e.g. `llama-EE-PREFILL`; it does not contain the budget."""
        return run_name(self.model, self.phase, self.strategy)

    @property
    def label(self) -> str:
        """Run name and budget, e.g. `llama-EE-PREFILL/8-sublayers`: the folder below the output directory."""
        return f"{self.run_name}/{self.sublayers}-sublayers"

    def folder(self, output_dir: str | Path) -> Path:
        return Path(output_dir) / self.label


def run_name(model: str, phase: str, strategy: str) -> str:
    """`llama-EE-PREFILL` for ("llama", "prefill", "early_exit")."""
    return f"{model}-{SHORT_NAMES[strategy]}-{phase.upper()}"


def parse_run_name(name: str) -> tuple[str, str, str]:
    """(model, phase, strategy) of a run name.

    Case is ignored in the last two parts and in the names of `configs/models.yaml`. Other models are named after their
    weights, so their names may contain hyphens, dots and capitals.

    Raises:
        ValueError: not of the form `<model>-<EE|SD|US|ADA|...>-<PREFILL|DECODE|E2E>`.
    """
    strategies = {short: strategy for strategy, short in SHORT_NAMES.items()}
    model, short, phase = ["", "", "", *name.rsplit("-", 2)][-3:]
    if not model or short.upper() not in strategies or phase.lower() not in PHASES:
        raise ValueError(
            f"{name!r} is not a run name: expected <model>-<{'|'.join(strategies)}>-<{'|'.join(PHASES).upper()}>, "
            f"e.g. llama-EE-PREFILL; to use strategies of other packages, list their modules in {PLUGINS}"
        )
    model = model.lower() if model.lower() in registry() else model
    return model, phase.lower(), strategies[short.upper()]


def grid(
    models: Iterable[str], phases: Iterable[str], strategies: Iterable[str], budgets: Iterable[int]
) -> Iterator[Cell]:
    """Every cell, ordered by model, phase, strategy, budget; the full model once per phase.

    Strategies have no cells of phases that they are not defined for.
    """
    strategies, budgets = tuple(strategies), tuple(budgets)
    for model in models:
        for phase in phases:
            for strategy in (name for name in strategies if phase in phases_of(name)):
                for sublayers in (0,) if strategy == "full" else budgets:
                    yield Cell(model, phase, strategy, sublayers)


def undefined(phases: Iterable[str], strategies: Iterable[str]) -> list[str]:
    """What a grid leaves out: each strategy in each phase that it is not defined for, e.g. `pop in phase decode`."""
    phases = tuple(phases)
    return [f"{name} in phase {phase}" for name in strategies for phase in phases if phase not in phases_of(name)]


@dataclass(frozen=True)
class PhaseSpec:
    """Tasks, answer cap and sample limit of one phase of the experiments."""

    tasks: tuple[str, ...]
    max_new_tokens: int
    limit: int | None

    def cap(self, task: Task) -> int:
        """Most new tokens of an answer to a task."""
        return min(self.max_new_tokens, task.max_new_tokens)


@dataclass(frozen=True)
class Setup:
    """A protocol: one block of `configs/phases.yaml`, which explains the fields. records: options of the benchmark."""

    name: str
    num_layers: int
    budgets: tuple[int, ...]
    batch_size: int
    calibration_task: str
    calibration_samples: int
    search_samples: int
    search_prompt_tokens: int | None
    phases: dict[str, PhaseSpec]
    records: dict[str, Any]
    longest_prompt_tokens: int | None
    dtype: str | None

    def budgets_for(self, num_layers: int) -> tuple[int, ...]:
        """The budgets, in sublayers, for a model of `num_layers` layers, scaled and rounded to whole layers."""
        if num_layers == self.num_layers:
            return self.budgets
        layers = (round(budget / 2 * num_layers / self.num_layers) for budget in self.budgets)
        return tuple(dict.fromkeys(2 * max(1, count) for count in layers))


def protocols(benchmark: str | None = None) -> tuple[str, ...]:
    """The protocols of `configs/phases.yaml`, all or those of a benchmark, its default first."""
    blocks = {name: block for name, block in load_yaml("phases").items() if "phases" in block}
    owners = {name: block.get("benchmark", DEFAULT) for name, block in blocks.items()}
    return tuple(name for name, owner in owners.items() if benchmark in (None, owner))


def find_setup(benchmark: str, protocol: str | None = None) -> Setup:
    """A protocol of a benchmark, or its default one; of one without any in `configs/phases.yaml` the paper's budgets,
    and all of its tasks in every phase."""
    if known := protocols(benchmark):
        return load_setup(protocol if protocol in known else known[0])
    tasks = BENCHMARKS.find(benchmark).tasks
    spec = PhaseSpec(tuple(task.name for task in tasks), max(task.max_new_tokens for task in tasks), limit=None)
    phases = dict.fromkeys(PHASES, spec)
    return replace(load_setup("paper"), name=benchmark, calibration_task=tasks[0].name, phases=phases, records={})


def load_setup(name: str) -> Setup:
    """Read a protocol of `configs/phases.yaml`; ValueError for an unknown name."""
    check_choice("protocol", name, protocols())
    block = load_yaml("phases")[name]
    calibration, search = block["calibration"], block.get("search", {})
    phases = {
        phase: PhaseSpec(tuple(spec["tasks"]), spec["max_new_tokens"], spec["limit"])
        for phase, spec in block["phases"].items()
    }
    return Setup(
        name=name,
        num_layers=block["num_layers"],
        budgets=tuple(block["budgets"]),
        batch_size=block["batch_size"],
        calibration_task=calibration["task"],
        calibration_samples=calibration["samples"],
        search_samples=search.get("samples", calibration["samples"]),
        search_prompt_tokens=search.get("prompt_tokens"),
        phases=phases,
        records=block.get("records", {}),
        longest_prompt_tokens=block.get("longest_prompt_tokens"),
        dtype=block.get("dtype"),
    )
