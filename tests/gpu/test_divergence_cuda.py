"""Divergences on a CUDA device."""

from __future__ import annotations

import pytest

from adaskip.calibration.divergence import OutputDivergence
from adaskip.core.plan import SkipPlan
from tests.families import random_model, random_prompts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_prompts_may_be_on_the_device(phase):
    model, prompts = random_model("llama").cuda(), random_prompts([9, 14])
    options = {"eos_token_ids": [2], "pad_token_id": 0, "answers": [[5, 6, 7], [8, 9]]}
    plan, there = SkipPlan(ffn={1}), [prompt.cuda() for prompt in prompts]
    assert OutputDivergence(model, there, phase, **options)(plan) == OutputDivergence(model, prompts, phase, **options)(
        plan
    )
