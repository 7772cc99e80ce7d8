"""What a user may choose of the benchmark: the options of `adaskip bench`, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaskip.common.choices import check_choice
from adaskip.common.configs import load_yaml
from adaskip.common.options import option
from adaskip.common.paths import given_or_default
from adaskip.core.plan import PHASES
from adaskip.models.source import find_source
from adaskip.runs.config import DTYPES, MODEL_HELP
from adaskip.strategies import GRID_STRATEGIES, STRATEGIES, needs_selection, strategy_name
from adaskip.studies.bench.cells import EAGER, MODES, STUDIES, Workload
from adaskip.studies.bench.stopwatch import CLOCKS
from adaskip.studies.engines.engines import ENGINE_MODES
from adaskip.testbed import FAMILIES

SMALL_MODEL = "llama-100m"
RESULTS_DIR = "speed/results"
MAY_CHANGE = ("rounds", "time_limit_s", "output_dir", "name", "fresh", "figure", "allow_other_weights")
"""Options that may differ when a result is continued."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One study of one model on one device."""

    figure: str | None = option("a measurement of configs/bench.yaml; other options go before what it says")
    model: str = option(f"{MODEL_HELP}; with --random-weights also {SMALL_MODEL}", "llama")
    study: str = option(f"what is timed side by side: {', '.join(STUDIES)}", "strategies")
    random_weights: bool = option(
        "the architecture alone, filled on the device; speed does not depend on values", False
    )
    testbed: bool = option("the embedded small model of that name", False)
    checkpoint: str | None = option("folder or Hub id of the weights instead of the model's own")
    profile: str | None = option(
        "importance profile strategies choose by; if not given, measured with --testbed, else assumed: mostly "
        "attention, late layers (the result says so)"
    )
    selection: tuple[str, ...] | None = option(
        "selections of `adaskip calibrate --select`, one per phase, for strategy calibrated; if not given, with "
        "--testbed the one kept by the runs (searched if missing: minutes), else AdaSkip's sets (the result says so)"
    )
    allow_other_weights: bool = option(
        "use --profile and --selection although made for other weights, of a model of the same depth and width",
        False,
    )
    phases: tuple[str, ...] = option(f"what skips, of {', '.join(PHASES)}", ("e2e",))
    strategies: tuple[str, ...] = option(
        lambda: f"of {', '.join(STRATEGIES)}, or package.module:Class", lambda: GRID_STRATEGIES[1:]
    )
    budgets: tuple[int, ...] | None = option("sublayers to skip; if not given, 12.5 and 25 per cent of the model's")
    modes: tuple[str, ...] = option(f"how decoding runs, of {', '.join(MODES)}", (EAGER,))
    prompt_tokens: tuple[int, ...] = option("prompt lengths; one too long for the memory is passed over", (8000,))
    new_tokens: int = option("tokens generated after each prompt, always all of them", 64)
    batch_sizes: tuple[int, ...] = option("prompts generated together", (1,))
    rounds: int = option("rounds that count; in each, everything runs once; one more before them warms up", 5)
    time_limit_s: int | None = option("begin no round that would end after so many seconds; the same command continues")
    clock: str = option(f"on the CPU, of {', '.join(CLOCKS)}; CUDA has its own", "wall")
    device: str | None = option("torch device; if not given, cuda where there is one, else cpu")
    dtype: str | None = option(f"weights' dtype: {', '.join(DTYPES)}; if not given, bfloat16 on cuda, else float32")
    attn_implementation: str = option("attention backend, e.g. sdpa, sdpa_packed, eager, flash_attention_2", "sdpa")
    threads: int | None = option("CPU threads of torch; if not given, torch's own choice")
    output_dir: str | None = option(f"results go to a folder of the device's name in here; if not given, {RESULTS_DIR}")
    name: str | None = option("name of the result; if not given, the figure's, or model, weights and study")
    fresh: bool = option("measure anew instead of continuing what is saved", False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategies", tuple(map(strategy_name, self.strategies)))
        for what, names, allowed in (
            ("study", (self.study,), tuple(STUDIES)),
            ("clock", (self.clock,), tuple(CLOCKS)),
            ("dtype", () if self.dtype is None else (self.dtype,), DTYPES),
            ("phase", self.phases, PHASES),
            ("strategy", self.strategies, STRATEGIES),
            ("mode", self.modes, tuple(MODES)),
        ):
            for name in names:
                check_choice(what, name, allowed)
        self._check_source()
        self._check_engines()
        self._check_numbers()
        if self.clock == "process" and self.threads != 1:
            raise ValueError("--clock process adds up the time of all threads: give --threads 1 with it")

    def _check_engines(self) -> None:
        engines = [mode for mode in self.modes if mode in ENGINE_MODES]
        if engines and self.study != "strategies":
            raise ValueError(f"--modes {engines[0]} is for study strategies, not {self.study}")
        if engines and self.device != "cpu":
            raise ValueError(f"--modes {engines[0]} is measured on the CPU alone: give --device cpu with it")

    def _check_source(self) -> None:
        if self.testbed:
            check_choice("model of --testbed", self.model, FAMILIES)
        if self.model != SMALL_MODEL:
            find_source(self.model, self.checkpoint)
        given = [name for name in ("random_weights", "testbed", "checkpoint") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{_flags(given)} each say where the weights come from: give one of them")
        if self.allow_other_weights and not (self.profile or self.selection):
            raise ValueError("--allow-other-weights is about --profile and --selection: give one of them, too")
        if self.selection and (not any(map(needs_selection, self.strategies)) or self.study != "strategies"):
            raise ValueError("--selection is for strategy calibrated in study strategies, which is not asked for")
        if self.model == SMALL_MODEL and not self.random_weights:
            raise ValueError(f"{SMALL_MODEL} is a shape without a checkpoint: give --random-weights with it")

    def _check_numbers(self) -> None:
        many = {name: getattr(self, name) or () for name in ("prompt_tokens", "batch_sizes", "budgets")}
        optional = {name: getattr(self, name) for name in ("rounds", "threads", "time_limit_s")}
        single = {name: (value,) for name, value in optional.items() if value is not None}
        for name, values in {**many, **single}.items():
            if values and min(values) < 1:
                raise ValueError(f"{_flags([name])} must be at least 1, not {min(values)}")
        for name in ("phases", "strategies", "modes", "selection", "prompt_tokens", "batch_sizes", "budgets"):
            repeatable: Sequence[Any] = getattr(self, name) or ()
            if len(set(repeatable)) < len(repeatable):
                raise ValueError(f"{_flags([name])} names something twice: {' '.join(map(str, repeatable))}")
        if self.new_tokens < 2:
            raise ValueError(f"--new-tokens must be at least 2, so that there is a decode step; not {self.new_tokens}")

    @property
    def out_dir(self) -> Path:
        return given_or_default(self.output_dir, RESULTS_DIR)

    @property
    def model_name(self) -> str:
        """What results call the model."""
        return self.model if self.model == SMALL_MODEL else find_source(self.model).name

    @property
    def source(self) -> str:
        """Where the weights come from: random, testbed or checkpoint."""
        return "random" if self.random_weights else "testbed" if self.testbed else "checkpoint"

    @property
    def result_name(self) -> str:
        return self.name or self.figure or f"{self.model_name}_{self.source}_{self.study}"

    @property
    def workloads(self) -> list[Workload]:
        """Every prompt length with every batch size."""
        return [Workload(p, self.new_tokens, b) for b in self.batch_sizes for p in self.prompt_tokens]

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a saved result to be continued."""
        return {name: value for name, value in asdict(self).items() if name not in MAY_CHANGE}


def figure_settings(figure: str) -> Mapping[str, Any]:
    """The options that `configs/bench.yaml` gives the measurement of that name."""
    figures = {name: settings for block in load_yaml("bench").values() for name, settings in block.items()}
    return figures[check_choice("figure", figure, figures)]


def figures_for(device_type: str) -> tuple[str, ...]:
    """The names of the measurements for `cpu` or `cuda`, in order."""
    return tuple(load_yaml("bench")[device_type])


def _flags(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
