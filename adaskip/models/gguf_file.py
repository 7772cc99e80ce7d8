"""GGUF files: what of loading them differs from a folder. Their weights are dequantised by transformers."""

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
    """Whether `path` is named as a GGUF file and is no folder."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def check_gguf(path: Path) -> None:
    """ModelError unless `path` is one whole GGUF file and the package that reads it is installed."""
    if SHARD.search(path.name):
        raise ModelError(f"{path} is one shard of a split GGUF file: merge it first (llama-gguf-split --merge)")
    with path.open("rb") as handle:
        begins = handle.read(len(MAGIC))
    if begins != MAGIC:
        raise ModelError(f"{path} is no GGUF file: it begins with {begins!r}, not {MAGIC!r}")
    if not is_gguf_available():
        raise ModelError(f"{path} is a GGUF file, which the package gguf reads: pip install gguf")


def gguf_options(path: Path) -> dict[str, Any]:
    """The arguments of `from_pretrained` that name a folder, or a GGUF file in one."""
    if is_gguf(path):
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": path}


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """The architecture that a GGUF file describes; ModelError if transformers does not know it."""
    check_gguf(path)
    held = path.stat()
    return deepcopy(_parsed_config(path, held.st_size, held.st_mtime_ns))


@lru_cache(maxsize=4)
def _parsed_config(path: Path, size: int, mtime_ns: int) -> PreTrainedConfig:
    """Reading a file's header takes seconds, and every cell of a grid asks for it."""
    with said_in_one_line(f"{path} is damaged or not usable"):
        return AutoConfig.from_pretrained(**gguf_options(path), local_files_only=True, trust_remote_code=False)


def forget_quantisation(model: PreTrainedModel) -> None:
    """Drop what says that a model loaded from GGUF is quantised: its weights are plain tensors, which can be saved."""
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if name in vars(holder):
            delattr(holder, name)
