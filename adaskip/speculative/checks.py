"""Which requests can be verified several tokens at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from adaskip.blocks import find_decoder


def check_request(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> None:
    """Raise ValueError, in one line, for what cannot be verified several tokens at a time."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"lossless decodes greedily or by sampling, with one beam; got {mode.value}")
    if len(input_ids) != 1:
        raise ValueError(
            f"lossless decodes one sequence at a time (rows accept different numbers of tokens); got {len(input_ids)}"
        )
    cache = model_kwargs.get("past_key_values")
    if cache is None or not model_kwargs.get("use_cache"):
        raise ValueError("lossless needs the KV cache; call generate with use_cache=True")
    kinds = {type(layer) for layer in cache.layers}
    croppable = isinstance(cache, DynamicCache) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    if not croppable or cache.offloading:
        held = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            "lossless takes rejected tokens back out of the KV cache: it needs a DynamicCache on the device, filled by "
            f"the full model; got {type(cache).__name__}{' with offloading' * cache.offloading} of {held}"
        )
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError("lossless returns scores and logits, no attentions or hidden states; leave those outputs off")
    stateful = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
    if kept := [type(p).__name__ for p in logits_processor if isinstance(p, stateful)]:
        raise ValueError(f"{', '.join(kept)} keeps state from token to token and cannot judge a draft; leave it off")
    _check_rope(model, input_ids.shape[1], config.max_length)


def _check_rope(model: PreTrainedModel, prompt_length: int, max_length: int) -> None:
    """Refuse rotary positions that depend on the tokens of one forward: several at once are not one by one."""
    rope: Any = getattr(find_decoder(model), "rotary_emb", None)
    kind = getattr(rope, "rope_type", None)
    if kind == "dynamic":
        limit = rope.original_max_seq_len
    elif kind == "longrope":
        limit = rope.config.rope_parameters["original_max_position_embeddings"]
    else:
        return
    if max_length > limit and (kind == "dynamic" or prompt_length <= limit):
        raise ValueError(
            f"{kind} rotary positions change at {limit} tokens, where several tokens at once are not computed as one "
            f"by one; this request may reach {max_length} tokens, allowed are {limit}"
        )
