"""A fingerprint of the configuration fields that affect a model's output: rope, windows, norms, scalings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

COMPUTED_BY = (
    "model_type",
    *("num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "original_max_position_embeddings", "n_positions", "max_seq_len"),
    *("no_rope_layers", "no_rope_layer_interval", "rope_interleave", "partial_rotary_factor", "rotary_pct"),
    *("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "alibi", "alibi_bias_max"),
    *("rope_local_base_freq", "global_rope_theta", "local_rope_theta"),
    *("sliding_window", "use_sliding_window", "sliding_window_pattern", "max_window_layers", "layer_types"),
    *("attention_chunk_size", "use_bidirectional_attention"),
    *("hidden_act", "hidden_activation", "activation_function", "activation", "swiglu_alpha", "swiglu_limit"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "rms_norm_epsilon"),
    *("use_qk_norm", "qk_layernorm", "norm_type", "num_ln_in_parallel_attn"),
    *("use_parallel_residual", "parallel_attn", "do_layer_norm_before"),
    *("apply_residual_connection_post_layernorm", "clip_qkv"),
    *("tie_word_embeddings", "residual_multiplier", "embedding_multiplier", "attention_multiplier", "softmax_scale"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "scale_embedding", "layer_scale"),
    *("logits_scaling", "logit_scale", "lm_head_multiplier", "mup_width_multiplier", "key_multiplier"),
    *("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "attn_temperature_tuning"),
    *("attn_scale", "floor_scale", "pretraining_tp"),
    *("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "norm_topk_prob", "topk_method"),
    *("n_group", "topk_group", "routed_scaling_factor", "scoring_func", "n_shared_experts"),
    *("first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers", "moe_layer_freq"),
)
"""Fields of a text configuration, besides those of the rotary positions, that change the output of given weights."""


def config_fingerprint(config: Any) -> str:
    """SHA-256 over the `COMPUTED_BY` fields and the rotary positions of the configuration of a model or checkpoint.

    For a multimodal model it covers the text decoder. Absent fields and None are ignored, and numbers are compared by
    value (1 equals 1.0). The older notation of rotary positions (`rope_theta`, `rope_scaling`) and the newer one
    (`rope_parameters`) give the same fingerprint. It does not cover fields without effect on inference, such as
    dropout, and fields of architectures that `COMPUTED_BY` does not list.
    """
    text_config = config.get_text_config(decoder=True)
    told = {name: getattr(text_config, name, None) for name in COMPUTED_BY}
    if told["sliding_window"] is None and set(told["layer_types"] or ()) <= {"full_attention"}:
        told["layer_types"] = None  # some versions of transformers write this default explicitly
    told["rope"] = _rope(text_config)
    return hashlib.sha256(json.dumps(_plain(told), sort_keys=True).encode()).hexdigest()


def _rope(config: Any) -> dict[str, Any]:
    """The parameters of the rotary positions under their newer names; by layer type if there are several sets."""
    base = getattr(config, "rope_theta", None)
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer = {kind: _one_rope(rope, base) for kind, rope in given.items() if isinstance(rope, Mapping)}
    return by_layer or _one_rope(given, base)


def _one_rope(rope: Mapping[str, Any], base: Any) -> dict[str, Any]:
    named = dict(rope)
    kind = named.pop("type", None)
    return {"rope_theta": base, "rope_type": kind or "default", **named}


def _plain(value: Any) -> Any:
    """`value` as JSON data: numbers as floats, keys as strings, without None values, other objects as `str`."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return value if value is None or isinstance(value, (bool, str)) else str(value)
