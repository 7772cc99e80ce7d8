"""`adaskip plan`, `show` and `export`: save a plan, show it, and export its model to an inference engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from adaskip.common.choices import check_choice
from adaskip.common.files import check_writable
from adaskip.common.folders import scratch_folder
from adaskip.common.named_files import find_file, published, read_format
from adaskip.common.options import check_options, option
from adaskip.core.fingerprint import portable_fingerprint
from adaskip.core.model_plan import check_plan, check_steady, make_plan
from adaskip.core.plan import PHASES, PLAN_FILE, Budget, SkipPlan
from adaskip.core.plan_card import CARD_FILE, check_card, plan_map, summary
from adaskip.core.same_model import identity
from adaskip.core.strategy import FixedPlan, Strategy
from adaskip.engines.checkpoint import Checkpoint, save_in_memory
from adaskip.engines.errors import ExportError
from adaskip.engines.export import export_to
from adaskip.engines.registry import ENGINES, WEIGHTS, Export
from adaskip.models.checkpoints import check_weights
from adaskip.models.companion_files import TOKENIZER_FILES
from adaskip.models.loading import exportable_tokenizer, load_source, load_tokenizer
from adaskip.models.source import ModelSource, named_source
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import METHODS, SelectionProfile
from adaskip.roofline import known_ceilings, known_devices
from adaskip.runs.config import RunConfig, StrategyConfig
from adaskip.runs.job import Job, Profile, resolve
from adaskip.runs.loading import prepare_torch
from adaskip.runs.manifest import compensation_samples
from adaskip.runs.pareto import NEW_TOKENS
from adaskip.runs.profiles import find_compensation, profile_for
from adaskip.runs.speedup import choose_target
from adaskip.strategies import build, strategy_class


@dataclass(frozen=True, kw_only=True)
class PlanConfig(StrategyConfig):
    """A plan to be saved: the set of a strategy for a model."""

    phase: str = option(f"phase in which sublayers are skipped: {', '.join(PHASES)}", "e2e")
    output: str = option("folder that the plan is written to, with a model card", required=True)
    base_model: str | None = option("what the plan calls its model, as a Hub id; if not given, what --model names")

    def __post_init__(self) -> None:
        if self.keep_kv:
            raise ValueError(
                "--keep-kv applies to runs, not to a saved plan, which cannot say that skipping ends with the prompt; "
                "allowed: skipping(model, strategy) with keep_kv=True"
            )
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """A saved plan or profile to be shown."""

    plan: str | None = option(
        "folder or file of a plan or profile, org/name on the Hub, or a published name (default: list these)",
        positional=True,
    )
    plot: str | None = option("also draw the plan into this file (.png, .svg or .pdf)")
    prompt_tokens: tuple[int, ...] | None = option(
        "of a selection: the sets on the Pareto front of divergence and predicted speedup for prompts of these lengths",
        least=1,
        distinct=True,
    )
    new_tokens: int | None = option(f"with --prompt-tokens: length of the answers; default: {NEW_TOKENS}", least=1)
    speedup_on: str | None = option(
        f"GPU for which --prompt-tokens predicts: {', '.join(known_devices())}; default: this device, whose ceilings "
        "are measured"
    )
    model: str | None = option(
        "with --prompt-tokens: the selection's model, of which only the configuration is read: a name, Hub id, folder "
        "or .gguf file; default: the one that it names"
    )

    def __post_init__(self) -> None:
        check_options(self)
        given = [name for name in ("new_tokens", "speedup_on", "model") if getattr(self, name) is not None]
        if given and self.prompt_tokens is None:
            raise ValueError(f"--{given[0].replace('_', '-')} needs --prompt-tokens, which it applies to")
        if self.prompt_tokens is not None and (self.plan is None or self.plot is not None):
            raise ValueError("--prompt-tokens is for one selection, as adaskip show SELECTION, without --plot")
        if self.speedup_on is not None:
            known_ceilings(self.speedup_on)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A saved plan and the engine that its model is exported to."""

    plan: str = option(
        "folder or file of a plan, org/name on the Hub, or a published name", required=True, positional=True
    )
    to: str = option(f"engine: {', '.join(ENGINES)}", required=True)
    output: str = option("output to create: a folder, or for gguf a file", required=True)
    weights: str | None = option(
        f"type of the weights in a GGUF file made of a folder: {', '.join(WEIGHTS)}; if not given, the folder's"
    )
    tokenizer: bool = option(
        "put the checkpoint's tokenizer into the GGUF file; without it the file takes token ids", True
    )
    model: str | None = option(
        "weights of the model: a Hub id, a folder or a .gguf file; if not given, what the plan was made for"
    )
    allow_other_weights: bool = option("the model may have other weights than the one the plan was made for", False)
    verify: bool = option("load both models afterwards, in float32 one by one, and compare their logits", True)

    def __post_init__(self) -> None:
        check_choice("engine", self.to, ENGINES)
        if self.weights is not None:
            check_choice("type of weights", self.weights, WEIGHTS)
        if self.to != "gguf" and (self.weights is not None or not self.tokenizer):
            raise ValueError(f"--weights and --no-tokenizer apply to GGUF files only, not to {self.to}")


