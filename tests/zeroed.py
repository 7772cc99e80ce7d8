"""The model that a plan without scales stands for: a copy whose skipped sublayers add exactly nothing."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from adaskip.core.blocks import find_decoder
from adaskip.core.plan import SkipPlan


def zeroed(model, plan: SkipPlan):
    """A deep copy of `model` where the outputs of the sublayers of `plan` are multiplied by zero."""
    twin = copy.deepcopy(model)
    layers = find_decoder(twin).layers
    for i in plan.attention:
        layers[i].self_attn.register_forward_hook(lambda module, args, output: (output[0] * 0, *output[1:]))
    for i in plan.ffn:
        layers[i].mlp.register_forward_hook(_nothing)
    return twin


def _nothing(module: nn.Module, args, output):
    return output * 0 if isinstance(output, Tensor) else (output[0] * 0, *output[1:])


@torch.no_grad()
def greedy_reference(model, ids: Tensor, mask: Tensor, plan: SkipPlan, phase: str, new_tokens: int) -> Tensor:
    """Greedy tokens [B, new_tokens] under a plan without scales, by stock forwards on one KV cache.

    The prompt runs through the full model in phase decode and through the zeroed one otherwise, answers through the
    zeroed one. A zeroed attention adds nothing whatever K/V it sees.
    """
    without = zeroed(model, plan)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    reader = model if phase == "decode" else without
    output = reader(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    tokens = [output.logits[:, -1].argmax(-1)]
    while len(tokens) < new_tokens:
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
        output = without(
            input_ids=tokens[-1][:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        tokens.append(output.logits[:, -1].argmax(-1))
    return torch.stack(tokens, dim=1)
