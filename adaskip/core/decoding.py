"""Generation that follows the caller's arguments and ignores the model's generation config.

Measurements and scored answers are greedy, one sequence per prompt, one token per forward over a KV cache, without
logits processors, as the paper has it. A checkpoint's generation config may ask for sampling,
beams, a penalty, assisted decoding or no cache; none of these may affect them.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from adaskip.core.wrappers import unwrapped

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}


class OwnGenerationConfig(GenerationConfig):
    """A generation config that `generate` does not complete from the model's own: unset fields keep transformers'
    defaults."""

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Like the stock method, but ignores the merge of the model's config: the only call of `generate` that allows
        custom entries."""
        if allow_custom_entries:
            return {}
        return super().update(defaults_only=defaults_only, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnGenerationConfig:
        """Copy all but `compile_config`: `generate` works on a copy, and graphs are reused only for the same object."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        kept = ("compile_config",)
        vars(copied).update({k: v if k in kept else copy.deepcopy(v, memo) for k, v in vars(self).items()})
        return copied


@cache
def _fields() -> frozenset[str]:
    return frozenset(GenerationConfig().to_dict())


def plain_generate(model: PreTrainedModel, **arguments: Any) -> Any:
    """`model.generate(**arguments)`, greedy by default, without the settings of `model.generation_config`.

    model: a stock model, or a wrapper that `wrappers.unwrapped` supports. arguments: inputs, and fields of a generation
    config; other fields have transformers' defaults, so without `eos_token_id` no token ends an answer.
    Returns the result of `generate`.
    """
    stock: Any = unwrapped(model)
    config = {name: value for name, value in arguments.items() if name in _fields()}
    inputs = {name: value for name, value in arguments.items() if name not in config}
    return stock.generate(**inputs, generation_config=OwnGenerationConfig(**{**GREEDY, **config}))
