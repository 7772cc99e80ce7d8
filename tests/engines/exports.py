"""Small random checkpoints of every exported family, their plans, and what `skipping` answers under them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from adaskip.core.context import skipping
from adaskip.core.plan import SkipPlan, Sublayer
from adaskip.core.strategy import FixedPlan
from adaskip.core.token_ids import left_padded
from adaskip.engines.checkpoint import Checkpoint
from adaskip.engines.export import export_to
from adaskip.engines.registry import Export
from tests.families import random_model

NUM_LAYERS, NUM_TOKENS = 4, 64
LENGTHS = [3, 150, *range(8, 80, 4)]
"""Tokens of the 20 prompts."""
SHAPE = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 512}
LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "llama-biased": {"rope_parameters": DYNAMIC_ROPE, "mlp_bias": True},
    "mistral": {"head_dim": 32},
    "qwen2": {"rope_parameters": YARN_ROPE, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 64},
}
"""Families of `tests.families`, and what else of vLLM's code each runs through. InternLM is llama-biased."""
PLANS = {
    "attention": SkipPlan(attention=frozenset({1, 3})),
    "ffn": SkipPlan(ffn=frozenset({0, 2})),
    "both": SkipPlan.of_sublayers(
        {Sublayer("attention", 0): 1.6, Sublayer("ffn", 1): 0.7, Sublayer("attention", 2): 1.2, Sublayer("ffn", 2): 0.9}
    ),
    "first layers": SkipPlan.of_sublayers(
        {Sublayer(kind, layer): scale for layer, scale in ((0, 1.3), (1, 0.8)) for kind in ("attention", "ffn")}
    ),
}


def save_family(family: str, folder: Path) -> tuple[PreTrainedModel, Checkpoint]:
    """A random model, and its checkpoint in `folder`."""
    model = random_model(family, NUM_LAYERS, **SHAPE, **FAMILIES[family])
    model.save_pretrained(folder)
    return model, Checkpoint(folder, model.config)


def export(checkpoint: Checkpoint, plan: SkipPlan, folder: Path) -> Path:
    """The checkpoint without what the plan skips, for vLLM."""
    strategy = FixedPlan(num_layers=checkpoint.config.num_hidden_layers, plan=plan)
    export_to("vllm", Export(strategy, checkpoint), folder)
    return folder


def tokens_of_skipping(
    model: PreTrainedModel, plan: SkipPlan, prompts: list[torch.Tensor], num_tokens: int = NUM_TOKENS
) -> list[list[int]]:
    """Greedy tokens of each prompt [T] in transformers, ends not minded."""
    ids, mask = left_padded(prompts, 0, torch.device("cpu"))
    strategy = FixedPlan(num_layers=model.config.num_hidden_layers, plan=plan)
    settings = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    with skipping(model, strategy):
        output = model.generate(input_ids=ids, attention_mask=mask, **settings, eos_token_id=None)
    return output[:, ids.shape[1] :].tolist()
