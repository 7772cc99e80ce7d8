"""A checkpoint in Hugging Face's layout: read as a source, and written anew without the sublayers that a plan skips."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from adaskip.core.fingerprint import fingerprint_of
from adaskip.core.same_model import config_identity
from adaskip.engines.errors import ExportError
from adaskip.engines.families import LAYER_TENSOR, Edit
from adaskip.engines.shards import disk_errors, read_tensor, rewrite, tensor_files

COMPANIONS = (
    *("generation_config.json", "chat_template*", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    "tekken.json",
    *("preprocessor_config.json", "processor_config.json"),
)
"""Files that are copied as they are. Code never is."""
UNUSED = ".rotary_emb.inv_freq"
"""Buffers of old checkpoints, which no class reads."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
"""One tensor where embeddings are tied; files hold the second."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files. config: its architecture as a stock class of transformers reads it, which is
    LLaMA's for InternLM."""

    folder: Path
    config: PreTrainedConfig

    @cached_property
    def tensor_files(self) -> dict[str, Path]:
        """The file of each tensor. Raises ExportError for a folder without whole safetensors files."""
        found = tensor_files(self.folder)
        return {name: file for name, file in found.items() if not name.endswith(UNUSED)}

    @cached_property
    def config_record(self) -> dict[str, Any]:
        """The fields of `config.json`, without what names remote code."""
        record = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if record.get("model_type") != self.config.model_type:
            architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.config.model_type]
            record = {**self.config.to_dict(), "architectures": [architecture]}
        return {name: value for name, value in record.items() if name != "auto_map"}

    @property
    def is_quantised(self) -> bool:
        """Whether it holds quantised weights."""
        return "quantization_config" in self.config_record

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of its decoder layers' matrices."""
        name = next(name for name in self.tensor_files if LAYER_TENSOR.fullmatch(name) and "norm" not in name)
        return read_tensor(self.tensor_files, name).dtype

    @property
    def identity(self) -> dict[str, Any]:
        """What `same_model.identity` says of the model, read one tensor at a time."""
        names = {name: name for name in self.tensor_files}
        if self.config.tie_word_embeddings:
            names.setdefault(HEAD, EMBEDDING)
        weights = ((name, read_tensor(self.tensor_files, names[name])) for name in sorted(names))
        return {
            "model": str(self.folder),
            "weights_fingerprint": fingerprint_of(weights, portable=True),
            "adapter": "",
            **config_identity(self.config),
        }

    @property
    def model_type(self) -> str:
        """As in `families.FAMILIES`."""
        return str(self.config.model_type)


def write_checkpoint(
    source: Checkpoint,
    target: Path,
    edit: Edit,
    *,
    config: dict[str, Any] | None = None,
    rename: Callable[[str], str] = str,
) -> None:
    """Write what `edit` keeps of a checkpoint into the folder `target`, with everything beside the weights.

    Args:
        config: fields of `config.json` that are added or take the place of the source's.
        rename: the new name of a tensor that is kept.
    """
    record = {**source.config_record, **(config or {})}
    (target / "config.json").write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    copy_companions(source.folder, target)
    rewrite(
        source.tensor_files,
        target,
        rename=lambda name: rename(name) if edit.keeps(name) else None,
        change=edit.tensor,
    )


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence."""
    for file in sorted(
        {file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file() and file.suffix != ".py"}
    ):
        path = target / file.relative_to(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, path)


def save_in_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> Checkpoint:
    """Write a model that has no safetensors files, such as one read from GGUF or .bin, as a checkpoint to export.

    Raises:
        ExportError: it is quantised: what was loaded is no plain tensor.
        OSError: a file cannot be written, as on a full disk.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ExportError(f"{type(model).__name__} is quantised on loading; export its own checkpoint folder instead")
    with disk_errors(folder):
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return Checkpoint(folder, model.config)
