"""Export for llama.cpp: one GGUF file, of a checkpoint or of an existing GGUF file, whose blocks keep their numbers."""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from adaskip.engines.errors import ExportError
from adaskip.engines.gguf_blocks import Kind
from adaskip.engines.gguf_checkpoint import read_checkpoint
from adaskip.engines.gguf_file import compare_file, read_file, write_file
from adaskip.engines.gguf_layers import GGUFModel, smaller
from adaskip.engines.registry import Export
from adaskip.engines.verify import LOADED_AS, differences, load_source, logits, prompt

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
"""An export is one file of this ending, not a folder."""
HAS_LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None
DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
MOST_KL = {Kind.F32: 1e-4, Kind.F16: 1e-2}
"""Largest mean divergence of the tokens' distributions, nats, by the type of the weights."""
MOST_ROUNDED_KL = 0.3
"""The same for other types: llama.cpp rounds what it multiplies with them to 8 bits, transformers does not."""


def check(export: Export) -> None:
    """ExportError for a model or a tokenizer that llama.cpp does not have, or a GGUF file that is no plain Llama."""
    smaller_model(export)


def write(export: Export, target: Path) -> None:
    """Write the file `target`."""
    write_file(smaller_model(export), target)


def verify(export: Export, target: Path) -> dict[str, Any]:
    """Compare every tensor of the file with what was meant, and, where llama-cpp-python is installed, the logits of
    llama.cpp with those of the plan.

    Returns largest_error (of a tensor, as a fraction of its size) and, if llama.cpp ran, distance, kl and same_argmax
    as in `verify.compare`.
    """
    model = smaller_model(export)
    result: dict[str, Any] = {"largest_error": compare_file(model, target)}
    if not HAS_LLAMA_CPP:
        logger.warning("llama-cpp-python is not installed: weights were compared, logits were not")
        return result
    ids = prompt(model.weights["token_embd.weight"].shape[0])[:, : model.number("context_length")]
    source = _source_model(export)
    wanted = logits(source, ids, export.strategy)
    del source
    result |= differences(llama_cpp_logits(target, ids[0]), wanted)
    limit = max(MOST_KL.get(weight.target, MOST_ROUNDED_KL) for weight in model.weights.values())
    if not result["kl"] <= limit:
        raise ExportError(f"llama.cpp's tokens diverge from the plan's by {result['kl']:.2g} nats; allowed: {limit:g}")
    return result


@lru_cache(maxsize=1)
def smaller_model(export: Export) -> GGUFModel:
    """The file's content; no weight is read. Kept until the comparison: a large vocabulary takes seconds to read."""
    if export.gguf_file is None:
        name = export.weights_type or DTYPES.get(dtype := export.source.dtype)
        if name is None:
            raise ExportError(
                f"{export.source.folder} holds weights in {dtype}; allowed: {', '.join(map(str, DTYPES))}"
            )
        return smaller(read_checkpoint(export.source, export.tokenizer, name), export.folded)
    if export.weights_type is not None:
        raise ExportError(f"weights of a GGUF file keep their types; {export.weights_type} takes a checkpoint folder")
    return smaller(read_file(export.gguf_file), export.folded)


def llama_cpp_logits(file: Path, ids: Tensor) -> Tensor:
    """Logits [T, V] of a prompt [T] as llama.cpp computes them on the CPU, with flash attention (without it, llama.cpp
    pads the values of skipped layers) and keys and values in float32."""
    from llama_cpp import GGML_TYPE_F32, Llama  # pyright: ignore[reportMissingImports]  # of no extra: it is compiled

    options = {"n_ctx": len(ids), "n_batch": len(ids), "type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    llama = Llama(str(file), logits_all=True, flash_attn=True, n_gpu_layers=0, verbose=False, **options)
    try:
        llama.eval(ids.tolist())
        return torch.from_numpy(llama.scores[: len(ids)].copy())
    finally:
        llama.close()


def _source_model(export: Export) -> PreTrainedModel:
    if export.gguf_file is None:
        return load_source(export.source)
    file = export.gguf_file
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **LOADED_AS).eval()
