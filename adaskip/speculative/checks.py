"""Refuses requests whose tokens cannot be verified several at a time."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode

from adaskip.core.blocks import find_decoder
from adaskip.core.hf import CACHE, SLIDING_MASK, changes_arguments
from adaskip.core.in_place_cache import GROWING_CACHES, UNBOUNDED_LAYERS


def check_request(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> None:
    """Raise ValueError for a request whose tokens cannot be verified several at a time."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"lossless decodes greedily or by sampling, with one beam; got {mode.value}")
    cache = model_kwargs.get(CACHE)
    if cache is None or not model_kwargs.get("use_cache"):
        raise ValueError("lossless needs the KV cache; call generate with use_cache=True")
    kinds = {type(layer) for layer in cache.layers}
    croppable = type(cache) in GROWING_CACHES and kinds <= {*UNBOUNDED_LAYERS, DynamicSlidingWindowLayer}
    if not croppable or cache.offloading:
        held = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            "lossless removes rejected tokens from the KV cache, so it needs a DynamicCache or InPlaceCache on the "
            f"device, filled by the full model; got {type(cache).__name__}{' with offloading' * cache.offloading} of "
            f"{held}"
        )
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError(
            "lossless returns scores and logits but no attentions or hidden states; leave these outputs off"
        )
    if DynamicSlidingWindowLayer in kinds and not _masks_slide(model):
        raise ValueError(
            f"the configuration of {type(model).__name__} has a sliding_window, so its KV cache drops tokens that its "
            "masks do not hide, which lossless does not support; remove sliding_window from the configuration"
        )
    _check_arguments(model)
    _check_adapters(model)
    _check_rope(model, input_ids.shape[1], config.max_length)


def _masks_slide(model: PreTrainedModel) -> bool:
    """Whether the model's own code builds sliding-window masks, which match the contents of a sliding cache."""
    modules = (sys.modules.get(cls.__module__) for cls in type(find_decoder(model)).__mro__)
    return any(hasattr(module, SLIDING_MASK) for module in modules)


def _check_rope(model: PreTrainedModel, prompt_length: int, max_length: int) -> None:
    """Refuse rotary positions that depend on the length of a forward: several tokens at once would differ from one by
    one."""
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
            f"{kind} rotary positions change at {limit} tokens, so several tokens at once would be computed "
            f"differently than one by one; this request may reach {max_length} tokens, allowed: {limit}"
        )


def _check_arguments(model: PreTrainedModel) -> None:
    """Refuse models with their own method to update the arguments of a forward from token to token."""
    if changes_arguments(model):
        raise ValueError(
            f"{type(model).__name__} updates its arguments after every token with its own method, which several tokens "
            "at once would miss; lossless supports models that use the method of transformers"
        )


def _check_adapters(model: PreTrainedModel) -> None:
    """Refuse adapters whose effect on a token depends on its position in the forward."""
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "alora_invocation_tokens", None) is not None:
            kind = "activated LoRA"
        elif kind != "XLORA":
            continue
        raise ValueError(
            f"adapter {name!r} is {kind}, whose effect on a token depends on its position in the forward, so several "
            "tokens at once would be computed differently than one by one; plain LoRA is supported"
        )
