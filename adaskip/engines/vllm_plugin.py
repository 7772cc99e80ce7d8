"""What vLLM calls in each of its processes: exported folders' architectures and configurations, by name.

Light to import: neither torch nor vLLM comes with it. vLLM imports the classes of models when a folder asks for them.
"""

from __future__ import annotations

ARCHITECTURES = {
    "llama": "AdaSkipLlamaForCausalLM",
    "mistral": "AdaSkipMistralForCausalLM",
    "qwen2": "AdaSkipQwen2ForCausalLM",
    "qwen3": "AdaSkipQwen3ForCausalLM",
}
"""The name in `architectures` of an exported `config.json`, by the stock model type; a class of `vllm_models`."""


def register() -> None:
    """Name the architectures to vLLM; it may call this several times in a process."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    from adaskip.engines.vllm_configs import register_configs

    register_configs()
    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"adaskip.engines.vllm_models:{name}")
