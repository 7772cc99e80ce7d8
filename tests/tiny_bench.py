"""A random model of four layers for tests of the benchmark."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from adaskip.studies.bench.subject import random_model

LAYERS = 4
CPU = torch.device("cpu")


def tiny_model(device: torch.device = CPU):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return random_model(config, device, torch.float32, "sdpa")


def ids(length: int) -> torch.Tensor:
    return torch.arange(length)[None] % 64
