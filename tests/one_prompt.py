"""Strategies for models of four layers, and greedy answers to one prompt."""

from __future__ import annotations

import torch

from adaskip.calibration.measure import calibrate
from adaskip.core.plan import Budget, SkipPlan
from adaskip.strategies import AdaSkip, FixedPlan
from tests.families import random_prompts

PLAN = SkipPlan(attention={1}, ffn={2})


def fixed(phase="e2e", plan=PLAN):
    return FixedPlan(num_layers=4, phase=phase, plan=plan)


def learning(model):
    profile = calibrate(model, random_prompts([9, 7]))
    budget = Budget(sublayers=2)
    return AdaSkip(num_layers=4, budget=budget, profile=profile, learning_window=6, beta_quantile=0.25, phase="decode")


def greedy(model, prompt, new_tokens=12, **options):
    ids = prompt[None]
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**settings, **options})
