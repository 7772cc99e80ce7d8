"""Every causal language model of transformers, tiny and random: skipped as if its sublayers put out zero, or refused.

What cannot be made tiny by the usual names of sizes is left out.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adaskip.core.blocks import UnsupportedModelError, find_decoder, find_structure
from adaskip.core.context import skipping
from adaskip.core.plan import SkipPlan
from adaskip.strategies import FixedPlan

pytestmark = pytest.mark.slow

LAYERS = 4
HIDDEN = dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), 16)
WIDTHS = dict.fromkeys(
    ("intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "decoder_ffn_dim",
     "encoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size",
     "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24)  # fmt: skip
HEADS = dict.fromkeys(
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
     "encoder_attention_heads"), 4)  # fmt: skip
HEAD_DIMS = dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim",
                           "query_pre_attn_scalar", "rotary_dim", "kv_channels"), 4)  # fmt: skip
COUNTS = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS)
EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
EXPERTS |= {"num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
EXPERTS |= {"moe_num_shared_experts": 1, "first_k_dense_replace": 1}
OTHERS = {"vocab_size": 61, "vocab_size_per_layer_input": 61, "num_key_value_heads": 2, "num_kv_heads": 2}
OTHERS |= {"q_lora_rank": 8, "kv_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
OTHERS |= {"max_position_embeddings": 128, "n_positions": 128, "sliding_window": 5, "attention_chunk_size": 5}
OTHERS |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "encoder_layers": 1, "state_size": 8}
OTHERS |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "moe_layers": [0, 2]}
SIZES: dict[str, Any] = {**HIDDEN, **WIDTHS, **HEADS, **HEAD_DIMS, **COUNTS, **EXPERTS, **OTHERS}

CLASSES = {config.__name__: config for config in AutoModelForCausalLM._model_mapping}
ACCEPTED = {
    "AriaTextConfig", "CwmConfig", "DeepseekV2Config", "DeepseekV3Config", "Exaone4Config", "Gemma2Config",
    "Gemma3TextConfig", "Gemma4TextConfig", "GemmaConfig", "Glm4Config", "Glm4MoeConfig", "GptOssConfig",
    "GraniteConfig", "Llama4Config", "Llama4TextConfig", "LlamaConfig", "MistralConfig", "MixtralConfig",
    "Olmo2Config", "Olmo3Config", "Phi3Config", "Qwen2Config", "Qwen2MoeConfig", "Qwen3Config", "Qwen3MoeConfig",
    "SmolLM3Config",
}  # fmt: skip
PLANS = [SkipPlan(attention={1}, ffn={2}), SkipPlan(attention={0, 1, 2}), SkipPlan(ffn=set(range(LAYERS))),
         SkipPlan(attention={1, 2}, ffn={1, 2})]  # fmt: skip


def usable(old: Any, size: Any) -> bool:
    """Whether `size` may take the place of a config's own value: None turns a feature off, save for head counts."""
    return isinstance(old, list) == isinstance(size, list) if old is not None else size in (2, 4)


def shrunk(config: Any) -> dict[str, Any]:
    """Arguments that make a config of this class tiny, as far as the class knows them."""
    known = config.to_dict()
    options = {name: size for name, size in SIZES.items() if name in known and usable(known[name], size)}
    if "qk_rope_head_dim" in options:  # latent attention: the head sizes follow from its parts
        options.pop("head_dim", None)
        options["num_key_value_heads"] = options["num_attention_heads"]
    for name in ("layer_types", "mlp_layer_types"):
        if kinds := list(dict.fromkeys(known.get(name) or ())):
            options[name] = (kinds * LAYERS)[:LAYERS]
    return options


def tiny_model(config_class: Any, auto: Any = AutoModelForCausalLM) -> Any:
    """A random float32 model whose sublayers all matter. Raises whatever the class raises that cannot be made tiny."""
    config = config_class()
    options = shrunk(config)
    for name in getattr(config, "sub_configs", None) or {}:
        if (part := getattr(config, name, None)) is not None:
            options[name] = {**shrunk(part), "model_type": part.model_type}
    config = config_class(**options)
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config, attn_implementation="eager").parameters())
    if size > 2e7:
        raise ValueError(f"{size} parameters")
    model: Any = auto.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.data = noise * scale + (0 if parameter.dim() > 1 else parameter.data)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.7)
    return model


def zeroed(model, structure, plan):
    """A copy of the model in which the sublayers of `plan` run and put out zero."""
    twin = copy.deepcopy(model)
    for kind, sublayers in (("attention", structure.attention), ("ffn", structure.ffn)):
        for i in getattr(plan, kind):
            last = getattr(find_decoder(twin).layers[i], sublayers.post_norm or sublayers.module)
            last.register_forward_hook(
                lambda module, args, out: (
                    (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)
                )
            )
    return twin


@torch.no_grad()
def check_against_zeroed(model, structure) -> None:
    """Raise AssertionError unless every plan gives tokens and logits of the model whose sublayers put out zero."""
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    options |= {"pad_token_id": 0, "attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    stock = model(ids).logits
    for plan in PLANS:
        expected = zeroed(model, structure, plan).generate(ids, **options)
        with skipping(model, FixedPlan(num_layers=LAYERS, plan=plan, phase="e2e")):
            got = model.generate(ids, **options)
        assert torch.equal(got.sequences, expected.sequences)
        for ours, theirs in zip(got.logits, expected.logits, strict=True):
            assert (ours - theirs).abs().max() < 1e-4
        assert (expected.logits[0] - stock[:, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_class_is_skipped_right_or_refused(name):
    try:
        model = tiny_model(CLASSES[name])
    except Exception:  # transformers' own limits: it cannot be made tiny
        assert name not in ACCEPTED
        return
    random_numbers = torch.get_rng_state()
    try:
        structure = find_structure(model)
    except UnsupportedModelError:
        assert name not in ACCEPTED
        return
    assert torch.equal(torch.get_rng_state(), random_numbers)
    check_against_zeroed(model, structure)
