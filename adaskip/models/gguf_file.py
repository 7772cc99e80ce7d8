"""GGUF files, as far as loading them differs from loading a folder. transformers dequantises their weights."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_gguf_available

from adaskip.models.errors import ModelError, said_in_one_line

MAGIC = b"GGUF"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)


def is_gguf(path: Path) -> bool:
    """Whether `path` has the suffix of a GGUF file and is not a folder."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def check_gguf(path: Path) -> None:
    """Raise ModelError unless `path` is a single GGUF file and the package that reads it is installed."""
    if SHARD.search(path.name):
        raise ModelError(f"{path} is one shard of a split GGUF file: merge it first (llama-gguf-split --merge)")
    with path.open("rb") as handle:
        begins = handle.read(len(MAGIC))
    if begins != MAGIC:
        raise ModelError(f"{path} is not a GGUF file: it begins with {begins!r}, not {MAGIC!r}")
    if not is_gguf_available():
        raise ModelError(f"{path} is a GGUF file; reading it needs the package gguf: pip install gguf")


def gguf_options(path: Path) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a folder or for a GGUF file."""
    if is_gguf(path):
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": path}


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """The configuration of a GGUF file; ModelError if transformers does not support its architecture."""
    check_gguf(path)
    held = path.stat()
    return deepcopy(_parsed_config(path, held.st_size, held.st_mtime_ns))


@lru_cache(maxsize=4)
def _parsed_config(path: Path, size: int, mtime_ns: int) -> PreTrainedConfig:
    """Cached, because reading the header takes seconds and every cell of a grid needs it."""
    with said_in_one_line(f"{path} is damaged or not usable"):
        return AutoConfig.from_pretrained(**gguf_options(path), local_files_only=True, trust_remote_code=False)


def forget_quantisation(model: PreTrainedModel) -> None:
    """Remove the quantisation marks of a model loaded from GGUF: its weights are plain tensors that can be saved."""
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if name in vars(holder):
            delattr(holder, name)
