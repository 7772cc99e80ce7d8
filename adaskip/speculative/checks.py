"""Which requests can be verified several tokens at a time."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode

from adaskip.core.blocks import find_decoder
from adaskip.core.hf import SLIDING_MASK, changes_arguments


def check_request(
    model: PreTrainedModel,
    input_ids: Tensor,
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
    croppable = type(cache) is DynamicCache and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    if not croppable or cache.offloading:
        held = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            "lossless takes rejected tokens back out of the KV cache: it needs a DynamicCache on the device, filled by "
            f"the full model; got {type(cache).__name__}{' with offloading' * cache.offloading} of {held}"
        )
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError("lossless returns scores and logits, no attentions or hidden states; leave those outputs off")
    if DynamicSlidingWindowLayer in kinds and not _masks_slide(model):
        raise ValueError(
            f"the configuration of {type(model).__name__} names a sliding_window, so its KV cache drops tokens that "
            "its masks still show; lossless cannot follow that. Remove sliding_window from the configuration"
        )
    _check_arguments(model)
    _check_adapters(model)
    _check_rope(model, input_ids.shape[1], config.max_length)


def _masks_slide(model: PreTrainedModel) -> bool:
    """Whether the model's own code makes masks with a window: only such a decoder sees what its sliding cache keeps."""
    modules = (sys.modules.get(cls.__module__) for cls in type(find_decoder(model)).__mro__)
    return any(hasattr(module, SLIDING_MASK) for module in modules)


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


def _check_arguments(model: PreTrainedModel) -> None:
    """Refuse models that change the arguments of a forward from token to token in a way of their own."""
    if changes_arguments(model):
        raise ValueError(
            f"{type(model).__name__} changes its arguments after every token by a method of its own, which several "
            "tokens at once would miss; lossless takes models that leave it to transformers"
        )


def _check_adapters(model: PreTrainedModel) -> None:
    """Refuse adapters that treat a token by its place in the forward, and so several at once not as one by one."""
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "alora_invocation_tokens", None) is not None:
            kind = "activated LoRA"
        elif kind != "XLORA":
            continue
        raise ValueError(
            f"adapter {name!r} is {kind}, which treats a token by its place in the forward: several tokens at once are "
            "not computed as one by one; plain LoRA can be verified"
        )
