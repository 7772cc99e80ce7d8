"""What the benchmark times, and the options of `adaskip bench`.

A cell is one way to run the model, a workload the work of each cell, a study a set of cells. Every cell of a study does
the same work in every round, so ratios compare cells that ran side by side.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from adaskip.common.choices import check_choice
from adaskip.common.configs import load_yaml
from adaskip.common.options import check_options, option
from adaskip.common.paths import given_or_default
from adaskip.core.plan import PHASES
from adaskip.models.source import find_source
from adaskip.runs.cells import undefined
from adaskip.runs.config import DTYPES, MODEL_HELP
from adaskip.strategies import FULL, GRID_STRATEGIES, STRATEGIES, needs_selection, strategy_name
from adaskip.studies.engines.engines import ENGINE_MODES
from adaskip.testbed.benchmark import Testbed

PATCHED, BREAKDOWN = "patched", "breakdown"
ADASKIP, WINDOWLESS = "adaskip", "adaskip without window"
PLAIN_PREFILL, MEASURING_PREFILL = "plain prefill", "measuring prefill"
PLAIN_STEPS = "lossless, nothing drafted"
IN_PLACE = "in-place cache"
KV_CHECK, COUNTS = "kv check", "counts"
EXACT = (KV_CHECK, COUNTS)
"""Cells that count and do not time."""

Clock = Literal["wall", "process", "turns"]
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
"""On the CPU: wall-clock time, or the CPU time of the process, which other processes hardly affect; with one thread on
an idle machine the two agree."""
TURNS = "turns"
"""On the CPU: up to `REFERENCE_EVERY` cells run at once with the full model at both ends, each in a thread of its own,
whose CPU time counts. They take turns: of one layer of the prompt, and one step of the answer."""

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
    "plain_steps": "lossless mode where nothing pays: it decides as usual, but drafts nothing; against the stock model",
    "cache": "the full model with an InPlaceCache, against the stock cache",
    "kv": "the bytes of the KV cache, and whether they are freed before the first decode step (nothing is timed)",
}
COMPARISONS = ("strategies", "engines")
"""Studies whose cells are compared with the full model in the same mode."""
WITH_TURNS = ("strategies", "overhead", "plain_steps", "cache")
"""Studies that can be timed in turns: their cells generate, and are compared with the full model."""
REFERENCE_EVERY = 6
"""Number of cells after which a round of a comparison runs the full model again."""


@dataclass(frozen=True)
class Workload:
    """The work of each cell in each round: a batch of prompts of equal length, and a fixed number of new tokens."""

    prompt_tokens: int
    new_tokens: int
    batch_size: int = 1

    @property
    def decode_steps(self) -> int:
        """Forwards after the prompt's, which generates the first new token."""
        return self.new_tokens - 1

    def __str__(self) -> str:
        return f"{self.batch_size} x {self.prompt_tokens} + {self.new_tokens} tokens"


@dataclass(frozen=True)
class Cell:
    """One way to run the model. name: a strategy, or one of the names above."""

    name: str
    phase: str = ""
    sublayers: int = 0
    mode: str = EAGER

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.name, self.phase, str(self.sublayers or ""), self.mode)))


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
    if study == "plain_steps":
        return [Cell(FULL), *(Cell(PLAIN_STEPS, phase, n) for phase in phases for n in budgets)]
    if study == "cache":
        return [Cell(FULL), Cell(IN_PLACE)]
    assert study == "kv", study
    return [Cell(KV_CHECK, phase, n) for phase in phases for n in budgets]


