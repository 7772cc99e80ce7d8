"""What vLLM calls in each of its processes: the architectures of exported folders, by name.

Light to import: neither torch nor the engine comes with it. vLLM imports the classes when a model asks for them.
"""

from __future__ import annotations

ARCHITECTURES = {
    "llama": "AdaSkipLlamaForCausalLM",
    "mistral": "AdaSkipMistralForCausalLM",
    "qwen2": "AdaSkipQwen2ForCausalLM",
    "qwen3": "AdaSkipQwen3ForCausalLM",
}
"""The name in `architectures` of an exported `config.json`, by `model_type`; a class of `vllm_models`."""


def register() -> None:
    """Name the architectures to vLLM; it may call this several times in a process."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"adaskip.engines.vllm_models:{name}")
