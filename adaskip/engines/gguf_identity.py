"""Which model a GGUF file holds, told from its tensors one at a time: nothing is loaded as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedConfig

from adaskip.core.fingerprint import fingerprint_of
from adaskip.core.same_model import config_identity
from adaskip.engines.errors import ExportError
from adaskip.engines.gguf_blocks import values
from adaskip.engines.gguf_checkpoint import rotated_heads
from adaskip.engines.gguf_file import read_file

INNER = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "input_layernorm"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"),
)
OUTER = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def gguf_identity(file: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """What `same_model.identity` says of the model that transformers loads of a llama file."""
    return {
        "model": str(file),
        "weights_fingerprint": fingerprint_of(_tensors(file, config), portable=True),
        "adapter": "",
        **config_identity(config),
    }


def _tensors(file: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and float32 values as transformers has them, in the order of the names."""
    weights = read_file(file).weights
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    layers = [f"model.layers.{layer}.{part}" for layer in range(config.num_hidden_layers) for part in INNER]
    for name in sorted([*OUTER, *(f"{part}.{end}" for part in layers for end in ("weight", "bias"))]):
        stored = str(names.get_name(name, try_suffixes=(".weight", ".bias")))
        if stored == "output.weight" and stored not in weights:
            stored = "token_embd.weight"
        if (weight := weights.get(stored)) is not None:
            tensor = torch.from_numpy(np.concatenate([*values(weight.load(), weight.kind)]))
            heads = rotated_heads(name, config)
            yield name, tensor if heads is None else halves(tensor, heads)
        elif name.endswith(".weight"):
            raise ExportError(f"{file} has no tensor {stored}: it is no plain llama")


def halves(tensor: Tensor, heads: int) -> Tensor:
    """Undo `gguf_checkpoint.neighbours`."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)