def rotated(cells: Sequence[Cell], round_number: int) -> list[Cell]:
    """The cells in another order each round, so that none always runs first or after the same cell.

    Odd rounds run backwards; every second round begins one cell later. Exact cells run only in the first round.
    """
    if round_number != 1 and not all(cell.name in EXACT for cell in cells):
        cells = [cell for cell in cells if cell.name not in EXACT]
    start = (round_number // 2) % len(cells)
    turned = [*cells[start:], *cells[:start]]
    return turned[::-1] if round_number % 2 else turned


def with_references(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of a comparison with the full model of their mode before, after and between them, at least after every
    `REFERENCE_EVERY` of them: a machine that becomes slower within a round then slows down both sides of a ratio."""
    order: list[Cell] = []
    for mode, group in groupby((cell for cell in cells if cell.name != FULL), key=lambda cell: cell.mode):
        others, full = list(group), Cell(FULL, mode=mode)
        for start in range(0, len(others), REFERENCE_EVERY):
            order += [full, *others[start : start + REFERENCE_EVERY]]
        order.append(full)
    return order


def groups_of(cells: Sequence[Cell], study: str, clock: str) -> list[list[Cell]]:
    """The cells of a round in the order in which they run; those of a group run in turns.

    A group of several has runs of the full model of its own as first and last. What is counted runs alone.
    """
    if clock != TURNS:
        return [[cell] for cell in (with_references(cells) if study in COMPARISONS else cells)]
    timed = [cell for cell in cells if cell.name not in (FULL, *EXACT)]
    starts = range(0, len(timed), REFERENCE_EVERY)
    groups = [[Cell(FULL), *timed[start : start + REFERENCE_EVERY], Cell(FULL)] for start in starts]
    return [*groups, *([cell] for cell in cells if cell.name in EXACT)]


SMALL_MODEL = "llama-100m"
RESULTS_DIR = "speed/results"
DEVICES = ("cpu", "testbed", "real", "cuda", "engines")
"""Blocks of `configs/bench.yaml` that hold measurements."""
MAY_CHANGE = ("rounds", "time_limit_s", "output_dir", "name", "fresh", "figure", "allow_other_weights")
"""Options that may differ when a result is continued."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One study of one model on one device."""

    figure: str | None = option("a measurement of configs/bench.yaml; other options override its settings")
    model: str = option(f"{MODEL_HELP}; with --random-weights also {SMALL_MODEL}", "llama")
    study: str = option(f"what is timed side by side: {', '.join(STUDIES)}", "strategies", choices=[*STUDIES])
    random_weights: bool = option(
        "use only the architecture, with random weights; speed does not depend on their values", False
    )
    testbed: bool = option("use the embedded small model of that name", False)
    checkpoint: str | None = option("folder, .gguf file or Hub id of weights to use instead of the named model's own")
    profile: str | None = option(
        "importance profile of the strategies; default: with --testbed measured, else assumed: mostly attention, late "
        "layers (the result says so)"
    )
    selection: tuple[str, ...] | None = option(
        "selections of `adaskip calibrate --select`, one per phase, for strategy calibrated and those with a method of "
        "their name; default: with --testbed those of the runs (made if missing: minutes), else for calibrated "
        "AdaSkip's sets (the result says so)",
        distinct=True,
    )
    allow_other_weights: bool = option(
        "accept a --profile and --selection of other weights; depth and width must be equal",
        False,
    )
    keep_kv: bool = option(
        "study strategies in phase prefill: every strategy skips only while the prompt is read, as with `adaskip run "
        "--keep-kv`",
        False,
    )
    phases: tuple[str, ...] = option(
        f"phases in which sublayers are skipped: {', '.join(PHASES)}", ("e2e",), choices=PHASES, distinct=True
    )
    strategies: tuple[str, ...] = option(
        lambda: f"strategies: {', '.join(STRATEGIES)}, or package.module:Class",
        lambda: GRID_STRATEGIES[1:],
        choices=lambda: [*STRATEGIES],
        distinct=True,
    )
    budgets: tuple[int, ...] | None = option(
        "numbers of sublayers to skip; default: 12.5 and 25 per cent of the model's", least=1, distinct=True
    )
    modes: tuple[str, ...] = option(f"how to decode: {', '.join(MODES)}", (EAGER,), choices=[*MODES], distinct=True)
    prompt_tokens: tuple[int, ...] = option(
        "prompt lengths in tokens; one that does not fit in memory is skipped", (8000,), least=1, distinct=True
    )
    new_tokens: int = option("tokens generated after each prompt; generation never stops earlier", 64, least=2)
    batch_sizes: tuple[int, ...] = option("prompts per batch", (1,), least=1, distinct=True)
    rounds: int = option(
        "number of rounds, each with everything once and the full model often, after one more for warm-up", 5, least=1
    )
    time_limit_s: int | None = option(
        "start no round that would end after this many seconds (the same command continues); 0: run none, and add the "
        "limits of the device to the saved result",
        least=0,
    )
    clock: str = option(
        f"clock on the CPU: {', '.join(CLOCKS)}; {TURNS}: cells compute in turns of a layer or a step, for machines "
        "whose speed changes; on CUDA, events are timed",
        "wall",
        choices=[*CLOCKS, TURNS],
    )
    device: str | None = option("torch device; default: cuda if available, else cpu")
    dtype: str | None = option(
        f"dtype of the weights: {', '.join(DTYPES)}; default: bfloat16 on cuda, else float32", choices=DTYPES
    )
    attn_implementation: str = option("attention backend, e.g. sdpa, sdpa_packed, eager, flash_attention_2", "sdpa")
    threads: int | None = option("CPU threads of torch; default: torch's choice", least=1)
    output_dir: str | None = option(f"output folder, in which each device has its own folder; default: {RESULTS_DIR}")
    name: str | None = option("name of the result; default: that of the figure, or model, weights and study")
    fresh: bool = option("measure again instead of continuing a saved result", False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategies", tuple(map(strategy_name, self.strategies)))
        check_options(self)
        if self.benchmark is not None:
            check_choice("model of --testbed", self.model, Testbed.models)
        if self.model != SMALL_MODEL:
            find_source(self.model, self.checkpoint)
        elif not self.random_weights:
            raise ValueError(f"{SMALL_MODEL} has no checkpoint: give --random-weights")
        sources = {"--random-weights": self.random_weights, "--testbed": self.testbed, "--checkpoint": self.checkpoint}
        if len(given := [flag for flag, value in sources.items() if value]) > 1:
            raise ValueError(f"{', '.join(given)} all choose the weights: give only one of them")
        if self.allow_other_weights and not (self.profile or self.selection):
            raise ValueError("--allow-other-weights needs --profile or --selection, to which it applies")
        if self.selection and (not any(map(needs_selection, self.strategies)) or self.study != "strategies"):
            raise ValueError("--selection needs --study strategies with strategy calibrated, or another that needs one")
        if self.time_limit_s == 0 and self.fresh:
            raise ValueError("--time-limit-s 0 measures nothing and cannot be given with --fresh")
        if self.keep_kv and (self.study != "strategies" or set(self.phases) != {"prefill"}):
            raise ValueError(
                f"--keep-kv needs --study strategies and --phases prefill; given: --study {self.study} --phases "
                f"{' '.join(self.phases)}"
            )
        if left_out := undefined(self.phases, self.strategies):
            raise ValueError(f"--strategies with --phases: not defined are {', '.join(left_out)}")
        engines = [mode for mode in self.modes if mode in ENGINE_MODES]
        if engines and (self.study != "engines" or self.device != "cpu"):
            raise ValueError(f"--modes {engines[0]} needs --study engines and --device cpu")
        if self.clock == "process" and self.threads != 1:
            raise ValueError("--clock process adds up the time of all threads, so it needs --threads 1")
        if self.study == "plain_steps" and (self.modes, self.batch_sizes) != ((EAGER,), (1,)):
            raise ValueError(f"--study plain_steps needs --modes {EAGER} and --batch-sizes 1")
        if self.study == "cache" and self.modes != (EAGER,):
            raise ValueError(f"--study cache needs --modes {EAGER}")
        turns = (self.study in WITH_TURNS, self.device == "cpu", self.threads == 1, self.modes == (EAGER,))
        if self.clock == TURNS and not all(turns):
            raise ValueError(
                f"--clock {TURNS} needs one of --study {', '.join(WITH_TURNS)}, and --device cpu --threads 1 --modes "
                f"{EAGER}"
            )

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
        """The benchmark that provides the model; None for other weights."""
        return Testbed.name if self.testbed else None

    @property
    def workloads(self) -> list[Workload]:
        """Every prompt length with every batch size."""
        return [Workload(p, self.new_tokens, b) for b in self.batch_sizes for p in self.prompt_tokens]

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal to continue a saved result; older ones have no keep_kv."""
        left_out = (*MAY_CHANGE, *(() if self.keep_kv else ("keep_kv",)))
        grouped = self.study in COMPARISONS or self.clock == TURNS
        compared = {"reference_every": REFERENCE_EVERY} if grouped else {}
        return {**{name: value for name, value in asdict(self).items() if name not in left_out}, **compared}


def weights_of(identity: Mapping[str, Any]) -> str:
    """The kind of weights: `random`, `testbed` or `checkpoint`."""
    return "random" if identity["random_weights"] else Testbed.name if identity["testbed"] else "checkpoint"


def figure_settings(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of the figure in `configs/bench.yaml` that the options `given` name; none without a figure."""
    if (figure := given.get("figure")) is None:
        return {}
    content = load_yaml("bench")
    figures = {name: settings for block in DEVICES for name, settings in content[block].items()}
    return figures[check_choice("figure", figure, figures)]
