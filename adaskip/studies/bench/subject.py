"""The model under test: a checkpoint, an embedded testbed model, or a bare architecture filled with random numbers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from adaskip import testbed
from adaskip.core.blocks import decoder_layers
from adaskip.core.hf import attn_implementation
from adaskip.core.packed_sdpa import register_packed
from adaskip.core.plan import Phase, check_phase
from adaskip.models.loading import LoadedModel, architecture, load_model
from adaskip.models.rope import fix_dynamic_rope
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

    def __post_init__(self) -> None:
        self.model.generation_config = GenerationConfig(pad_token_id=0)  # no end token: answers have their full length

    @property
    def num_layers(self) -> int:
        return len(decoder_layers(self.model))

    def describe(self) -> dict[str, Any]:
        """What stands in a result's manifest."""
        model = self.model
        return {
            "weights": self.weights,
            "num_layers": self.num_layers,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": attn_implementation(model),
            "profile": f"{self.profile.dataset} ({self.profile.tokens} tokens)"
            if self.profile.data_ids
            else self.profile.dataset,
            "selections": {phase: _of_selection(found) for phase, found in self.selections.items()},
        }


def load_subject(config: BenchConfig) -> Subject:
    """The model and profiles a configuration asks for.

    Raises:
        ModelError: the checkpoint, device or dtype cannot be used.
        ValueError: the profile is missing or is of another model.
    """
    device = chosen_device(config.device)
    if config.random_weights:
        dtype = getattr(torch, config.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
        shape = LlamaConfig(**SMALL_SHAPE) if config.model == SMALL_MODEL else architecture(config.model)
        model, weights = random_model(shape, device, dtype, config.attn_implementation), "random"
        profile = _named_profile(config, model) or assumed_profile(len(decoder_layers(model)))
        loaded = None
    else:
        loaded = _load(config, device)
        model, weights = loaded.model, loaded.weights_fingerprint
        profile = _named_profile(config, model) or _own_profile(config, loaded)
    return Subject(model, profile, weights, _selections(config, model, loaded))


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


def _load(config: BenchConfig, device: torch.device) -> LoadedModel:
    checkpoint: str | Path | None = testbed.checkpoint_dir(config.model) if config.testbed else config.checkpoint
    shared = SharedConfig(testbed=True)
    return load_model(
        config.model,
        checkpoint,
        device=device,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        chat="none",
        max_prompt_tokens=find_loading(shared, config.model).max_prompt_tokens if config.testbed else None,
    )


def _named_profile(config: BenchConfig, model: PreTrainedModel) -> ImportanceProfile | None:
    """The profile of `--profile`; for random weights any of a model of that depth serves."""
    if config.profile is None:
        return None
    path = find_profile(config.profile, ImportanceProfile)
    fitting, allowed = None if config.random_weights else model, config.allow_other_weights
    profile = ImportanceProfile.load(path, fitting, allow_other_weights=allowed)
    profile.check_num_layers(len(decoder_layers(model)))
    return profile


def _own_profile(config: BenchConfig, loaded: LoadedModel) -> ImportanceProfile:
    """The testbed's models are calibrated at once; for others that takes LongBench, so their set is assumed."""
    if not config.testbed:
        return assumed_profile(len(decoder_layers(loaded.model)))
    return profiles.measure_importance(find_calibration(SharedConfig(testbed=True)), loaded)


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
        if phase not in named and config.testbed and loaded is not None:
            found[phase] = _kept_selection(config, loaded, phase)
    return found


def _named_selections(config: BenchConfig, model: PreTrainedModel) -> dict[Phase, SelectionProfile]:
    """The selections of `--selection` by phase; for random weights any of a model of that depth serves."""
    named: dict[Phase, SelectionProfile] = {}
    for path in config.selection or ():
        if not Path(path).is_file():
            raise ValueError(f"--selection {path} does not exist; `adaskip calibrate --select PHASE` makes one")
        fitting, allowed = None if config.random_weights else model, config.allow_other_weights
        selection = SelectionProfile.load(path, fitting, allow_other_weights=allowed)
        if selection.phase in named or selection.phase not in config.phases:
            raise ValueError(
                f"--selection {path} is for phase {selection.phase}; give at most one for each of --phases "
                f"{' '.join(config.phases)}"
            )
        named[selection.phase] = selection
    return named


def _kept_selection(config: BenchConfig, loaded: LoadedModel, phase: Phase) -> SelectionProfile:
    """The selection `adaskip grid --testbed` keeps, searched first when there is none."""
    job = resolve(RunConfig(testbed=True, model=config.model, phase=phase, strategy=CalibratedSkip.name))
    if not (path := profiles.kept_path(job, loaded)).is_file():
        logger.info("searching %s for strategy calibrated, which takes minutes", path)
    selection, _ = profiles.profile_for(job, loaded)
    assert isinstance(selection, SelectionProfile)
    return selection


def _of_selection(selection: SelectionProfile | None) -> str:
    return "AdaSkip's sets" if selection is None else f"{selection.dataset} ({len(selection.data_ids)} prompts)"
