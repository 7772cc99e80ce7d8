"""InternLM (version 1) on stock classes, so that its checkpoints load without remote code.

The architecture is LLaMA with biases in the q, k, v and o projections and dynamic-NTK rope, and its weights carry
LLaMA's names. So only two things need translating: the configuration, which says `bias` and `rotary` where LLaMA says
`attention_bias` and `rope_parameters`, and the tokenizer, a SentencePiece model that LLaMA's tokenizer class would
read with LLaMA's whitespace rules instead of the model file's own. See `adaskip.models.rope` for its rope above the
limit.
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
"""What the published tokenizer replaces in all decoded text, in this order, whatever its settings say."""
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
    """The LLaMA configuration that says the same as an InternLM `config.json`.

    Raises:
        ModelError: a rotary type other than "origin" and "dynamic".
    """
    same = {name: config[name] for name in SAME_NAME if name in config}
    defaults = {"vocab_size": 103168, "pad_token_id": 0}
    attention_bias = bool(config.get("bias", True))
    return LlamaConfig(**{**defaults, **same}, attention_bias=attention_bias, rope_parameters=_rope_parameters(config))


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    # Dynamic NTK came with the field `rotary`; revisions published before it compute plain rope at any length.
    rotary = config.get("rotary") or {"type": "origin", "base": config.get("rope_theta", BASE)}
    kind, base = rotary.get("type"), float(rotary.get("base", BASE))
    if kind == "origin":
        return {"rope_type": "default", "rope_theta": base}
    if kind == "dynamic":
        return {"rope_type": "dynamic", "rope_theta": base, "factor": float(rotary.get("scaling_factor", 1.0))}
    raise ModelError(f"InternLM's rotary type is {kind!r}; allowed are 'origin' and 'dynamic'")


class InternLMTokenizer(SentencePieceBackend):
    """The checkpoint's SentencePiece model itself behind transformers' tokenizer interface.

    Text is cut at the special tokens and every part goes through SentencePiece, as in InternLM's own class: token ids
    are the original's whatever normalisation the model file asks for. `<eoh>` and `<eoa>` are ordinary pieces. Decoded
    text is cleaned up as there, so that a prompt that loses its middle, and an answer, read as LongBench's.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 (transformers' own attribute)
    padding_side = "left"

    def __init__(self, **options: Any):
        ends = (("bos", options.get("add_bos_token", True)), ("eos", options.get("add_eos_token", False)))
        options["special_tokens_pattern"] = "_".join(name for name, added in ends if added) or "none"
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
        super().__init__(**{**special, **options, "legacy": True})

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces, cleaned up; SentencePiece joins byte pieces and drops the space it put in front itself."""
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
