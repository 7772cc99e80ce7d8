"""What an observation script may be told, and what `configs/observations.yaml` says where it is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from adaskip.common.choices import check_choice
from adaskip.common.configs import load_yaml
from adaskip.common.options import option
from adaskip.common.paths import default_path
from adaskip.runs.cells import MODELS
from adaskip.runs.config import SharedConfig

ALL = "all"
MEASUREMENTS = "measurements"
"""Folder of what was measured, below the output folder."""


@dataclass(frozen=True)
class Target:
    """What is measured: a task's prompts, or the answers to them."""

    task: str
    phase: Literal["prefill", "decode"]

    @property
    def folder_name(self) -> str:
        return f"{self.task}-{self.phase}"


@dataclass(frozen=True)
class CheckSpec:
    """What the importance check runs."""

    phase: str
    tasks: tuple[str, ...]
    layers: tuple[int, ...]
    limit: int


@dataclass(frozen=True)
class ObservationSetup:
    """One block of `configs/observations.yaml`."""

    limit: int
    batch_size: int
    tasks: Mapping[str, tuple[str, ...]]
    """By figure: ob1, ob2, ob3."""
    table1: tuple[tuple[str, str], ...]
    table2: tuple[str, ...]
    stand_ins: Mapping[str, str]
    check: CheckSpec
    windows: tuple[int, ...]


def load_observations(name: str) -> ObservationSetup:
    """A benchmark's block of `configs/observations.yaml`; ValueError if it has none."""
    content = load_yaml("observations")
    block = content[check_choice("benchmark of the observations", name, [key for key in content if key != "windows"])]
    check = block["importance_check"]
    return ObservationSetup(
        limit=block["limit"],
        batch_size=block["batch_size"],
        tasks={figure: tuple(block[figure]) for figure in ("ob1", "ob2", "ob3")},
        table1=tuple((first, second) for first, second in block["table1"]),
        table2=tuple(block["table2"]),
        stand_ins=block["stand_ins"],
        check=CheckSpec(check["phase"], tuple(check["tasks"]), tuple(check["layers"]), check["limit"]),
        windows=tuple(content["windows"]),
    )


@dataclass(frozen=True, kw_only=True)
class ObserveConfig(SharedConfig):
    """The options of every script in `observations/`."""

    models: tuple[str, ...] = option(f"of {', '.join(MODELS)}, or {ALL}", (ALL,), aliases=["--model"])
    tasks: tuple[str, ...] | None = option("tasks instead of the observation's own")
    limit: int | None = option("samples of each task; if not given, the setup's")
    batch_size: int | None = option("samples measured together; if not given, the setup's")
    max_new_tokens: int | None = option("most tokens of an answer; if not given, the task's and setup's cap")
    max_prompt_tokens: int | None = option("cut prompts to so many tokens; if not given, the model's limit")
    output_dir: str | None = option(
        "where everything goes; if not given, results/observations, or results/testbed/observations with --testbed; "
        "below that a folder with the checkpoint's name where there is --checkpoint"
    )
    draw_only: bool = option("run no model: tables and figures of what is saved, of every model", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.models:
            check_choice("model", name, (*MODELS, ALL))
        if self.checkpoint is not None and len(self.chosen_models) != 1:
            raise ValueError("--checkpoint is one model's: give it with exactly one --model")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 2:
            raise ValueError(f"--max-prompt-tokens must be at least 2, not {self.max_prompt_tokens}")

    @property
    def chosen_models(self) -> tuple[str, ...]:
        return MODELS if ALL in self.models else tuple(dict.fromkeys(self.models))

    @cached_property
    def observations(self) -> ObservationSetup:
        """The defaults of `configs/observations.yaml` that hold here."""
        assert self.benchmark is not None, "set when it was checked"
        return load_observations(self.benchmark)

    @property
    def out_dir(self) -> Path:
        if self.output_dir is not None:
            return Path(self.output_dir)
        base = default_path(f"{self.find_benchmark().results_dir()}/observations")
        return base if self.checkpoint is None else base / Path(self.checkpoint).name

    def label(self, model: str) -> str:
        """What a model is called in folders, tables and figures."""
        return model if self.checkpoint is None else Path(self.checkpoint).name
