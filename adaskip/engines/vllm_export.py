"""Export for vLLM: folded weights, and a configuration that the plugin's classes read.

The folder is that of `hf_export` for plans that are not whole layers, with an architecture of ours. Layers keep their
numbers, also those that are skipped as a whole, and so does whatever names layers, such as the list of modules that a
quantised checkpoint leaves alone. vLLM need not be installed to write it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from adaskip.engines.checkpoint import write_checkpoint
from adaskip.engines.errors import ExportError
from adaskip.engines.families import Edit, family_of
from adaskip.engines.hf_export import skipped
from adaskip.engines.loading import load_without, marked_config, read_config
from adaskip.engines.registry import Export
from adaskip.engines.shards import read_tensor
from adaskip.engines.verify import LOADED_AS, allowed_distance, compare
from adaskip.engines.vllm_plugin import ARCHITECTURES

logger = logging.getLogger(__name__)

ROPES = ("default", "linear", "llama3", "yarn", "dynamic")
"""Rope types that are the same in vLLM and transformers; dynamic up to the model's limit of positions."""
SCALABLE = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of weights and of quantised weights' scales that can be divided without losing much."""


def check(export: Export) -> None:
    """Raise ExportError for what cannot be folded, and for models that vLLM computes in another way."""
    edit = edit_of(export)
    for name in edit.divided:
        if (dtype := read_tensor(export.source.tensor_files, name).dtype) not in SCALABLE:
            raise ExportError(
                f"the scales of the plan cannot be folded into {name} of dtype {dtype}; allowed: "
                f"{', '.join(map(str, SCALABLE))}, or a plan without scales"
            )
    if not export.source.is_quantised:
        allowed_distance(export.source, export.folded)
    if found := unlike_vllm(export.source.config):
        raise ExportError(f"vLLM computes this {export.source.model_type} otherwise than transformers: {found[0]}")


def edit_of(export: Export) -> Edit:
    """What becomes of each tensor of the source."""
    return Edit(export.folded, family_of(export.source.model_type, ARCHITECTURES), export.source.tensor_files)


def write(export: Export, target: Path) -> None:
    """Fill `target` with the checkpoint that `vllm serve` takes."""
    source = export.source
    config = {
        **marked_config(source.model_type, skipped(export)),
        "architectures": [ARCHITECTURES[source.model_type]],
        **_plain_rope(source.config),
    }
    write_checkpoint(source, target, edit_of(export), config=config)


def verify(export: Export, target: Path) -> dict[str, Any]:
    """Compare logits in transformers. Quantised weights are not compared: vLLM and transformers round differently."""
    if export.source.is_quantised:
        logger.warning("the weights are quantised: logits were not compared")
        return {"compared": False}
    config, plan = read_config(target)
    return compare(export.source, export.strategy, lambda: load_without(target, config, plan, **LOADED_AS))


def unlike_vllm(config: PreTrainedConfig) -> list[str]:
    """What vLLM 0.32 does not do as transformers does for this configuration: a line each, empty where all is equal."""
    head_size = config.hidden_size // config.num_attention_heads
    windows = set(getattr(config, "layer_types", None) or ())
    rope = config.rope_parameters
    found = {
        f"activation {config.hidden_act!r}; allowed: silu": config.hidden_act != "silu",
        f"rope type {rope['rope_type']!r}; allowed: {', '.join(ROPES)}": rope["rope_type"] not in ROPES,
        "a rope over a part of each head; allowed: partial_rotary_factor 1": rope.get("partial_rotary_factor", 1) != 1,
        "a sliding window in some of the layers; allowed: in all of them or none": len(windows) > 1,
    }
    if config.model_type == "llama":
        window = getattr(config, "sliding_window", None)
        found["a sliding window, which LLaMA does not have; allowed: none"] = bool(window or windows)
    if config.model_type == "qwen2":
        size = getattr(config, "head_dim", None) or head_size
        found[f"heads of {size}; allowed: hidden_size / num_attention_heads = {head_size}"] = size != head_size
    if config.model_type == "qwen3":
        found["biases in the attention; allowed: attention_bias false"] = config.attention_bias
    return [line for line, differs in found.items() if differs]


def _plain_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Dynamic NTK is plain rope up to `max_position_embeddings`, and vLLM takes no longer sequences. Its own dynamic
    NTK stretches short ones, too."""
    rope = config.rope_parameters
    if rope["rope_type"] != "dynamic":
        return {}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": rope["rope_theta"]}, "rope_scaling": None}
