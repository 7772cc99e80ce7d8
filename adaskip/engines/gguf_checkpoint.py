"""A checkpoint of a Llama as a GGUF model: names, the order of rotated rows, rope and sizes as llama.cpp wants them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType, RopeScalingType, get_tensor_name_map
from gguf.constants import GGML_QUANT_VERSION
from gguf.gguf_writer import GGUFValue
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from adaskip.engines.checkpoint import Checkpoint
from adaskip.engines.errors import ExportError
from adaskip.engines.gguf_blocks import SCALES, Kind
from adaskip.engines.gguf_layers import LLAMA, GGUFModel, Weight
from adaskip.engines.gguf_tokenizer import add_tokenizer

logger = logging.getLogger(__name__)

FILE_TYPES = {
    Kind.F32: LlamaFileType.ALL_F32,
    Kind.F16: LlamaFileType.MOSTLY_F16,
    Kind.BF16: LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
"""What a file with such matrices calls itself; norms and biases are always F32."""
STORED = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16}
"""The names that safetensors has for types."""
FAMILIES = ("llama", "mistral")


def read_checkpoint(source: Checkpoint, tokenizer: PreTrainedTokenizerBase | None, type_name: str) -> GGUFModel:
    """A checkpoint folder as a GGUF model; weights are read from it when they are asked for.

    Args:
        tokenizer: None for a file without tokenizer, which takes and gives token ids only.
        type_name: one of `registry.WEIGHTS`.

    Raises:
        ExportError: a model that is no Llama, or has what llama.cpp cannot express.
    """
    target = Kind[type_name.upper()]
    check_config(source.config)
    fields = _fields(source, tokenizer, target)
    weights = dict(_weights(source, target))
    if (factors := _rope_factors(source.config)) is not None:
        weights["rope_freqs.weight"] = Weight(Kind.F32, Kind.F32, factors.shape, lambda: _bytes(factors))
    return GGUFModel(LLAMA, fields, weights)


def check_config(config: PreTrainedConfig) -> None:
    """ExportError for a model that is no Llama, or has what llama.cpp cannot express."""
    if config.model_type not in FAMILIES:
        raise ExportError(
            f"models of type {config.model_type!r} cannot be exported to GGUF: llama.cpp's layers without attention "
            f"are Llama's; allowed: {', '.join(FAMILIES)}, InternLM and Vicuna"
        )
    if (window := getattr(config, "sliding_window", None)) is not None:
        raise ExportError(f"llama.cpp's Llama has no sliding window; this model's is {window} tokens, allowed: none")
    if config.hidden_act != "silu":
        raise ExportError(f"llama.cpp's Llama has SiLU activations, this model {config.hidden_act!r}")
    if getattr(config, "quantization_config", None) is not None:
        raise ExportError("the checkpoint is quantised; allowed: plain float32, float16 or bfloat16 weights, or a GGUF")
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "llama3", "dynamic"):
        raise ExportError(f"rope of type {rope['rope_type']!r} cannot be exported; allowed: default, linear, llama3")
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ExportError(f"llama.cpp's Llama rotates whole heads, this model a part of {part:g} of each")


def _fields(source: Checkpoint, tokenizer: PreTrainedTokenizerBase | None, target: Kind) -> dict[str, GGUFValue]:
    config: Any = source.config
    writer = GGUFWriter(None, LLAMA)  # type: ignore[arg-type]  # it is asked for its fields only
    writer.add_type("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_size = _head_size(config)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(FILE_TYPES[target])
    if target in SCALES:
        writer.add_quantization_version(GGML_QUANT_VERSION)
    _add_rope(writer, config)
    add_tokenizer(writer, tokenizer, config.vocab_size, _ends(source))
    return {key: value for key, value in writer.kv_data[0].items() if key != "general.architecture"}


def _ends(source: Checkpoint) -> list[int]:
    """The tokens that end an answer, of generation_config.json or else of the configuration."""
    file = source.folder / "generation_config.json"
    given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ends = given.get("eos_token_id", source.config.eos_token_id)
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _add_rope(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "dynamic":
        logger.warning(
            "dynamic NTK rope, which llama.cpp does not have, begins above %d tokens: the file is right up to there",
            config.max_position_embeddings,
        )


def _rope_factors(config: Any) -> np.ndarray | None:
    """What llama.cpp divides the frequencies of Llama 3's rope by, [head size / 2] float32; None for other ropes."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = _head_size(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / scaled.double()).float().numpy()


def _weights(source: Checkpoint, target: Kind) -> Iterator[tuple[str, Weight]]:
    config: Any = source.config
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, file in source.tensor_files.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if (new := names.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
            raise ExportError(f"the checkpoint has a tensor {name}, which is not of a plain Llama")
        yield new, _weight(file, name, target, rotated_heads(name, config))


def rotated_heads(name: str, config: Any) -> int | None:
    """How many heads a tensor of transformers' name has whose rows are in another order here; None if none."""
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    return next((count for part, count in heads.items() if part in name), None)


def _weight(file: Path, name: str, target: Kind, heads: int | None) -> Weight:
    with safe_open(file, framework="pt") as shard:
        part = shard.get_slice(name)
        shape, dtype = tuple(part.get_shape()), part.get_dtype()
    if dtype not in STORED:
        raise ExportError(f"tensor {name} is {dtype}; allowed: {', '.join(STORED)}")
    kind = STORED[dtype]
    if target in SCALES and len(shape) > 1 and shape[-1] % 32:
        raise ExportError(f"tensor {name} has rows of {shape[-1]} weights; {target.name} has blocks of 32: use f16")

    def load() -> np.ndarray:
        with safe_open(file, framework="pt") as shard:
            tensor = shard.get_tensor(name)
        return _bytes(tensor if heads is None else neighbours(tensor, heads))

    return Weight(kind, target if len(shape) > 1 else Kind.F32, shape, load)


def neighbours(tensor: Tensor, heads: int) -> Tensor:
    """The rows of a query or key projection (or its bias), the two of each rotated pair side by side.

    transformers rotates row i of a head with row i + half, llama.cpp row 2i with row 2i + 1.
    """
    split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return split.swapaxes(1, 2).reshape(tensor.shape)


def _bytes(tensor: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(tensor, Tensor):
        tensor = tensor.contiguous().view(torch.uint8).numpy()
    return tensor.view(np.uint8)


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
