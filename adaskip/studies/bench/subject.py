"""The model under test: a checkpoint, an embedded testbed model, or a bare architecture filled with random numbers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from adaskip.benchmarks.protocol import BENCHMARKS
from adaskip.core.blocks import decoder_layers
from adaskip.core.hf import attn_implementation
from adaskip.core.packed_sdpa import register_packed
from adaskip.core.plan import Phase, check_phase
from adaskip.models.gguf_file import is_gguf
from adaskip.models.loading import LoadedModel, architecture, load_model
from adaskip.models.rope import fix_dynamic_rope
from adaskip.models.source import find_source
from adaskip.profiles.assumed import assumed_profile
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from adaskip.runs import profiles
from adaskip.runs.calibration import find_calibration
from adaskip.runs.config import RunConfig, SharedConfig
from adaskip.runs.job import find_profile, resolve
from adaskip.runs.loading import find_loading
from adaskip.strategies import CalibratedSkip, needs_selection
from adaskip.studies.bench.settings import SMALL_MODEL, BenchConfig

logger = logging.getLogger(__name__)

STD = 0.02  # the usual initialisation of these models
SMALL_SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 640,
    "intermediate_size": 1792,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "max_position_embeddings": 32768,
}


@dataclass(frozen=True)
class Subject:
    """A model that never ends an answer by itself, and the profiles strategies choose by."""

    model: PreTrainedModel
    profile: ImportanceProfile
    weights: str
    """random, or the weights' fingerprint"""
    selections: Mapping[Phase, SelectionProfile | None] = field(default_factory=dict)
    """What strategy calibrated skips in each phase that is timed; None: AdaSkip's sets."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """None for random weights."""
    gguf_file: Path | None = None
    """What the model was read from, if that is a GGUF file."""

    def __post_init__(self) -> None:
        self.model.generation_config = GenerationConfig(pad_token_id=0)  # no end token: answers have their full length

    @property
    def num_layers(self) -> int:
        return len(decoder_layers(self.model))

    def describe(self) -> dict[str, Any]:
        """What stands in a result's manifest."""
        model, profile = self.model, self.profile
        chosen = {
            phase: "AdaSkip's sets" if found is None else f"{found.dataset} ({len(found.data_ids)} prompts)"
            for phase, found in self.selections.items()
        }
        return {
            "weights": self.weights,
            "num_layers": self.num_layers,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": attn_implementation(model),
            "profile": f"{profile.dataset} ({profile.tokens} tokens)" if profile.data_ids else profile.dataset,
            "selections": chosen,
        }


def load_subject(config: BenchConfig) -> Subject:
    """The model and profiles a configuration asks for.

    Raises:
        ModelError: the checkpoint, device or dtype cannot be used.
        ValueError: the profile is missing or is of another model.
    """
    device, loaded = chosen_device(config.device), None
    if config.random_weights:
        dtype = getattr(torch, config.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
        shape = LlamaConfig(**SMALL_SHAPE) if config.model == SMALL_MODEL else architecture(config.model)
        model, weights = random_model(shape, device, dtype, config.attn_implementation), "random"
    else:
        loaded = _load(config, device)
        model, weights = loaded.model, loaded.weights_fingerprint
    profile = _named_profile(config, model) or _own_profile(config, loaded, len(decoder_layers(model)))
    tokenizer = None if loaded is None else loaded.tokenizer
    return Subject(model, profile, weights, _selections(config, model, loaded), tokenizer, _gguf_file(config))


def chosen_device(name: str | None) -> torch.device:
    """The torch device of that name, or cuda where there is one, else the CPU; ValueError if there is none such."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; allowed: cpu, cuda, cuda:0, ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name} asked for, but torch {torch.__version__} sees no CUDA device; use cpu")
    return device


@torch.no_grad()
def random_model(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """The architecture with N(0, 0.02) weights, allocated and filled on `device` itself."""
    register_packed()
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, STD)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    fix_dynamic_rope(model)
    return model.eval().requires_grad_(False)


def _gguf_file(config: BenchConfig) -> Path | None:
    if config.random_weights or config.testbed:
        return None
    path = find_source(config.model, config.checkpoint).path
    return path if is_gguf(path) else None


def _load(config: BenchConfig, device: torch.device) -> LoadedModel:
    options = {"device": device, "dtype": config.dtype, "attn_implementation": config.attn_implementation}
    if config.benchmark is None:
        return load_model(config.model, config.checkpoint, chat="none", **options)
    limit = find_loading(SharedConfig(benchmark=config.benchmark), config.model).max_prompt_tokens
    folder = BENCHMARKS.find(config.benchmark).checkpoint(config.model)
    return load_model(config.model, folder, chat="none", max_prompt_tokens=limit, **options)


def _own_profile(config: BenchConfig, loaded: LoadedModel | None, depth: int) -> ImportanceProfile:
    """A benchmark's own models are calibrated at once; for others that takes data, so their set is assumed."""
    if loaded is None or config.benchmark is None:
        return assumed_profile(depth)
    return profiles.measure_importance(find_calibration(SharedConfig(benchmark=config.benchmark)), loaded)


def _named_profile(config: BenchConfig, model: PreTrainedModel) -> ImportanceProfile | None:
    """The profile of `--profile`; for random weights any of a model of that depth serves."""
    if config.profile is None:
        return None
    path, fitting = find_profile(config.profile, ImportanceProfile), None if config.random_weights else model
    profile = ImportanceProfile.load(path, fitting, allow_other_weights=config.allow_other_weights)
    profile.check_num_layers(len(decoder_layers(model)))
    return profile


def _selections(
    config: BenchConfig, model: PreTrainedModel, loaded: LoadedModel | None
) -> dict[Phase, SelectionProfile | None]:
    """The selection of each phase: what `--selection` names, the testbed's kept one, or None."""
    if config.study != "strategies" or not any(map(needs_selection, config.strategies)):
        return {}
    named = _named_selections(config, model)
    found: dict[Phase, SelectionProfile | None] = {}
    for phase in map(check_phase, config.phases):
        found[phase] = named.get(phase)
        if phase not in named and config.benchmark and loaded is not None:
            found[phase] = _kept_selection(config, loaded, phase)
    return found


def _named_selections(config: BenchConfig, model: PreTrainedModel) -> dict[Phase, SelectionProfile]:
    """The selections of `--selection` by phase."""
    named: dict[Phase, SelectionProfile] = {}
    fitting = None if config.random_weights else model
    for path in config.selection or ():
        if not Path(path).is_file():
            raise ValueError(f"--selection {path} does not exist; `adaskip calibrate --select PHASE` makes one")
        selection = SelectionProfile.load(path, fitting, allow_other_weights=config.allow_other_weights)
        if selection.phase in named or selection.phase not in config.phases:
            raise ValueError(
                f"--selection {path} is for phase {selection.phase}; give at most one for each of --phases "
                f"{' '.join(config.phases)}"
            )
        named[selection.phase] = selection
    return named


def _kept_selection(config: BenchConfig, loaded: LoadedModel, phase: Phase) -> SelectionProfile:
    """The selection `adaskip grid --testbed` keeps, searched first when there is none."""
    job = resolve(RunConfig(benchmark=config.benchmark, model=config.model, phase=phase, strategy=CalibratedSkip.name))
    if not (path := profiles.kept_path(job, loaded)).is_file():
        logger.info("searching %s for strategy calibrated, which takes minutes", path)
    selection, _ = profiles.profile_for(job, loaded)
    assert isinstance(selection, SelectionProfile)
    return selection
