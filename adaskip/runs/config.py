"""The options of `adaskip run`, `calibrate` and `grid`, which are validated on construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaskip.benchmarks.longbench import TASKS, get_task, set_meant
from adaskip.common.choices import check_choice
from adaskip.common.options import option
from adaskip.common.paths import RUNS, TESTBED_RUNS, given_or_default
from adaskip.core.plan import Budget
from adaskip.models.registry import ModelEntry, registry
from adaskip.models.source import find_source
from adaskip.roofline import known_ceilings, known_devices
from adaskip.runs.cells import MODELS, PAPER, PHASES, TESTBED, Setup, load_setup, protocols
from adaskip.strategies import (
    GRID_STRATEGIES,
    NAMES,
    SHORT_NAMES,
    needs_selection,
    options_help,
    parse_options,
    strategy_name,
)
from adaskip.testbed import FAMILIES

DTYPES = ("float32", "bfloat16", "float16")
MODEL_HELP = (
    f"{', '.join(registry())} (configs/models.yaml), or weights: a Hub id org/name[@revision], a folder, a .gguf file"
)
BOTH = "both"
LONGBENCH_SETS: dict[str, bool | None] = {"auto": None, "plain": False, "extended": True, BOTH: None}
"""Choices of `--longbench-set` and their argument of `longbench.load_records`; `both` uses `longbench.load_both_sets`.
"""


@dataclass(frozen=True, kw_only=True)
class SharedConfig:
    """Options of every command that loads a model."""

    testbed: bool = option("use the embedded small models and their generated tasks instead of real checkpoints", False)
    protocol: str | None = option(
        lambda: (
            f"records to score and answer caps: {', '.join(protocols())} (configs/phases.yaml); default: that of the "
            "model (configs/models.yaml)"
        )
    )
    checkpoint: str | None = option("folder, .gguf file or Hub id of weights to use instead of the named model's own")
    data_dir: str | None = option(
        "folder with LongBench's jsonl files, its data.zip, or hub to download it; default: the local Hub cache"
    )
    device: str | None = option("torch device; default: cuda if available, else cpu")
    dtype: str | None = option(f"dtype of the weights: {', '.join(DTYPES)}; default: bfloat16 on cuda, else float32")
    attn_implementation: str = option("attention backend, e.g. sdpa, sdpa_packed, eager, flash_attention_2", "sdpa")
    device_map: str | None = option("accelerate's device map, e.g. auto, to spread a model over several devices")
    chat: str | None = option("chat wrapper: none, template, or a text with {prompt}; default: that of the model")
    seed: int = option("seed of torch's generators and of --subset", 0)
    threads: int | None = option("CPU threads of torch; default: torch's choice")

    def __post_init__(self) -> None:
        if self.protocol is not None:
            check_choice("--protocol", self.protocol, protocols())
            if self.testbed:
                raise ValueError(f"--protocol {self.protocol} is for real checkpoints, not for --testbed: leave it out")
        if self.dtype is not None:
            check_choice("--dtype", self.dtype, DTYPES)
        if self.testbed and self.data_dir is not None:
            raise ValueError("--data-dir is LongBench data and --testbed generates its own: give only one of them")
        if self.device is not None and self.device_map is not None:
            raise ValueError("--device and --device-map both place the model: give only one of them")
        for name in ("threads", "limit", "subset", "batch_size", "max_new_tokens", "jobs", "max_length"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")

    def setup_of(self, entry: ModelEntry | None) -> Setup:
        """The defaults of `configs/phases.yaml` for a model; entry: its entry in `configs/models.yaml`."""
        own = None if entry is None else entry.protocol
        return load_setup(TESTBED if self.testbed else self.protocol or own or PAPER)

    @property
    def setup(self) -> Setup:
        """The defaults for the given model; for several models, those of the paper's protocol."""
        model: str | None = getattr(self, "model", None)
        return self.setup_of(None if model is None else find_source(model, self.checkpoint).entry)


