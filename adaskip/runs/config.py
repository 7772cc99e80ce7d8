"""The options of `adaskip run` and `grid`, and those that they share with other commands, validated on construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaskip.benchmarks.protocol import BENCHMARKS, DEFAULT, Benchmark, build_benchmark
from adaskip.calibration.compensation import COMPENSATIONS, SCALE
from adaskip.common.choices import check_choice
from adaskip.common.options import check_options, option
from adaskip.common.own_options import options_help, parse_options
from adaskip.common.paths import given_or_default
from adaskip.core.plan import PHASES, Budget
from adaskip.models.registry import ModelEntry, registry
from adaskip.models.source import find_source
from adaskip.roofline import known_ceilings, known_devices
from adaskip.runs.cells import MODELS, Setup, find_setup, protocols, undefined
from adaskip.strategies import (
    GRID_STRATEGIES,
    NAMES,
    SHORT_NAMES,
    STRATEGIES,
    needs_profile,
    needs_selection,
    phases_of,
    strategy_name,
)
from adaskip.testbed.benchmark import Testbed

DTYPES = ("float32", "bfloat16", "float16")
MODEL_HELP = (
    f"{', '.join(registry())} (configs/models.yaml), or weights: a Hub id org/name[@revision], a folder, a .gguf file"
)
FLAGS = ("data_dir", "longbench_set", "min_length", "max_length")
"""Benchmark options that also have their own flag."""


@dataclass(frozen=True, kw_only=True)
class SharedConfig:
    """Options of every command that loads a model."""

    benchmark: str | None = option(
        lambda: (
            f"benchmark (tasks, records, scores): {', '.join(BENCHMARKS.all())}, or package.module:Class; default: "
            f"{DEFAULT}"
        )
    )
    testbed: bool = option("use the embedded small models and their generated tasks, like --benchmark testbed", False)
    benchmark_option: tuple[str, ...] | None = option(
        lambda: f"NAME=VALUE, options of the benchmark: {options_help(BENCHMARKS.all()) or 'none so far'}"
    )
    protocol: str | None = option(
        lambda: (
            f"records to score and answer caps: {', '.join(protocols())} (configs/phases.yaml); default: that of the "
            "model (configs/models.yaml)"
        )
    )
    checkpoint: str | None = option("folder, .gguf file or Hub id of weights to use instead of the named model's own")
    data_dir: str | None = option(
        "data of the benchmark; for LongBench a folder with its jsonl files, its data.zip, or hub to download it; "
        "default: the local Hub cache"
    )
    device: str | None = option("torch device; default: cuda if available, else cpu")
    dtype: str | None = option(
        f"dtype of the weights: {', '.join(DTYPES)}; default: bfloat16 on cuda, else float32", choices=DTYPES
    )
    attn_implementation: str = option("attention backend, e.g. sdpa, sdpa_packed, eager, flash_attention_2", "sdpa")
    device_map: str | None = option("accelerate's device map, e.g. auto, to spread a model over several devices")
    chat: str | None = option(
        "chat wrapper: none, template (today's date in it is always 26 July 2024), or a text with {prompt}; default: "
        "that of the model"
    )
    seed: int = option("seed of torch's generators and of --subset", 0)
    threads: int | None = option("CPU threads of torch; default: torch's choice", least=1)

    def __post_init__(self) -> None:
        check_options(self)
        self._check_benchmark()
        if self.device is not None and self.device_map is not None:
            raise ValueError("--device and --device-map both place the model: give only one of them")

    def _check_benchmark(self) -> None:
        """Raise ValueError if benchmark, its options, protocol and tasks do not fit together."""
        given = self.benchmark and BENCHMARKS.name_of(self.benchmark)
        if self.testbed and given not in (None, Testbed.name):
            raise ValueError(f"--testbed means --benchmark {Testbed.name}, but --benchmark is {given}: leave one out")
        name = Testbed.name if self.testbed else given or DEFAULT
        object.__setattr__(self, "benchmark", name)
        BENCHMARKS.find(name)
        if self.protocol is not None:
            check_choice(f"--protocol of benchmark {name}", self.protocol, protocols(name))
        models = getattr(self, "models", ()) if isinstance(self, GridConfig) else ()
        for setup in [self.setup_of(find_source(model, self.checkpoint).entry) for model in models] or [self.setup]:
            self.find_benchmark(setup).check_tasks(getattr(self, "tasks", None) or ())

    def find_benchmark(self, setup: Setup | None = None) -> Benchmark:
        """The benchmark with the given options; defaults are those of the setup.

        Raises:
            ValueError: an unknown option of the benchmark, or a value that is not allowed.
        """
        cls = BENCHMARKS.find(str(self.benchmark))
        flags = {name: value for name in FLAGS if (value := getattr(self, name, None)) is not None}
        own = parse_options(f"benchmark {cls.name}", cls, self.benchmark_option or (), "--benchmark-option")
        if twice := sorted(flags.keys() & own.keys()):
            raise ValueError(
                f"{', '.join(twice)} is given by its own flag and by --benchmark-option: give it only once"
            )
        return build_benchmark(cls.name, **{**(setup or self.setup).records, **flags, **own})

    def setup_of(self, entry: ModelEntry | None) -> Setup:
        """The protocol of a model. entry: the model's entry in `configs/models.yaml`."""
        return find_setup(str(self.benchmark), self.protocol or (None if entry is None else entry.protocol))

    @property
    def setup(self) -> Setup:
        """The defaults for the given model; for several models, those of the paper's protocol."""
        model: str | None = getattr(self, "model", None)
        return self.setup_of(None if model is None else find_source(model, self.checkpoint).entry)


