"""A quantised KV cache of transformers inside `skipping`: the output is right, and its bytes are counted."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import cache_utils

from adaskip.core.context import skipping
from adaskip.core.kv_cache import SkippedLayer, kv_bytes
from adaskip.core.plan import SkipPlan
from adaskip.speculative import lossless
from adaskip.strategies import FixedPlan
from tests.families import random_model

pytestmark = pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"),
    reason="transformers has no fp8 cache in this release",
)
PLAN = SkipPlan(attention={1, 3}, ffn={2})
IDS = torch.arange(1, 13)[None]
OPTIONS = {
    **{"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0},
    **{"return_dict_in_generate": True, "output_logits": True},
}


def fp8(model) -> cache_utils.QuantizedCache:
    return cache_utils.QuantizedCache(backend="fp8", config=model.config)


def test_skipped_sublayers_are_as_if_they_put_out_zero():
    model = random_model("llama")
    zeroed = copy.deepcopy(model)
    for i in PLAN.attention:
        zeroed.model.layers[i].self_attn.o_proj.weight.data.zero_()
    for i in PLAN.ffn:
        zeroed.model.layers[i].mlp.down_proj.weight.data.zero_()
    expected = zeroed.generate(IDS, past_key_values=fp8(model), **OPTIONS)
    for phase in ("prefill", "e2e"):
        with skipping(model, FixedPlan(num_layers=4, plan=PLAN, phase=phase)):
            ours = model.generate(IDS, past_key_values=fp8(model), **OPTIONS)
        assert torch.equal(torch.stack(ours.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_bytes_are_those_of_the_quantised_kv_of_the_live_layers(phase):
    model = random_model("llama")
    full, skipped = fp8(model), fp8(model)
    model.generate(IDS, past_key_values=full, **OPTIONS)
    with skipping(model, FixedPlan(num_layers=4, plan=PLAN, phase=phase)):
        model.generate(IDS, past_key_values=skipped, **OPTIONS)
    tokens, config = IDS.shape[1] + OPTIONS["max_new_tokens"] - 1, model.config
    values = 2 * tokens * config.num_key_value_heads * config.head_dim
    assert kv_bytes(full) == 4 * (values + 2 * 4)  # a byte each, and a float32 scale of the keys and of the values
    assert kv_bytes(skipped) * 2 == kv_bytes(full)
    assert [type(layer) is SkippedLayer for layer in skipped.layers] == [False, True, False, True]


def test_lossless_mode_refuses_it():
    model = random_model("llama")
    with pytest.raises(ValueError, match="so it needs a DynamicCache"):
        model.generate(IDS, past_key_values=fp8(model), custom_generate=lossless(model, PLAN), **OPTIONS)