@dataclass(frozen=True, kw_only=True)
class DataConfig(SharedConfig):
    """Options of `run`, `grid` and `calibrate`: the data, and the folder of results."""

    tasks: tuple[str, ...] | None = option("LongBench tasks; default: those of the phase")
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
        "use only records of at most N words, also for measuring importance; default: no limit"
    )
    max_prompt_tokens: int | None = option(
        "maximum prompt length before the chat wrapper is added; longer prompts lose their middle or, in a protocol "
        "with longest_prompt_tokens, are left out; default: the limit of the protocol or the model"
    )
    output_dir: str | None = option(
        "folder of runs; profiles are kept beside it; default: results/runs (with --testbed results/testbed/runs) in "
        "the checkout, or in the current folder if adaskip was installed from a wheel"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for task in self.tasks or ():
            get_task(task)
        _refuse_repeats("task", self.tasks or ())
        self._check_sets()

    def _check_sets(self) -> None:
        if self.longbench_set is not None:
            check_choice("--longbench-set", self.longbench_set, LONGBENCH_SETS)
        self._check_lengths()
        chosen = {"longbench-set": self.longbench_set, "min-length": self.min_length, "max-length": self.max_length}
        given = [f"--{name} {value}" for name, value in chosen.items() if value is not None]
        if self.testbed and given:
            raise ValueError(
                "--longbench-set, --min-length and --max-length select LongBench records, but --testbed generates its "
                f"own: leave them out; given: {', '.join(given)}"
            )
        meaning = self.longbench_set or self.setup.longbench_set
        for task in self.tasks or ():
            meant = set_meant(task, LONGBENCH_SETS[meaning])
            if task in TASKS and meant != task and meant in (self.tasks or ()):
                raise ValueError(
                    f"--tasks {task} and {meant} mean the same set with --longbench-set {meaning}: give only one of "
                    f"them, or --longbench-set plain, with which {task} means the set of LongBench"
                )

    def _check_lengths(self) -> None:
        least = self.min_length
        if least is not None and least < 0:
            raise ValueError(f"--min-length must be at least 0 words, not {least}")
        if least is None and hasattr(self, "model"):  # with several models, each has its own
            least = self.setup.min_length
        if self.max_length is not None and least is not None and self.max_length <= least:
            raise ValueError(
                f"--max-length {self.max_length} leaves no records, since --min-length {least} keeps only longer ones: "
                "give a larger --max-length or a smaller --min-length"
            )
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 2:
            raise ValueError(f"--max-prompt-tokens must be at least 2, not {self.max_prompt_tokens}")

    @property
    def runs_dir(self) -> Path:
        return given_or_default(self.output_dir, TESTBED_RUNS if self.testbed else RUNS)


@dataclass(frozen=True, kw_only=True)
class WorkConfig(DataConfig):
    """Options of `run` and `grid`: the number of samples, and how they are generated."""

    limit: int | None = option("use only the first N samples of each task; default: that of the phase")
    subset: int | None = option("use only N random samples of each task (--seed), the same for every cell")
    batch_size: int | None = option("samples per batch; default: that of the protocol")
    max_new_tokens: int | None = option("maximum number of new tokens per sample; default: the cap of task and phase")

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
    strategy_option: tuple[str, ...] | None = option(lambda: f"NAME=VALUE, options of the strategy: {options_help()}")
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
        if self.allow_other_weights and self.profile is None:
            raise ValueError("--allow-other-weights needs --profile, the profile that it applies to")
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
        spelled = {"learning_window": self.learning_window, "beta_quantile": self.beta_quantile}
        given = {name: value for name, value in spelled.items() if value is not None}
        options = parse_options(self.strategy, self.strategy_option or ())
        if twice := sorted(given.keys() & options.keys()):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in twice)
            raise ValueError(f"{', '.join(twice)} is given by {flags} and by --strategy-option: give it only once")
        return {**given, **options}


@dataclass(frozen=True, kw_only=True)
class RunConfig(StrategyConfig, WorkConfig):
    """Options of one cell: a strategy, and the samples it runs on."""


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(DataConfig):
    """Options of one profile, of importance or of the sets for a phase; runs with the same settings use it."""

    model: str = option(MODEL_HELP, required=True)
    output: str | None = option(
        "JSON file to which the profile is also written, for --profile; runs look for it in another place"
    )
    samples: int | None = option("number of calibration prompts; default: that of the protocol")
    batch_size: int = option("prompts per forward", 1)
    select: str | None = option(
        f"search the sets of strategy calibrated for this phase ({', '.join(PHASES)}) instead of measuring importance"
    )
    up_to: int | None = option("with --select: size of the largest set; default: the largest budget of the protocol")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_model(self, self.model)
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"--samples must be at least 1, not {self.samples}")
        if self.select is not None:
            check_choice("phase", self.select, PHASES)
        if self.up_to is not None and (self.select is None or self.up_to < 1):
            raise ValueError(f"--up-to needs --select and must be at least 1; given: {self.up_to}")
        if self.tasks is not None and self.select is None:
            raise ValueError(
                f"--tasks are the tasks for --select; importance is measured on {self.setup.calibration_task}: "
                f"give --select, too, or leave --tasks out; given: {' '.join(self.tasks)}"
            )


@dataclass(frozen=True, kw_only=True)
class GridConfig(WorkConfig):
    """Options of many cells: every combination of models, phases, strategies and budgets."""

    models: tuple[str, ...] = option(MODEL_HELP, MODELS)
    phases: tuple[str, ...] = option(f"of {', '.join(PHASES)}", PHASES)
    strategies: tuple[str, ...] = option(
        lambda: f"of {', '.join(SHORT_NAMES)}, or package.module:Class", lambda: tuple(GRID_STRATEGIES)
    )
    budgets: tuple[int, ...] | None = option("budgets in sublayers; default: the three of the protocol")
    jobs: int | None = option("number of parallel cells; default: with --testbed on a CPU one per core, else one")
    dry_run: bool = option("print the state and estimated cost of all cells, without loading or running any", False)
    estimate_for: str = option(f"GPU for which the dry run estimates times: {', '.join(known_devices())}", "L20")

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


def check_model(config: SharedConfig, model: str) -> None:
    """Raise ValueError if `--model` cannot be `model` with the other options; reads and downloads nothing."""
    if config.testbed:
        check_choice("model of --testbed", model, FAMILIES)
    find_source(model, config.checkpoint)


def _refuse_repeats(what: str, given: Sequence[str | int]) -> None:
    repeated = [str(name) for name in dict.fromkeys(given) if given.count(name) > 1]
    if repeated:
        raise ValueError(f"{what} given more than once: {', '.join(repeated)}")
