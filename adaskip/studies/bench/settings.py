"""What the benchmark times, and the options of `adaskip bench`.

A cell is one way to run the model, a workload the work of each cell, a study some cells. Within a study every cell does
the same work in every round, so that ratios are of things that ran side by side.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from adaskip.common.choices import check_choice
from adaskip.common.configs import load_yaml
from adaskip.common.options import check_options, option
from adaskip.common.paths import given_or_default
from adaskip.core.plan import PHASES
from adaskip.models.source import find_source
from adaskip.runs.config import DTYPES, MODEL_HELP
from adaskip.strategies import FULL, GRID_STRATEGIES, STRATEGIES, needs_selection, strategy_name
from adaskip.studies.engines.engines import ENGINE_MODES
from adaskip.testbed.benchmark import Testbed

PATCHED, BREAKDOWN = "patched", "breakdown"
ADASKIP, WINDOWLESS = "adaskip", "adaskip without window"
PLAIN_PREFILL, MEASURING_PREFILL = "plain prefill", "measuring prefill"
KV_CHECK, COUNTS = "kv check", "counts"
EXACT = (KV_CHECK, COUNTS)
"""Cells that count and do not time."""

Clock = Literal["wall", "process"]
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
"""On the CPU: time as it passes, or the process's own time, which other processes hardly stretch; with one thread the
two agree on a quiet machine."""

EAGER, COMPILED = "eager", "compiled"
MODES = {
    EAGER: "a dynamic cache, nothing compiled",
    COMPILED: "a static cache and transformers' own compilation of decode steps",
    **{name: engine.what for name, engine in ENGINE_MODES.items()},
}
"""How decoding runs."""

STUDIES = {
    "strategies": "the full model and every strategy at every budget; the time of each sublayer",
    "overhead": "the model inside `skipping` with nothing to skip, against the stock model",
    "window": "AdaSkip with and without its online learning window",
    "calibration": "a prefill that measures IO similarity, against a plain one",
    "engines": "the full model and every strategy at every budget, exported to engines and beside transformers",
    "kv": "the KV cache's bytes, and that they are freed before the first decode step (times nothing)",
}
COMPARISONS = ("strategies", "engines")
"""Studies whose cells are compared with the full model in the same mode."""


@dataclass(frozen=True)
class Workload:
    """The work of each cell in each round: a batch of prompts of equal length, and a fixed number of new tokens."""

    prompt_tokens: int
    new_tokens: int
    batch_size: int = 1

    @property
    def decode_steps(self) -> int:
        """Forwards after the one over the prompt, which makes the first new token."""
        return self.new_tokens - 1

    def __str__(self) -> str:
        return f"{self.batch_size} x {self.prompt_tokens} + {self.new_tokens} tokens"


@dataclass(frozen=True)
class Cell:
    """One way to run the model. name: a strategy's, or one of the benchmark's own above."""

    name: str
    phase: str = ""
    sublayers: int = 0
    mode: str = EAGER

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.name, self.phase, str(self.sublayers or ""), self.mode)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cells_of(
    study: str, phases: Sequence[str], strategies: Sequence[str], budgets: Sequence[int], modes: Sequence[str]
) -> list[Cell]:
    """The cells of a study in the order of its first round."""
    if study in COMPARISONS:
        full = [Cell(FULL, mode=mode) for mode in modes]
        timed = [Cell(BREAKDOWN)] if EAGER in modes and study == "strategies" else []
        skipping = [Cell(name, p, n, mode) for mode in modes for p in phases for name in strategies for n in budgets]
        return [*full, *timed, *skipping]
    if study == "overhead":
        return [*(Cell(name, mode=mode) for mode in modes for name in (FULL, PATCHED)), Cell(COUNTS)]
    if study == "window":
        return [Cell(name, "decode", n, mode) for mode in modes for n in budgets for name in (WINDOWLESS, ADASKIP)]
    if study == "calibration":
        return [Cell(PLAIN_PREFILL), Cell(MEASURING_PREFILL)]
    assert study == "kv", study
    return [Cell(KV_CHECK, phase, n) for phase in phases for n in budgets]


def rotated(cells: Sequence[Cell], round_number: int) -> list[Cell]:
    """The cells in another order each round, so that none always runs first or behind the same neighbour.

    Odd rounds run backwards; every two rounds begin one cell further. Exact cells run in the first round only.
    """
    if round_number != 1 and not all(cell.name in EXACT for cell in cells):
        cells = [cell for cell in cells if cell.name not in EXACT]
    start = (round_number // 2) % len(cells)
    turned = [*cells[start:], *cells[:start]]
    return turned[::-1] if round_number % 2 else turned


SMALL_MODEL = "llama-100m"
RESULTS_DIR = "speed/results"
DEVICES = ("cpu", "testbed", "real", "cuda", "engines")
"""Blocks of `configs/bench.yaml` that hold measurements."""
MAY_CHANGE = ("rounds", "time_limit_s", "output_dir", "name", "fresh", "figure", "allow_other_weights")
"""Options that may differ when a result is continued."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One study of one model on one device."""

    figure: str | None = option("a measurement of configs/bench.yaml; other options override what it says")
    model: str = option(f"{MODEL_HELP}; with --random-weights also {SMALL_MODEL}", "llama")
    study: str = option(f"what is timed side by side: {', '.join(STUDIES)}", "strategies", choices=[*STUDIES])
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
        "--testbed the one kept by the runs (searched if missing: minutes), else AdaSkip's sets (the result says so)",
        distinct=True,
    )
    allow_other_weights: bool = option(
        "use --profile and --selection although made for other weights, of a model of the same depth and width",
        False,
    )
    phases: tuple[str, ...] = option(f"what skips, of {', '.join(PHASES)}", ("e2e",), choices=PHASES, distinct=True)
    strategies: tuple[str, ...] = option(
        lambda: f"of {', '.join(STRATEGIES)}, or package.module:Class",
        lambda: GRID_STRATEGIES[1:],
        choices=lambda: [*STRATEGIES],
        distinct=True,
    )
    budgets: tuple[int, ...] | None = option(
        "sublayers to skip; if not given, 12.5 and 25 per cent of the model's", least=1, distinct=True
    )
    modes: tuple[str, ...] = option(f"of decoding: {', '.join(MODES)}", (EAGER,), choices=[*MODES], distinct=True)
    prompt_tokens: tuple[int, ...] = option(
        "prompt lengths; one too long for the memory is passed over", (8000,), least=1, distinct=True
    )
    new_tokens: int = option("tokens generated after each prompt, always all of them", 64, least=2)
    batch_sizes: tuple[int, ...] = option("prompts generated together", (1,), least=1, distinct=True)
    rounds: int = option("rounds that count; in each, everything runs once; one more before them warms up", 5, least=1)
    time_limit_s: int | None = option(
        "begin no round that would end after so many seconds; the same command continues", least=1
    )
    clock: str = option(f"on the CPU, of {', '.join(CLOCKS)}; CUDA has its own", "wall", choices=[*CLOCKS])
    device: str | None = option("torch device; if not given, cuda where there is one, else cpu")
    dtype: str | None = option(
        f"weights' dtype: {', '.join(DTYPES)}; if not given, bfloat16 on cuda, else float32", choices=DTYPES
    )
    attn_implementation: str = option("attention backend, e.g. sdpa, sdpa_packed, eager, flash_attention_2", "sdpa")
    threads: int | None = option("CPU threads of torch; if not given, torch's own choice", least=1)
    output_dir: str | None = option(f"results go to a folder of the device's name in here; if not given, {RESULTS_DIR}")
    name: str | None = option("name of the result; if not given, the figure's, or model, weights and study")
    fresh: bool = option("measure anew instead of continuing what is saved", False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategies", tuple(map(strategy_name, self.strategies)))
        check_options(self)
        if self.benchmark is not None:
            check_choice("model of --testbed", self.model, Testbed.models)
        if self.model != SMALL_MODEL:
            find_source(self.model, self.checkpoint)
        elif not self.random_weights:
            raise ValueError(f"{SMALL_MODEL} is a shape without a checkpoint: give --random-weights with it")
        sources = {"--random-weights": self.random_weights, "--testbed": self.testbed, "--checkpoint": self.checkpoint}
        if len(given := [flag for flag, value in sources.items() if value]) > 1:
            raise ValueError(f"{', '.join(given)} each say where the weights come from: give one of them")
        if self.allow_other_weights and not (self.profile or self.selection):
            raise ValueError("--allow-other-weights is about --profile and --selection: give one of them, too")
        if self.selection and (not any(map(needs_selection, self.strategies)) or self.study != "strategies"):
            raise ValueError("--selection is for strategy calibrated in study strategies, which is not asked for")
        engines = [mode for mode in self.modes if mode in ENGINE_MODES]
        if engines and (self.study != "engines" or self.device != "cpu"):
            raise ValueError(f"--modes {engines[0]} is for --study engines on --device cpu: give both with it")
        if self.clock == "process" and self.threads != 1:
            raise ValueError("--clock process adds up the time of all threads: give --threads 1 with it")

    @property
    def out_dir(self) -> Path:
        return given_or_default(self.output_dir, RESULTS_DIR)

    @property
    def result_name(self) -> str:
        if self.name or self.figure:
            return self.name or self.figure or ""
        model = self.model if self.model == SMALL_MODEL else find_source(self.model).name
        return f"{model}_{weights_of(asdict(self))}_{self.study}"

    @property
    def benchmark(self) -> str | None:
        """The benchmark that brings the model along; None for other weights."""
        return Testbed.name if self.testbed else None

    @property
    def workloads(self) -> list[Workload]:
        """Every prompt length with every batch size."""
        return [Workload(p, self.new_tokens, b) for b in self.batch_sizes for p in self.prompt_tokens]

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a saved result to be continued."""
        return {name: value for name, value in asdict(self).items() if name not in MAY_CHANGE}


def weights_of(identity: Mapping[str, Any]) -> str:
    """Where the weights come from: `random`, the `testbed`, or a `checkpoint`."""
    return "random" if identity["random_weights"] else Testbed.name if identity["testbed"] else "checkpoint"


def figure_settings(figure: str) -> Mapping[str, Any]:
    """The options that `configs/bench.yaml` gives the measurement of that name."""
    content = load_yaml("bench")
    figures = {name: settings for block in DEVICES for name, settings in content[block].items()}
    return figures[check_choice("figure", figure, figures)]
