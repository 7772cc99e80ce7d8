"""Loads models, and keeps the last one loaded, so that cells of one model share it."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from adaskip.benchmarks.protocol import BENCHMARKS
from adaskip.models.loading import LoadedModel, load_source, placement, positions_limit, prompt_limit
from adaskip.models.source import ModelSource, find_source
from adaskip.roofline import ModelShape
from adaskip.runs.config import SharedConfig

_held: dict[tuple[Any, ...], LoadedModel] = {}
"""The last loaded model, by all arguments it was loaded with."""


@dataclass(frozen=True)
class Loading:
    """How to load a model: its weights, their device and dtype, and how prompts are built.

    chat: `none`, `template` or a text with `{prompt}`. limit: maximum prompt length in tokens before the chat wrapper
    is added; None for the model's own limit.
    """

    source: ModelSource
    device: str | None
    dtype: str | None
    attn_implementation: str
    device_map: str | None
    chat: str
    limit: int | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.source.num_layers

    @cached_property
    def shape(self) -> ModelShape:
        """The dimensions of the model, for estimates."""
        return ModelShape.of(self.source.config)

    @cached_property
    def max_prompt_tokens(self) -> int:
        """Maximum prompt length in tokens, before the chat wrapper is added."""
        return self.limit or prompt_limit(self.source.config, self.source.entry)

    @property
    def placement(self) -> dict[str, Any]:
        """dtype and device map; ModelError if this machine does not have the device."""
        return placement(self.device, self.dtype, self.device_map)

    def check_limit(self) -> None:
        """Raise ValueError if the given limit exceeds the positions of the model."""
        most = positions_limit(self.source.config)
        if self.limit is not None and most is not None and self.limit > most:
            raise ValueError(
                f"--max-prompt-tokens {self.limit} is too large for {self.source.name}: its positions, minus those "
                f"reserved for an answer, allow at most {most}"
            )

    def load(self) -> LoadedModel:
        """Load the model, or return it if it is already loaded. Another model is released first, to save memory."""
        options: dict[str, Any] = {
            "device": self.device,
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "device_map": self.device_map,
            "chat": self.chat,
            "max_prompt_tokens": self.limit,
        }
        key = (self.source.name, self.source.checkpoint, *options.values())
        if key not in _held:
            _release()
            _held[key] = load_source(self.source, **options)
        return _held[key]


def prepare_torch(config: SharedConfig) -> None:
    """Set the threads, if they are given, and the seed."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)


def _release() -> None:
    _held.clear()
    gc.collect()  # models contain reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def find_loading(config: SharedConfig, model: str, max_prompt_tokens: int | None = None) -> Loading:
    """How to load the model that a configuration names `model`; nothing is read or downloaded yet.

    Raises:
        ModelError: there is no such model.
    """
    benchmark = BENCHMARKS.find(str(config.benchmark))
    own = benchmark.checkpoint(model) if config.checkpoint is None else None
    source = find_source(model, config.checkpoint or own)
    setup = config.setup_of(source.entry)
    limit = max_prompt_tokens or setup.longest_prompt_tokens
    if benchmark.models and limit is None:
        # Its prompts were made for its models, so a limit below the registry's needs no warning.
        limit = prompt_limit(source.config, source.entry)
    return Loading(
        source,
        device=config.device,
        dtype=config.dtype or setup.dtype,
        attn_implementation=config.attn_implementation,
        device_map=config.device_map,
        chat=config.chat or ("none" if benchmark.models else source.chat),
        limit=limit,
    )
