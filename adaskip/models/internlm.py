"""InternLM (version 1) with stock classes, so that its checkpoints load without remote code.

The architecture is LLaMA with biases in the q, k, v and o projections and dynamic-NTK rope, and its weights have the
names of LLaMA's. Only two parts must be translated: the configuration, which has `bias` and `rotary` instead of
`attention_bias` and `rope_parameters`, and the tokenizer, a SentencePiece model to which LLaMA's tokenizer class would
apply LLaMA's whitespace rules instead of those in the model file. `adaskip.models.rope` handles its rope above the
position limit.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from adaskip.models.errors import ModelError

MODEL_TYPE = "internlm"
BASE = 10000.0
CLEAN_UP = {
    **{" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'"},
    **{" n't": "n't", " 'm": "'m", " 's": "'s", " 've": "'ve", " 're": "'re"},
}
"""Replacements that the published tokenizer makes in all decoded text, in this order, regardless of its settings."""
SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def llama_config(config: dict[str, Any]) -> LlamaConfig:
    """The LLaMA configuration equivalent to an InternLM `config.json`.

    Raises:
        ModelError: a rotary type other than "origin" and "dynamic".
    """
    same = {name: config[name] for name in SAME_NAME if name in config}
    defaults = {"vocab_size": 103168, "pad_token_id": 0}
    attention_bias = bool(config.get("bias", True))
    return LlamaConfig(**{**defaults, **same}, attention_bias=attention_bias, rope_parameters=_rope_parameters(config))


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    # The field `rotary` was added together with dynamic NTK; older revisions use plain rope at any length.
    rotary = config.get("rotary") or {"type": "origin", "base": config.get("rope_theta", BASE)}
    kind, base = rotary.get("type"), float(rotary.get("base", BASE))
    if kind == "origin":
        return {"rope_type": "default", "rope_theta": base}
    if kind == "dynamic":
        return {"rope_type": "dynamic", "rope_theta": base, "factor": float(rotary.get("scaling_factor", 1.0))}
    raise ModelError(f"InternLM's rotary type is {kind!r}; allowed are 'origin' and 'dynamic'")


class InternLMTokenizer(SentencePieceBackend):
    """The checkpoint's SentencePiece model behind the tokenizer interface of transformers.

    Text is split at the special tokens and every part is encoded by SentencePiece, as in InternLM's own class, so token
    ids equal the original's for any normalisation in the model file. `<eoh>` and `<eoa>` are ordinary pieces. Decoded
    text is cleaned up as in the original, so truncated prompts and answers equal those of LongBench.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 (transformers' own attribute)
    padding_side = "left"

    def __init__(self, **options: Any):
        ends = (("bos", options.get("add_bos_token", True)), ("eos", options.get("add_eos_token", False)))
        options["special_tokens_pattern"] = "_".join(name for name, added in ends if added) or "none"
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
        super().__init__(**{**special, **options, "legacy": True})

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The cleaned-up text of pieces; SentencePiece joins byte pieces and removes the leading space it added."""
        parts: list[str] = []
        run: list[str] = []
        for token in tokens:
            if token in self.all_special_tokens:
                parts += [self.sp_model.decode(run), token]
                run = []
            else:
                run.append(token)
        text = "".join([*parts, self.sp_model.decode(run)])
        for spaced, joined in CLEAN_UP.items():
            text = text.replace(spaced, joined)
        return text
