"""The models of `configs/models.yaml`: their weights, prompt limits, chat wrappers and end tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from adaskip.common.configs import load_yaml
from adaskip.models.chat import check_chat
from adaskip.models.errors import ModelError


@dataclass(frozen=True)
class ModelEntry:
    """One model of `configs/models.yaml`, which explains the fields."""

    checkpoint: str
    max_prompt_tokens: int
    revision: str = "main"
    chat: str = "none"
    stop_tokens: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()
    protocol: str | None = None
    shape: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_chat(self.chat)
        if self.max_prompt_tokens < 2:
            raise ModelError(f"max_prompt_tokens of {self.checkpoint} must be at least 2, not {self.max_prompt_tokens}")
        object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))


@lru_cache(maxsize=1)
def registry() -> dict[str, ModelEntry]:
    """The models of `configs/models.yaml` by name."""
    known = {field.name for field in fields(ModelEntry)}
    entries = {}
    for name, values in load_yaml("models").items():
        if unknown := sorted(set(values) - known):
            raise ModelError(f"configs/models.yaml: unknown field {unknown[0]!r} of {name}; known: {sorted(known)}")
        entries[name] = ModelEntry(**values)
    return entries


def unknown_model(given: str) -> ModelError:
    """The error for a model that is neither a name of the registry nor weights; suggests the nearest name."""
    close = get_close_matches(given.lower(), registry(), n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ModelError(
        f"unknown model {given!r}.{hint} Allowed: {', '.join(registry())}, a Hub id org/name[@revision], a local "
        "folder, or a .gguf file"
    )
