"""Cells (one model with one strategy in one phase at one budget), the names of their runs, and the setup of phases.

Run names are those of the paper's artifact (`llama-EE-PREFILL`); `configs/phases.yaml` defines what a phase runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from adaskip.common.choices import check_choice
from adaskip.common.configs import load_yaml
from adaskip.core.plan import PHASES
from adaskip.models.registry import registry
from adaskip.strategies.names import SHORT_NAMES
from adaskip.strategies.registry import PLUGINS

MODELS = ("llama", "internlm", "vicuna")
"""The models of the paper. Any other model is named after its entry in `configs/models.yaml`, or after its weights."""

PAPER, TESTBED = "paper", "testbed"
"""The protocol of a model for which `configs/models.yaml` names none, and the block of the embedded models."""


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
    """Every cell, ordered by model, phase, strategy, budget; the full model once per phase."""
    budgets = tuple(budgets)
    for model in models:
        for phase in phases:
            for strategy in strategies:
                for sublayers in (0,) if strategy == "full" else budgets:
                    yield Cell(model, phase, strategy, sublayers)


@dataclass(frozen=True)
class PhaseSpec:
    """Tasks, answer cap and sample limit of one phase of the experiments."""

    tasks: tuple[str, ...]
    max_new_tokens: int
    limit: int | None


@dataclass(frozen=True)
class Setup:
    """One block of `configs/phases.yaml`, which explains the fields: a protocol of real models, or the testbed."""

    name: str
    num_layers: int
    budgets: tuple[int, ...]
    batch_size: int
    calibration_task: str
    calibration_samples: int
    search_samples: int
    search_prompt_tokens: int | None
    phases: dict[str, PhaseSpec]
    longbench_set: str
    min_length: int
    longest_prompt_tokens: int | None
    dtype: str | None

    def budgets_for(self, num_layers: int) -> tuple[int, ...]:
        """The budgets, in sublayers, for a model of `num_layers` layers, scaled and rounded to whole layers."""
        if num_layers == self.num_layers:
            return self.budgets
        layers = (round(budget / 2 * num_layers / self.num_layers) for budget in self.budgets)
        return tuple(dict.fromkeys(2 * max(1, count) for count in layers))


def protocols() -> tuple[str, ...]:
    """The protocols of `configs/phases.yaml` for real checkpoints."""
    return tuple(name for name, block in load_yaml("phases").items() if "phases" in block and name != TESTBED)


def load_setup(name: str) -> Setup:
    """Read a protocol of `configs/phases.yaml`, or its block `testbed`; ValueError for an unknown name."""
    check_choice("protocol", name, (*protocols(), TESTBED))
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
        longbench_set=block.get("longbench_set", "auto"),
        min_length=block.get("min_length", 0),
        longest_prompt_tokens=block.get("longest_prompt_tokens"),
        dtype=block.get("dtype"),
    )
