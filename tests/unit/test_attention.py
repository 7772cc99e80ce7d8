"""`sdpa_packed` against transformers' `sdpa`, eager and compiled."""

from __future__ import annotations

import pytest
import torch

from adaskip.core.context import skipping
from adaskip.core.packed_sdpa import PACKED, register_packed
from adaskip.core.plan import SkipPlan
from adaskip.strategies import FixedPlan
from tests.compiled_runs import CountedGraphs, run
from tests.families import random_model, random_prompts

FAMILIES = ["llama", "mistral", "qwen3", "gemma3"]


def packed(family: str):
    register_packed()
    model = random_model(family)
    model.set_attn_implementation(PACKED)
    return model


@pytest.mark.parametrize("lengths", [[9], [9, 4, 7]])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_sdpa(family, lengths):
    """Left-padded batches, dynamic cache, with and without skipped sublayers."""
    stock, ours, prompts = random_model(family), packed(family), random_prompts(lengths)
    assert stock.config.num_key_value_heads < stock.config.num_attention_heads
    for plan in (SkipPlan(), SkipPlan(attention={0}, ffn={1})):
        outputs = []
        for model in (stock, ours):
            with skipping(model, FixedPlan(num_layers=stock.config.num_hidden_layers, plan=plan)):
                outputs.append(torch.stack(run(model, prompts).logits))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def step_code(model) -> str:
    """The code of all that is compiled in a generation on a static cache."""
    torch._dynamo.reset()
    graphs = CountedGraphs()
    run(model, random_prompts([9]), compile_config=graphs.config())
    return "\n".join(graph.code for graph in graphs)


@pytest.mark.slow
def test_a_compiled_step_does_not_write_out_every_heads_keys():
    assert ".expand(1, 2, 2," in step_code(random_model("llama"))
    code = step_code(packed("llama"))
    assert "scaled_dot_product_attention" in code
    assert ".expand(1, 2, 2," not in code