@dataclass(frozen=True, kw_only=True)
class DataConfig(SharedConfig):
    """Options of `run`, `grid` and `calibrate`: the data, and the folder of results."""

    tasks: tuple[str, ...] | None = option("tasks of the benchmark; default: those of the phase")
    longbench_set: str | None = option(
        "the set that a task name means: plain (LongBench), extended (LongBench-E), auto (LongBench-E if it has the "
        "task) or both (LongBench-E and the records only in LongBench); a name that ends in _e always means "
        "LongBench-E; default: that of the protocol, for the paper's auto"
    )
    min_length: int | None = option(
        "use only records of more than N words, 0 for all; importance is always measured on the protocol's records, "
        "the sets of calibrated are searched on the shorter ones; default: that of the protocol, for the paper's 4000"
    )
    max_length: int | None = option(
        "use only records of at most N words, also for measuring importance; default: no limit", least=1
    )
    max_prompt_tokens: int | None = option(
        "maximum prompt length before the chat wrapper is added; longer prompts lose their middle or, in a protocol "
        "with longest_prompt_tokens, are left out; default: the limit of the protocol or the model",
        least=2,
    )
    output_dir: str | None = option(
        "where runs go, with the folder of their profiles beside it; if not given, results/runs, or of another "
        "benchmark results/BENCHMARK/runs, in the checkout, or from a wheel in the current folder"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_repeats("task", self.tasks or ())

    @property
    def runs_dir(self) -> Path:
        return given_or_default(self.output_dir, f"{BENCHMARKS.find(str(self.benchmark)).results_dir()}/runs")


@dataclass(frozen=True, kw_only=True)
class WorkConfig(DataConfig):
    """Options of `run` and `grid`: the number of samples, and how they are generated."""

    limit: int | None = option("use only the first N samples of each task; default: that of the phase", least=1)
    subset: int | None = option("use only N random samples of each task (--seed), the same for every cell", least=1)
    batch_size: int | None = option("samples per batch; default: that of the protocol", least=1)
    max_new_tokens: int | None = option(
        "maximum number of new tokens per sample; default: the cap of task and phase", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.subset is not None:
            raise ValueError("--limit uses the first samples and --subset random ones: give only one of them")


@dataclass(frozen=True, kw_only=True)
class StrategyConfig(DataConfig):
    """Options that select a model, a strategy, a phase and a budget."""

    model: str = option(MODEL_HELP, required=True)
    phase: str = option(f"phase in which sublayers are skipped: {', '.join(PHASES)}", required=True)
    strategy: str = option(lambda: f"strategy: {', '.join(SHORT_NAMES)}, or package.module:Class", required=True)
    budget: int | None = option(
        "number of sublayers to skip; without a budget in any form, the protocol's smallest (an eighth of all)"
    )
    skip_sub_layer_num: int | None = option("the same, as the artifact spells it", aliases=["--skip_sub_layer_num"])
    skip_full_layer_num: int | None = option(
        "number of whole layers to skip, two sublayers each", aliases=["--skip_full_layer_num"]
    )
    alpha: float | None = option("acceleration ratio: M - M/alpha of M layers are skipped")
    fraction: float | None = option("share of all sublayers, e.g. 0.125, rounded to the unit the strategy can skip")
    target_speedup: float | None = option(
        "calibrated: use the least divergent set that the roofline model predicts to reach this speedup of the phase, "
        "e.g. 1.2, at the mean prompt lengths and answer caps of the tasks; the roofline ignores launch overhead, so "
        "small models attain less; the attained speedup is measured at the end of the run"
    )
    speedup_on: str | None = option(
        f"GPU for which --target-speedup is predicted: {', '.join(known_devices())}; default: this device, whose "
        "ceilings are measured"
    )
    profile: str | None = option("profile made by `adaskip calibrate`; default: a profile that is made once and kept")
    allow_other_weights: bool = option(
        "accept a --profile of other weights or another adapter, e.g. for a fine-tune or a quantised copy of the "
        "model; depth and width must be equal",
        False,
    )
    keep_kv: bool = option(
        "phase prefill: skip only while the prompt is read, keep its K/V in every layer, answer with the full model",
        False,
    )
    compensation: str = option(
        f"what replaces a skipped sublayer, fitted on the calibration prompts: {', '.join(COMPENSATIONS)} (scale: that "
        "of the profile; least_squares: one factor; affine: a factor and a shift per channel; shift: scale and a shift "
        "per channel)",
        SCALE,
    )
    strategy_option: tuple[str, ...] | None = option(
        lambda: f"NAME=VALUE, options of the strategy: {options_help(STRATEGIES)}"
    )
    learning_window: int | None = option("adaskip: length of its learning window, 0 for none; default: 20")
    beta_quantile: float | None = option(
        "adaskip: beta as a quantile of the FFNs' similarities; default: the paper's threshold"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "strategy", strategy_name(self.strategy))
        check_model(self, self.model)
        check_choice("phase", self.phase, PHASES)
        check_choice("strategy", self.strategy, SHORT_NAMES)
        if self.phase not in (allowed := phases_of(self.strategy)):
            raise ValueError(
                f"--strategy {self.strategy} is defined for phase {' and '.join(allowed)}; got --phase {self.phase}"
            )
        if self.profile is not None and not needs_profile(self.strategy):
            raise ValueError(f"--profile {self.profile} is of no use: strategy {self.strategy!r} needs no profile")
        if self.allow_other_weights and self.profile is None:
            raise ValueError("--allow-other-weights needs --profile, the profile that it applies to")
        if self.keep_kv and (self.strategy == "full" or self.phase != "prefill" or self.target_speedup is not None):
            raise ValueError(
                "--keep-kv is for strategies in phase prefill without --target-speedup; given: strategy "
                f"{self.strategy!r} in phase {self.phase!r}"
            )
        check_choice("compensation", self.compensation, COMPENSATIONS)
        if self.compensation != SCALE and (not needs_profile(self.strategy) or self.target_speedup is not None):
            raise ValueError(
                f"--compensation {self.compensation} is for strategies with a profile, without --target-speedup; "
                f"given: strategy {self.strategy!r}"
            )
        self._check_target()
        self._check_budget()

    def _check_target(self) -> None:
        if self.speedup_on is not None:
            if self.target_speedup is None:
                raise ValueError(f"--speedup-on {self.speedup_on} needs --target-speedup, which it applies to")
            known_ceilings(self.speedup_on)
        if self.target_speedup is None:
            return
        if not needs_selection(self.strategy):
            allowed = ", ".join(repr(name) for name in NAMES if needs_selection(name))
            raise ValueError(
                f"--target-speedup chooses among the sets of a selection; strategies allowed with it: {allowed}; "
                f"given: {self.strategy!r}"
            )
        if not self.target_speedup > 1:
            raise ValueError(f"--target-speedup must be above 1; given: {self.target_speedup:g}")

    def _check_budget(self) -> None:
        forms = ("budget", "skip_sub_layer_num", "skip_full_layer_num", "alpha", "fraction", "target_speedup")
        given = {name: value for name in forms if (value := getattr(self, name)) is not None}
        spelled = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items()) or "none"
        if self.strategy == "full":
            if set(given.values()) - {0}:
                raise ValueError(f"the full model skips nothing and takes no budget; given: {spelled}")
        elif len(given) > 1:
            raise ValueError(
                f"strategy {self.strategy!r} takes one budget: --budget or --skip-sub-layer-num (sublayers), "
                f"--skip-full-layer-num (layers), --alpha, --fraction, or for calibrated --target-speedup; given: "
                f"{spelled}"
            )
        elif self.fraction is not None and not 0 < self.fraction < 1:
            raise ValueError(f"--fraction must be above 0 and below 1, e.g. 0.125; given: {self.fraction:g}")

    @property
    def skip_budget(self) -> Budget | None:
        """The budget in sublayers, layers or alpha; None for the full model, or if none of these was given."""
        if self.strategy == "full":
            return None
        if self.alpha is not None:
            return Budget(alpha=self.alpha)
        if self.skip_full_layer_num is not None:
            return Budget(layers=self.skip_full_layer_num)
        sublayers = self.budget if self.budget is not None else self.skip_sub_layer_num
        return None if sublayers is None else Budget(sublayers=sublayers)

    @property
    def strategy_options(self) -> dict[str, bool | int | float | str | None]:
        """The options of the strategy that were given, by field name."""
        spelled = {
            "keep_kv": self.keep_kv or None,
            "learning_window": self.learning_window,
            "beta_quantile": self.beta_quantile,
        }
        given = {name: value for name, value in spelled.items() if value is not None}
        cls = STRATEGIES.get(self.strategy)
        options = parse_options(self.strategy, cls, self.strategy_option or (), "--strategy-option")
        if twice := sorted(given.keys() & options.keys()):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in twice)
            raise ValueError(f"{', '.join(twice)} is given by {flags} and by --strategy-option: give it only once")
        return {**given, **options}


