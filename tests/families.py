"""Small random models of every supported family, on stock transformers classes."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models import gemma2, gemma3, granite, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3

VOCAB, WIDTH, WINDOW = 61, 16, 5
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 4}

FAMILIES = {
    "llama": (llama.LlamaConfig, {}),
    "llama-biased": (llama.LlamaConfig, {"attention_bias": True, "num_key_value_heads": 4}),
    "mistral": (mistral.MistralConfig, {"sliding_window": WINDOW, "head_dim": 4}),
    "qwen2": (qwen2.Qwen2Config, {}),
    "qwen3": (qwen3.Qwen3Config, {"head_dim": 4}),
    "phi3": (phi3.Phi3Config, {}),
    "granite": (
        granite.GraniteConfig,
        {"residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    ),
    "gemma2": (gemma2.Gemma2Config, {**MIXED, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 20.0}),
    "gemma3": (gemma3.Gemma3TextConfig, {**MIXED, "query_pre_attn_scalar": 4}),
    "olmo2": (olmo2.Olmo2Config, {}),
    "mixtral": (mixtral.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}),
}


def random_model(family: str, num_layers: int = 4, seed: int = 0, **options) -> PreTrainedModel:
    """A float32 model whose sublayers all matter: the usual initialisation is too small to tell them apart."""
    config_class, special = FAMILIES[family]
    settings = {**COMMON, **special, "num_hidden_layers": num_layers, **options}
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][:num_layers]
    # transformers 5.17 has an SDPA for Gemma2 that leaves the soft-capping out
    attention = "eager" if family == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config_class(**settings), attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model


def random_prompts(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    """1-D token ids without pads and end tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]
