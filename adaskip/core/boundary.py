"""Reads a prompt in two parts: all tokens but the last under a plan that keeps the K/V, the last in the full model.

The first part leaves the K/V of every layer, so the last token is a decode step of the full model, and the first token
of the answer is chosen by all layers. Paper: POP, arXiv 2602.03295, boundary handling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from adaskip.core.hf import CACHE

PER_TOKEN = {"input_ids": -1, "inputs_embeds": -2, "position_ids": -1, "cache_position": -1}
"""The arguments of a decoder that have an entry for each token of the forward, and its dimension."""
FURTHER_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")


@dataclass(frozen=True)
class Split:
    """The arguments of the decoder's forward for both parts of a prompt. first: None for a prompt of one token."""

    first: dict[str, Any] | None
    last: dict[str, Any]

    @classmethod
    def of(cls, inputs: dict[str, Any], config: Any) -> Split:
        """Split the arguments of one forward, all by name. config: of the decoder.

        Raises ValueError for what cannot be split: a call without a KV cache, masks that are not [B, past + S] or hide
        the last token of a row, several prompts in one row, other tensors, outputs besides the last hidden states.
        """
        if inputs.get(CACHE) is None:
            _refuse("no KV cache", "use_cache=True")
        for name in FURTHER_OUTPUTS:
            if inputs.get(name) or (inputs.get(name) is None and getattr(config, name, False)):
                _refuse(name, "the last hidden states alone")
        if inputs.get("return_dict") is False:
            _refuse("return_dict=False", "return_dict=True")
        tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        length = int(inputs[CACHE].get_seq_length()) + tokens.shape[1]
        _check_mask(inputs.get("attention_mask"), inputs.get("position_ids"), length)
        first, last = dict(inputs), dict(inputs)
        for name, value in inputs.items():
            if name == "attention_mask" and value is not None:
                first[name] = value[:, :-1]
            elif name in PER_TOKEN and isinstance(value, Tensor):
                count = value.shape[PER_TOKEN[name]]
                first[name] = value.narrow(PER_TOKEN[name], 0, count - 1)
                last[name] = value.narrow(PER_TOKEN[name], count - 1, 1)
            elif not isinstance(value, (bool, int, float, str, Cache, type(None))):
                _refuse(f"the argument {name} ({type(value).__name__})", f"{', '.join(PER_TOKEN)}, attention_mask")
        return cls(first if tokens.shape[1] > 1 else None, last)

    def run(self, forward: Callable[..., Any], use_full_model: Callable[[], None]) -> Any:
        """The output for all tokens. forward: the decoder's own; use_full_model: called between the two parts."""
        read = None if self.first is None else forward(**self.first).last_hidden_state
        use_full_model()
        output = forward(**self.last)
        if read is not None:
            output.last_hidden_state = torch.cat([read, output.last_hidden_state], dim=1)
        return output


def _check_mask(mask: Any, positions: Tensor | None, length: int) -> None:
    """Refuse masks for which the last column is not the last token of each row. length: of the cache with S."""
    if mask is None:
        if positions is not None and bool((positions.diff(dim=-1) != 1).any()):
            _refuse("gaps in the positions but no attention mask (several prompts in a row)", "one prompt in each row")
    elif not isinstance(mask, Tensor) or mask.dim() != 2:
        found = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
        _refuse(f"an attention mask that is {found}", "a 2-D mask")
    elif mask.shape[1] != length:
        _refuse(f"an attention mask of {mask.shape[1]} columns", f"{length}, those of the KV cache and of the call")
    elif bool((mask[mask.bool().any(dim=-1), -1] == 0).any()):  # a row of padding alone begins in a later chunk
        _refuse("rows that end in padding", "padding on the left")


def _refuse(found: str, allowed: str) -> NoReturn:
    raise ValueError(
        f"a set that keeps the K/V runs the last token of a prompt by itself, which is not possible with {found}; "
        f"allowed: {allowed}"
    )
