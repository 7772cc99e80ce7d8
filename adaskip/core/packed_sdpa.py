"""`sdpa_packed`: PyTorch SDPA that reads each key/value head once in a compiled decode step with grouped heads.

With a mask, which static caches always have, the compiled `sdpa` of transformers materialises K/V for every query head:
for Llama-3.1-8B at 8k tokens that is half as many bytes as the weights. Here the query heads of a group are the rows of
one product instead, as in transformers when it is not compiled. Select it with
`from_pretrained(..., attn_implementation="sdpa_packed")` after `register_packed()`, or with `--attn-implementation`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "sdpa_packed"


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token; for several tokens it calls transformers' own function.

    query: [B, H, q, D]. key, value: [B, H / groups, S, D]. attention_mask: [B or 1, 1, q, S] or None.
    Returns the output, [B, q, H, D], and None instead of attention weights.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    shared = attention_mask is None or attention_mask.shape[1] == 1
    if query.shape[2] != 1 or groups == 1 or not shared or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    batch, heads, _, width = query.shape
    rows = query.reshape(batch, heads // groups, groups, width)
    output = torch.nn.functional.scaled_dot_product_attention(
        rows, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output.reshape(batch, 1, heads, output.shape[-1]), None


def register_packed() -> None:
    """Register `sdpa_packed` in transformers; calling it again changes nothing."""
    AttentionInterface.register(PACKED, packed_sdpa)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
