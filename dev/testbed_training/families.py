"""The three architectures: stock Llama configurations that differ where the paper's three models differ."""

from __future__ import annotations

from transformers import LlamaConfig

from adaskip.testbed import FAMILIES
from dev.testbed_training.tokenizer import EOS_ID, PAD_ID

MAX_POSITIONS = 1280

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
SHAPES = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 288, "rope_parameters": LLAMA3_ROPE},
    "internlm": {
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
    "vicuna": {
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
}


def model_config(family: str, vocab_size: int, num_layers: int = 16) -> LlamaConfig:
    """The configuration of one family; raises ValueError for an unknown name."""
    if family not in FAMILIES:
        raise ValueError(f"unknown testbed family {family!r}; one of {', '.join(FAMILIES)}")
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        **SHAPES[family],
    )