def plan_to(config: PlanConfig) -> tuple[SkipPlan, Path]:
    """`adaskip plan`: make a plan and save it. Returns it and its folder.

    AdaSkip's online learning is off by default; asking for it is refused, since a saved plan is fixed.
    """
    prepare_torch(config)
    job = resolve(RunConfig(**{field.name: getattr(config, field.name) for field in fields(StrategyConfig)}))
    source = job.loading.source
    if job.strategy == "full":
        raise ValueError("the full model skips nothing and has no plan; give another strategy")
    source.check()
    folder = Path(config.output).absolute()
    check_writable((folder if folder.is_dir() else folder.parent) / PLAN_FILE)
    check_card(folder / CARD_FILE)
    if job.speedup is not None:
        job = job.with_sublayers(choose_target(job, job.speedup).sublayers)
    compensation_samples(job)  # reads them before the model is loaded
    if job.calibration is None or job.given_profile is not None:
        _strategy(job, job.given_profile)  # which is refused, if at all, before the model is loaded
    loaded = job.loading.load()
    strategy = _strategy(job, None if job.calibration is None else profile_for(job, loaded)[0])
    plan = make_plan(
        loaded.model,
        strategy,
        base_model=config.base_model or source.checkpoint,
        allow_other_weights=job.allow_other_weights,
    )
    if (compensate := find_compensation(job, loaded)) is not None:
        assert plan.origin is not None, "make_plan gives one"
        fitted = {"compensation": compensate.kind, "compensation_samples": compensation_samples(job)}
        options = {**plan.origin.options, **fitted}
        plan = replace(compensate(plan), origin=replace(plan.origin, options=options))
    return plan, plan.save_pretrained(config.output)


def _strategy(job: Job, profile: Profile | None) -> Strategy:
    """The strategy of the plan, without learning unless that was asked for; ValueError if its set changes."""
    learns = "learning_window" in {field.name for field in fields(strategy_class(job.strategy))}
    options = {**({"learning_window": 0} if learns else {}), **job.strategy_options}
    budget = Budget(sublayers=job.sublayers)
    depth = job.loading.num_layers
    strategy = build(job.strategy, phase=job.phase, budget=budget, num_layers=depth, profile=profile, **options)
    assert strategy is not None, "only the full model has no strategy"
    check_steady(strategy)
    return strategy


def shown(name: str | None) -> list[str]:
    """`adaskip show`: the lines of a plan or profile, or without a name the published names."""
    if name is None:
        return list(published()) or ["nothing is published"]
    path = find_file(name, PLAN_FILE)
    for kind in (ImportanceProfile, SelectionProfile):
        if read_format(path) == kind.FORMAT:
            return _profile_lines(kind.load(path))
    plan = SkipPlan.load(path)
    if plan.origin is None:
        depth = 1 + max(plan.attention | plan.ffn, default=0)
        kept = ", skipped only while a prompt is read (keeps_kv)" if plan.keeps_kv else ""
        return [f"a plan of {len(plan)} sublayers that names no model{kept}", *plan_map(plan, depth).splitlines()]
    rows = summary(plan, plan.origin)
    return [*_aligned(rows), "", *plan_map(plan, plan.origin.num_layers).splitlines()]


