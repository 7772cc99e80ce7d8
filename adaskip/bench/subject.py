"""The model under test: a checkpoint, an embedded testbed model, or a bare architecture filled with random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from adaskip import testbed
from adaskip.bench.settings import SMALL_MODEL, BenchConfig
from adaskip.bench.skip_sets import assumed_profile
from adaskip.blocks import decoder_layers
from adaskip.fingerprint import weights_fingerprint
from adaskip.importance import ImportanceProfile
from adaskip.models import LoadedModel, architecture, load_model
from adaskip.rope import fix_dynamic_rope
from adaskip.runs import profiles
from adaskip.runs.config import SharedConfig

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
    """A model that never ends an answer by itself, and the profile AdaSkip chooses by."""

    model: PreTrainedModel
    profile: ImportanceProfile
    weights: str
    """random, or the weights' fingerprint"""

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
            "attn_implementation": model.config._attn_implementation,
            "profile": f"{self.profile.dataset} ({self.profile.tokens} tokens)"
            if self.profile.data_ids
            else self.profile.dataset,
        }


def load_subject(config: BenchConfig) -> Subject:
    """The model and profile a configuration asks for.

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
    else:
        loaded = _load(config, device)
        model, weights = loaded.model, weights_fingerprint(loaded.model)
        profile = _named_profile(config, model) or _own_profile(config, loaded)
    return Subject(model, profile, weights)


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
    return load_model(
        config.model,
        checkpoint,
        device=device,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        chat="none",
    )


def _named_profile(config: BenchConfig, model: PreTrainedModel) -> ImportanceProfile | None:
    """The profile of `--profile`; for random weights any of a model of that depth serves."""
    if config.profile is None:
        return None
    if not Path(config.profile).is_file():
        raise ValueError(f"--profile {config.profile} does not exist; `adaskip calibrate` makes one")
    profile = ImportanceProfile.load(config.profile, None if config.random_weights else model)
    profile.check_num_layers(len(decoder_layers(model)))
    return profile


def _own_profile(config: BenchConfig, loaded: LoadedModel) -> ImportanceProfile:
    """The testbed's models are calibrated at once; for others that takes LongBench, so their set is assumed."""
    if not config.testbed:
        return assumed_profile(len(decoder_layers(loaded.model)))
    shared = SharedConfig(testbed=True)
    return profiles.measure(shared, loaded, shared.setup.calibration_samples)
