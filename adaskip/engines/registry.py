"""The engines that a model can be exported to, by name; each is a module, imported when it is asked for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from transformers import PreTrainedTokenizerBase

from adaskip.common.choices import check_choice
from adaskip.core.strategy import Strategy
from adaskip.engines.checkpoint import Checkpoint
from adaskip.engines.fold import Folded, fold

ENGINES = {
    "hf": "adaskip.engines.hf_export",
    "vllm": "adaskip.engines.vllm_export",
    "gguf": "adaskip.engines.gguf_export",
}
"""What `adaskip export --to` takes, and the module with the functions of `Engine`."""
WEIGHTS = ("f32", "f16", "bf16", "q8_0")
"""What the weights of a GGUF file can be written as."""


@dataclass(frozen=True, eq=False)
class Export:
    """What is exported: a model under a strategy that is one plan.

    source: its checkpoint. gguf_file: the GGUF file that the checkpoint was made of, if it was. tokenizer: for a GGUF
    file made of a checkpoint, where None leaves it out; of a folder it takes the place of the checkpoint's own.
    weights_type: of `WEIGHTS`; None: the source's own.
    """

    strategy: Strategy
    source: Checkpoint
    gguf_file: Path | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    weights_type: str | None = None

    @property
    def folded(self) -> Folded:
        """Raises ExportError where the strategy cannot be exported."""
        return fold(self.strategy)


class Engine(Protocol):
    """The functions of an engine's module."""

    def check(self, export: Export) -> None:
        """Raise ExportError if the engine cannot run this; before anything is written."""

    def write(self, export: Export, target: Path) -> None:
        """Fill the folder `target`, which exists and is empty; with `SUFFIX` among the module's names, that file."""

    def verify(self, export: Export, target: Path) -> dict[str, Any]:
        """Compare what was written with the plan on a prompt; what was found, for the report.

        Raises ExportError if they differ by more than rounding.
        """
        ...


def engine(name: str) -> Engine:
    """The module of an engine. Raises ValueError for an unknown name, MissingPackageError for a missing package."""
    return cast(Engine, importlib.import_module(ENGINES[check_choice("engine", name, ENGINES)]))
