"""A plan with scales for models of four layers, and greedy answers to padded prompts with their logits."""

from __future__ import annotations

import torch

from adaskip.core.plan import SkipPlan, Sublayer
from adaskip.core.token_ids import left_padded
from adaskip.strategies import FixedPlan

PLAN = SkipPlan.of_sublayers({Sublayer("attention", 0): 1.1, Sublayer("ffn", 1): 0.9, Sublayer("attention", 2): 1.0})


def fixed(phase="e2e", plan=PLAN, num_layers=4):
    return FixedPlan(num_layers=num_layers, phase=phase, plan=plan)


def greedy(model, prompts, **options):
    ids, mask = left_padded(prompts, 0, torch.device("cpu"))
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    out = model.generate(
        input_ids=ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings
    )
    return out, ids.shape[1]
