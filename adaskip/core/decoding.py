"""Generation that depends on what the caller asks for and on nothing that the model's generation config holds.

Measurements and scored answers are greedy, one sequence per prompt, one token per forward over a KV cache, without
logits processors: the protocol of the paper and of LongBench. A checkpoint's generation config may ask for sampling,
beams, a penalty, assisted decoding or no cache at all; none of that may reach them.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from adaskip.core.wrappers import unwrapped

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}


class OwnGenerationConfig(GenerationConfig):
    """A generation config that `generate` does not complete from the model's own: what is not set is transformers'
    default."""

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        """As stock, but for the merge of the model's config, the one call of `generate` that allows custom entries."""
        if allow_custom_entries:
            return {}
        return super().update(defaults_only=defaults_only, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnGenerationConfig:
        """`generate` works on a copy; graphs last only as long as the `compile_config` is the same object."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        kept = ("compile_config",)
        vars(copied).update({k: v if k in kept else copy.deepcopy(v, memo) for k, v in vars(self).items()})
        return copied


@cache
def _fields() -> frozenset[str]:
    return frozenset(GenerationConfig().to_dict())


def plain_generate(model: PreTrainedModel, **arguments: Any) -> Any:
    """`model.generate(**arguments)`, greedy unless they say otherwise, whatever `model.generation_config` says.

    arguments: inputs, and fields of a generation config; those not given have transformers' defaults, and without
    `eos_token_id` nothing ends an answer. model: a stock model, or a wrapper that `blocks.unwrapped` knows.
    Returns what `generate` does.
    """
    stock: Any = unwrapped(model)
    config = {name: value for name, value in arguments.items() if name in _fields()}
    inputs = {name: value for name, value in arguments.items() if name not in config}
    return stock.generate(**inputs, generation_config=OwnGenerationConfig(**{**GREEDY, **config}))
