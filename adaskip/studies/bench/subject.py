"""The model under test: a checkpoint, an embedded testbed model, or a bare architecture filled with random numbers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
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

from adaskip.core.blocks import decoder_layers
from adaskip.core.hf import attn_implementation
from adaskip.core.packed_sdpa import register_packed
from adaskip.core.plan import Phase, check_phase
from adaskip.models.gguf_file import is_gguf
from adaskip.models.loading import LoadedModel, architecture
from adaskip.models.rope import fix_dynamic_rope
from adaskip.profiles.assumed import assumed_profile
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import METHODS, SEARCH, SelectionProfile
from adaskip.runs import profiles
from adaskip.runs.calibration import find_calibration
from adaskip.runs.config import RunConfig, SharedConfig
from adaskip.runs.job import find_profile, resolve
from adaskip.runs.loading import find_loading
from adaskip.runs.manifest import profile_fingerprint
from adaskip.strategies import CalibratedSkip, needs_selection, selection_method
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
    """A model that never ends an answer by itself, and the profiles of the strategies."""

    model: PreTrainedModel
    profile: ImportanceProfile
    weights: str
    """`random`, or the fingerprint of the weights."""
    selections: Mapping[tuple[str, Phase], SelectionProfile | None] = field(default_factory=dict)
    """What a strategy skips in each timed phase; None, for calibrated: AdaSkip's sets."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """None for random weights."""
    gguf_file: Path | None = None
    """The GGUF file that the model was read from, if any."""

    def __post_init__(self) -> None:
        self.model.generation_config = GenerationConfig(pad_token_id=0)  # no end token: answers have their full length

    @property
    def num_layers(self) -> int:
        return len(decoder_layers(self.model))

    def describe(self) -> dict[str, Any]:
        """Its description in the manifest of a result."""
        model, profile = self.model, self.profile
        chosen, peers = {}, {}
        for (strategy, phase), found in self.selections.items():
            made_of = "AdaSkip's sets" if found is None else f"{found.dataset} ({len(found.data_ids)} prompts)"
            made_of += ", for kept K/V" if found is not None and found.keep_kv else ""
            if strategy == CalibratedSkip.name:
                chosen[phase] = made_of
            else:
                peers[f"{strategy}, {phase}"] = made_of
        return {
            "weights": self.weights,
            "num_layers": self.num_layers,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": attn_implementation(model),
            "profile": f"{profile.dataset} ({profile.tokens} tokens)" if profile.data_ids else profile.dataset,
            "selections": chosen,
            "fingerprints": [profile_fingerprint(each) for each in (profile, *self.selections.values()) if each],
            **({"peer_selections": peers} if peers else {}),
        }


def load_subject(config: BenchConfig) -> Subject:
    """The model and the profiles of a configuration.

    Raises:
        ModelError: the checkpoint, device or dtype cannot be used.
        ValueError: the profile is missing or is of another model.
    """
    device = chosen_device(config.device)
    dtype = config.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    if config.random_weights:
        shape = LlamaConfig(**SMALL_SHAPE) if config.model == SMALL_MODEL else architecture(config.model)
        model = random_model(shape, device, getattr(torch, dtype), config.attn_implementation)
        return Subject(model, find_importance(config, model), "random", find_selections(config, model))
    shared = SharedConfig(
        benchmark=config.benchmark,
        checkpoint=config.checkpoint,
        device=str(device),
        dtype=dtype,
        attn_implementation=config.attn_implementation,
        chat="none",
    )
    loading = find_loading(shared, config.model)
    loaded = loading.load()
    model, path = loaded.model, loading.source.path
    return Subject(
        model,
        find_importance(config, model, loaded),
        loaded.weights_fingerprint,
        find_selections(config, model, loaded),
        loaded.tokenizer,
        path if is_gguf(path) else None,
    )


