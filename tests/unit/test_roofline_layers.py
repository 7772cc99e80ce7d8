"""The roofline of models whose layers differ in size, each of which is read from its own config."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from adaskip.core.blocks import UnsupportedModelError
from adaskip.core.plan import SkipPlan
from adaskip.roofline import ModelShape, attention_work, ffn_work, head_work, kv_bytes_per_token
from tests.families import COMMON, WINDOW, random_prompts

GEMMA_4 = {
    **{"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "sliding_window": WINDOW},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "global_head_dim": 8},
    **{"hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


def gemma_4(**options):
    """Heads of 4 in the layers with a window, of 8 in the others."""
    return AutoConfig.for_model("gemma4_text", **{**GEMMA_4, **options})


def test_a_layers_heads_are_read_from_its_own_config():
    config = gemma_4()
    shape, model = ModelShape.of(config), AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert [attention.head_dim for attention in shape.attention] == [4, 8, 4, 8]
    assert shape.num_parameters == model.num_parameters()
    assert len(shape.alike["attention"]) == 2
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.stack(random_prompts([WINDOW - 1])), past_key_values=cache)
    for skipped in ((), (1,), (0, 2)):
        held = sum(layer.keys.nbytes + layer.values.nbytes for i, layer in enumerate(cache.layers) if i not in skipped)
        assert kv_bytes_per_token(shape, SkipPlan(attention=skipped), bytes_per_value=4) * (WINDOW - 1) == held


def test_work_of_layers_that_differ_agrees_with_torchs_counter():
    config = gemma_4()
    shape, model = ModelShape.of(config), AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = WINDOW - 1
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.stack(random_prompts([tokens])), logits_to_keep=1)
    sizes = {"tokens": tokens, "context": tokens, "attention": "eager"}
    layers = [attention_work(shape, layer=layer, **sizes) for layer in range(4)]
    layers += [ffn_work(shape, tokens=tokens, layer=layer) for layer in range(4)]
    assert layers[1].flops > layers[0].flops
    rope = counter.get_total_flops() - sum(work.flops for work in layers) - head_work(shape, tokens=tokens).flops
    assert 0 <= rope <= 2 * 2 * 8 * tokens  # positions times frequencies, which transformers writes as a product


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_shared_layers": 2}, "matrix entries; the four projections of|keeps K/V for 2 of its 4 layers"),
        ({"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 61}, "is not one attention and one FFN"),
    ],
)
def test_layers_that_do_more_than_two_sublayers_are_refused_in_one_line(options, message):
    with pytest.raises(UnsupportedModelError, match=message) as error:
        ModelShape.of(gemma_4(**options))
    assert "\n" not in str(error.value)


def test_a_family_whose_layers_cannot_differ_is_refused_in_one_line():
    with pytest.raises(UnsupportedModelError, match="llama models cannot have layers of different sizes") as error:
        ModelShape.of(AutoConfig.for_model("llama", **COMMON, per_layer_config={1: {"intermediate_size": 16}}))
    assert "\n" not in str(error.value)
