"""Configurations of exported folders for vLLM: the stock classes under a model type that says what is missing.

Where the plugin is not installed, no class answers to these types, and nothing loads the folder as a full model.
"""

from __future__ import annotations

from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config


class AdaSkipLlamaConfig(LlamaConfig):
    """LLaMA's, InternLM's and Vicuna's."""

    model_type = "adaskip-llama"


class AdaSkipMistralConfig(MistralConfig):
    """Mistral's."""

    model_type = "adaskip-mistral"


class AdaSkipQwen2Config(Qwen2Config):
    """Qwen2's."""

    model_type = "adaskip-qwen2"


class AdaSkipQwen3Config(Qwen3Config):
    """Qwen3's."""

    model_type = "adaskip-qwen3"


def register_configs() -> None:
    """Let `AutoConfig` know them; harmless when repeated."""
    for config in (AdaSkipLlamaConfig, AdaSkipMistralConfig, AdaSkipQwen2Config, AdaSkipQwen3Config):
        AutoConfig.register(config.model_type, config, exist_ok=True)