def chosen_device(name: str | None) -> torch.device:
    """The torch device of that name, by default cuda if available, else the CPU; ValueError if it is unavailable."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; allowed: cpu, cuda, cuda:0, ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no CUDA device; use cpu")
    return device


@torch.no_grad()
def random_model(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """A model with N(0, 0.02) weights, allocated and initialised on `device`."""
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


def find_importance(
    config: BenchConfig, model: PreTrainedModel, loaded: LoadedModel | None = None
) -> ImportanceProfile:
    """The profile of `--profile`; else a benchmark's own model is calibrated, and for any other, whose calibration
    takes data, a profile is assumed. Random weights take the profile of any model of their depth."""
    depth = len(decoder_layers(model))
    if config.profile is not None:
        path, fitting = find_profile(config.profile, ImportanceProfile), None if config.random_weights else model
        profile = ImportanceProfile.load(path, fitting, allow_other_weights=config.allow_other_weights)
        profile.check_num_layers(depth)
        return profile
    if loaded is None or config.benchmark is None:
        return assumed_profile(depth)
    return profiles.measure_importance(find_calibration(SharedConfig(benchmark=config.benchmark)), loaded)


def find_selections(
    config: BenchConfig, model: PreTrainedModel, loaded: LoadedModel | None = None
) -> dict[tuple[str, Phase], SelectionProfile | None]:
    """The selection of each strategy that needs one, in each phase: the file of `--selection`; for a benchmark's own
    model the one that its runs keep, made if there is none; else None for strategy calibrated.

    Raises:
        ValueError: a file does not fit, or another strategy has no selection.
    """
    strategies = [name for name in config.strategies if needs_selection(name)] if config.study == "strategies" else []
    phases: list[Phase] = [check_phase(phase) for phase in config.phases]
    given = _given_selections(config, model, phases) if strategies else {}
    found: dict[tuple[str, Phase], SelectionProfile | None] = {}
    for name, phase in product(strategies, phases):
        method = str(selection_method(name))
        found[name, phase] = given.get((method, phase))
        if found[name, phase] is None and config.benchmark and loaded is not None:
            found[name, phase] = _kept_selection(config, loaded, name, phase)
        elif found[name, phase] is None and method != SEARCH:
            raise ValueError(
                f"strategy {name} needs a --selection for phase {phase}; adaskip calibrate --select {phase} --method "
                f"{method} makes one"
            )
    return found


def _given_selections(
    config: BenchConfig, model: PreTrainedModel, phases: Sequence[Phase]
) -> dict[tuple[str, Phase], SelectionProfile]:
    """The selections of `--selection` by method and phase; one whose sets are the same in all phases is for each."""
    methods = {selection_method(name) for name in config.strategies}
    fitting, found = None if config.random_weights else model, {}
    for path in config.selection or ():
        file = find_profile(path, SelectionProfile, "--selection")
        selection = SelectionProfile.load(file, fitting, allow_other_weights=config.allow_other_weights)
        method = selection.method
        if method not in methods:
            raise ValueError(f"--selection {path} was made with method {method}, which no strategy given here uses")
        covered = [selection.phase] if METHODS[method].by_phase else phases
        if any(phase not in phases or (method, phase) in found for phase in covered):
            raise ValueError(
                f"--selection {path} is for phase {selection.phase}; give at most one for each of --phases "
                f"{' '.join(phases)}"
            )
        found |= {(method, phase): selection for phase in covered}
    return found


def _kept_selection(config: BenchConfig, loaded: LoadedModel, strategy: str, phase: Phase) -> SelectionProfile:
    """What the runs of a benchmark's own model keep for a strategy."""
    given = {"benchmark": config.benchmark, "model": config.model, "keep_kv": config.keep_kv}
    job = resolve(RunConfig(**given, phase=phase, strategy=strategy))
    if not (path := profiles.kept_path(job, loaded)).is_file():
        logger.info("searching %s for strategy %s, which takes minutes", path, strategy)
    kept, _ = profiles.profile_for(job, loaded)
    assert isinstance(kept, SelectionProfile)
    return kept