def _profile_lines(profile: ImportanceProfile | SelectionProfile) -> list[str]:
    """What the profile was measured on, then the similarities by layer or the selected set of each budget."""
    names = ("model", "phase", "dataset", "dtype", "attn_implementation", "weights_fingerprint", "hidden_size")
    lines = _aligned({name: str(getattr(profile, name)) for name in names})
    if isinstance(profile, SelectionProfile):
        made = {"method": profile.method, **profile.settings, **({"keep_kv": True} if profile.keep_kv else {})}
        lines += _aligned({name: str(value) for name, value in made.items()})
        criterion, sets = METHODS[profile.method].criterion, profile.selected.items()
        return [*lines, *(f"{n:3} sublayers  {criterion.format(s.divergence)}  {s.plan.to_dict()}" for n, s in sets)]
    pairs = zip(profile.attention.similarity, profile.ffn.similarity, strict=True)
    rows = (f"{layer:5}  {attention:9.4f}  {ffn:7.4f}" for layer, (attention, ffn) in enumerate(pairs))
    return [*lines, "layer  attention      FFN  (IO similarity)", *rows]


def _aligned(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"{heading:{width}}  {text}" for heading, text in rows.items()]


def export_plan(config: ExportConfig) -> dict[str, Any]:
    """`adaskip export`: write the model of a plan for an engine. Returns the report."""
    plan = SkipPlan.load(find_file(config.plan, PLAN_FILE))
    with _export(plan, config) as export:
        return export_to(config.to, export, config.output, verify=config.verify)


@contextmanager
def _export(plan: SkipPlan, config: ExportConfig) -> Iterator[Export]:
    """The export of a plan; weights from GGUF are first saved as safetensors in a scratch folder beside the output."""
    source = _source(plan, config)
    depth, phase = (source.num_layers, "e2e") if plan.origin is None else (plan.origin.num_layers, plan.origin.phase)
    strategy = FixedPlan(num_layers=depth, phase=phase, plan=plan)
    kind = check_weights(source.path)
    if kind == "bin":
        raise ExportError(f"{source.path} holds .bin weights; allowed: safetensors, or a .gguf file")
    if kind == "safetensors":
        checkpoint = Checkpoint(source.path, source.own_config)
        _check(plan, lambda: checkpoint.identity, source.num_layers, config)
        yield Export(strategy, checkpoint, tokenizer=_tokenizer(source.path, config), weights_type=config.weights)
        return
    if config.to == "gguf":
        if not config.tokenizer:
            raise ExportError(f"--no-tokenizer is for folders; {source.path} is a GGUF file, whose tokenizer is copied")
        from adaskip.engines.gguf_identity import gguf_identity  # the package gguf is of an extra

        checkpoint = Checkpoint(source.path.parent, source.own_config)
        _check(plan, lambda: gguf_identity(source.path, source.own_config), source.num_layers, config)
        yield Export(strategy, checkpoint, gguf_file=source.path, weights_type=config.weights)
        return
    loaded = load_source(source, device="cpu", dtype="float32")
    known = identity(loaded.model, fingerprint=portable_fingerprint(loaded.model))
    _check(plan, lambda: known, source.num_layers, config)
    with scratch_folder(Path(config.output).absolute(), "-source") as folder:
        checkpoint = save_in_memory(loaded.model, loaded.tokenizer, folder)
        del loaded
        yield Export(strategy, checkpoint, gguf_file=source.path)


def _tokenizer(folder: Path, config: ExportConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer to write: of any model to a GGUF file, else InternLM's as a stock one; None to write none, or where
    the files of the folder are copied."""
    has_one = any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)
    if not config.tokenizer or not has_one:
        return None
    if config.to == "gguf":
        return load_tokenizer(folder)
    return exportable_tokenizer(folder)


def _source(plan: SkipPlan, config: ExportConfig) -> ModelSource:
    name = config.model or (plan.origin.model if plan.origin is not None else None)
    if name is None:
        raise ValueError(f"{config.plan} names no model: give --model")
    return named_source(name)


def _check(plan: SkipPlan, known: Callable[[], Mapping[str, Any]], num_layers: int, config: ExportConfig) -> None:
    """Refuse a plan that was made for another model; this reads all weights."""
    if plan.origin is not None:
        check_plan(plan.origin, known(), num_layers, allow_other_weights=config.allow_other_weights)
