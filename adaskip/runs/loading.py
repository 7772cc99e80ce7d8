"""How a model is loaded; the last one stays loaded, so that cells of one model share it."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from adaskip import testbed
from adaskip.models.loading import (
    LoadedModel,
    ModelSource,
    find_source,
    load_source,
    placement,
    positions_limit,
    prompt_limit,
)
from adaskip.roofline import ModelShape
from adaskip.runs.config import SharedConfig

_held: dict[tuple[Any, ...], LoadedModel] = {}
"""The last model, by all that it was loaded with."""


@dataclass(frozen=True)
class Loading:
    """A model that is not loaded yet: its weights, where they go, and how it is prompted.

    chat: `none`, `template` or a text with `{prompt}`. limit: longest prompt before wrapping, None for the model's own.
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
        """For estimates."""
        return ModelShape.of(self.source.config)

    @cached_property
    def max_prompt_tokens(self) -> int:
        """Longest prompt before wrapping."""
        return self.limit or prompt_limit(self.source.config, self.source.entry)

    @property
    def placement(self) -> dict[str, Any]:
        """dtype and device map; ModelError if they are not to be had here."""
        return placement(self.device, self.dtype, self.device_map)

    def check_limit(self) -> None:
        """ValueError if the given limit is more than the model was made to read."""
        most = positions_limit(self.source.config)
        if self.limit is not None and most is not None and self.limit > most:
            raise ValueError(
                f"--max-prompt-tokens {self.limit} is more than {self.source.name} was made for: its positions less "
                f"the room for an answer allow at most {most}"
            )

    def load(self) -> LoadedModel:
        """The loaded model. Another one is let go of first: two of them may not fit into memory."""
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


def _release() -> None:
    _held.clear()
    gc.collect()  # a model holds itself in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def find_loading(config: SharedConfig, model: str, max_prompt_tokens: int | None = None) -> Loading:
    """What a configuration says of loading the model that it calls `model`; nothing is read or downloaded yet.

    Raises:
        ModelError: there is no such model.
    """
    own = str(testbed.checkpoint_dir(model)) if config.testbed and config.checkpoint is None else None
    source = find_source(model, config.checkpoint or own)
    setup = config.setup_of(source.entry)
    limit = max_prompt_tokens or setup.longest_prompt_tokens
    if config.testbed and limit is None:
        # The testbed's prompts were made for its models, so that a limit below the registry's is nothing to warn of.
        limit = prompt_limit(source.config, source.entry)
    return Loading(
        source,
        device=config.device,
        dtype=config.dtype or setup.dtype,
        attn_implementation=config.attn_implementation,
        device_map=config.device_map,
        chat=config.chat or ("none" if config.testbed else source.chat),  # the testbed's models saw bare prompts only
        limit=limit,
    )