@dataclass(frozen=True, kw_only=True)
class RunConfig(StrategyConfig, WorkConfig):
    """Options of one cell: a strategy, and the samples it runs on."""


@dataclass(frozen=True, kw_only=True)
class GridConfig(WorkConfig):
    """Options of many cells: every combination of models, phases, strategies and budgets."""

    models: tuple[str, ...] = option(MODEL_HELP, MODELS)
    phases: tuple[str, ...] = option(f"phases in which sublayers are skipped: {', '.join(PHASES)}", PHASES)
    strategies: tuple[str, ...] = option(
        lambda: f"strategies: {', '.join(SHORT_NAMES)}, or package.module:Class", lambda: tuple(GRID_STRATEGIES)
    )
    budgets: tuple[int, ...] | None = option(
        "numbers of sublayers to skip; default: those of the protocol, scaled to the depth of the model", least=1
    )
    jobs: int | None = option(
        "number of parallel processes; default: for the testbed on a CPU one per core, else one", least=1
    )
    dry_run: bool = option(
        "print the cells with the states of their runs and an estimate of their cost; load and run nothing", False
    )
    estimate_for: str = option(f"GPU for the estimate of --dry-run: {', '.join(known_devices())}", "L20")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "strategies", tuple(map(strategy_name, self.strategies)))
        for model in self.models:
            check_model(self, model)
        _refuse_repeats("model", [find_source(model).name for model in self.models])
        for what, given, allowed in (("phase", self.phases, PHASES), ("strategy", self.strategies, SHORT_NAMES)):
            for name in given:
                check_choice(what, name, allowed)
            _refuse_repeats(what, given)
        _refuse_repeats("budget", self.budgets or ())
        check_choice("--estimate-for", self.estimate_for, known_devices())
        if self.checkpoint is not None and len(self.models) != 1:
            raise ValueError("--checkpoint needs exactly one model in --models")
        left_out = undefined(self.phases, self.strategies)
        if len(left_out) == len(self.phases) * len(self.strategies):
            raise ValueError(f"the grid has no cells; not defined: {', '.join(left_out)}")


def check_model(config: SharedConfig, model: str) -> None:
    """ValueError unless `--model` accepts `model` with the other options; nothing is read or downloaded."""
    if models := BENCHMARKS.find(str(config.benchmark)).models:
        check_choice(f"model of {config.benchmark}", model, models)
    find_source(model, config.checkpoint)


def _refuse_repeats(what: str, given: Sequence[str | int]) -> None:
    repeated = [str(name) for name in dict.fromkeys(given) if given.count(name) > 1]
    if repeated:
        raise ValueError(f"{what} given more than once: {', '.join(repeated)}")
