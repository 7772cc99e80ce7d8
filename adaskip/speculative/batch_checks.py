"""Refuses batches whose rows cannot keep different numbers of tokens, or whose options expect rows of equal length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
)

from adaskip.core.blocks import find_decoder
from adaskip.core.hf import CACHE, OLD_CACHE, attn_implementation, generate_arguments
from adaskip.speculative.processors import STATELESS

MOST_ROWS = 8
MODEL_TYPES = ("granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3")
"""Model types in which a token sees only what the attention mask and the positions say, whatever the cache's order."""
BACKENDS = ("eager", "sdpa")
"""Attention backends that take masks with holes."""
CRITERIA = (MaxLengthCriteria, EosTokenCriteria, StopStringCriteria)
"""Stopping criteria that judge each row by itself."""
ARGUMENTS = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep"}
OF_WHOLE_BATCH = (EncoderNoRepeatNGramLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor)
"""Stateless processors that hold the prompts of all rows."""


def check_batch(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    stateless: frozenset[type],
) -> None:
    """Raise ValueError for a batch [B, S] that lossless cannot decode."""
    if len(input_ids) > MOST_ROWS:
        raise ValueError(f"lossless decodes batches of at most {MOST_ROWS} rows; got {len(input_ids)}")
    _check_model(model, model_kwargs)
    _check_arguments(input_ids, config, model_kwargs)
    allowed = (STATELESS | stateless) - set(OF_WHOLE_BATCH)
    if others := _names(each for each in processors if type(each) not in allowed):
        raise ValueError(
            f"in a batch lossless calls logits processors row by row, so they must be known to keep no state; got "
            f"{others}; decode one sequence at a time, or list a class in stateless"
        )
    if others := _names(each for each in criteria if type(each) not in CRITERIA):
        raise ValueError(
            f"in a batch lossless asks stopping criteria row by row; got {others}, allowed: "
            f"{', '.join(kind.__name__ for kind in CRITERIA)}"
        )
    ends = {type(each) for each in criteria}
    if StopStringCriteria in ends and EosTokenCriteria not in ends:
        raise ValueError(
            "without an end token, stock generate continues rows that have met their stop string; set eos_token_id, or "
            "decode one sequence at a time"
        )


def _names(objects: Iterable[object]) -> str:
    return ", ".join(type(each).__name__ for each in objects)


def _check_model(model: PreTrainedModel, model_kwargs: dict[str, Any]) -> None:
    config: Any = find_decoder(model).config
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"lossless decodes batches of {', '.join(MODEL_TYPES)}; got model type {config.model_type!r}, which it "
            "decodes one sequence at a time"
        )
    layers = model_kwargs[CACHE].layers
    if getattr(config, "sliding_window", None) is not None or any(type(layer) is not DynamicLayer for layer in layers):
        raise ValueError(
            "in a batch the rows' tokens lie at different places of the KV cache, which sliding windows do not allow; "
            "decode one sequence at a time"
        )
    if attn_implementation(model) not in BACKENDS:
        raise ValueError(
            f"in a batch lossless needs attention masks with holes, which {', '.join(BACKENDS)} take; got "
            f"{attn_implementation(model)!r}"
        )


def _check_arguments(input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    given = generate_arguments()
    assert given is not None, "checked before"
    if any(given["kwargs"].get(name) is not None for name in (CACHE, OLD_CACHE)) or config.return_dict_in_generate:
        raise ValueError(
            "in a batch the rows' tokens lie at different places of the KV cache, so lossless neither takes nor "
            "returns one; leave past_key_values and return_dict_in_generate out"
        )
    if given["streamer"] is not None:
        raise ValueError("a streamer shows one sequence; leave it out of a batch")
    if others := sorted({name for name, value in model_kwargs.items() if value is not None} - ARGUMENTS):
        raise ValueError(f"in a batch lossless passes on {', '.join(sorted(ARGUMENTS))}; got {', '.join(others)}")
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if positions is None or positions.shape != input_ids.shape:
        shape = None if positions is None else tuple(positions.shape)
        raise ValueError(f"in a batch lossless needs positions of shape {tuple(input_ids.shape)}; got {shape}")
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(
            f"in a batch lossless needs an attention mask of shape {tuple(input_ids.shape)}; got {tuple(mask.shape)}"
        )
