"""The cache that writes in place gives the stock cache's results, without its copies."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import adaskip.core.in_place_cache as module
from adaskip import InPlaceCache
from adaskip.core.context import skipping
from adaskip.core.hf import CACHE
from adaskip.core.kv_cache import SkippedLayer, kv_bytes
from adaskip.core.plan import SkipPlan
from adaskip.core.reference_loss import rewound
from adaskip.speculative import lossless
from adaskip.strategies import FixedPlan
from tests.families import FAMILIES, random_model

PLAN = SkipPlan(attention={1, 3}, ffn={2})
IDS = torch.arange(1, 13)[None]
PADDED = {"input_ids": torch.cat([IDS, IDS + 20]), "attention_mask": torch.tensor([[0] * 4 + [1] * 8, [1] * 12])}
GREEDY = {
    **{"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0},
    **{"return_dict_in_generate": True, "output_logits": True},
}


@pytest.fixture(autouse=True, params=[1, 256], ids=lambda tokens: f"room for {tokens}")
def room(request, monkeypatch):
    """With room for one token memory is used up at every second step."""
    monkeypatch.setattr(module, "ROOM_TOKENS", request.param)
    return request.param


def both(model, arguments, **options):
    """What stock's cache and ours give."""
    options = {**GREEDY, **options}
    outputs = []
    for cache in (DynamicCache(config=model.config), InPlaceCache(config=model.config)):
        torch.manual_seed(0)
        outputs.append(model.generate(**arguments, past_key_values=cache, **options))
    return outputs


def assert_same(stock, ours):
    assert torch.equal(ours.sequences, stock.sequences)
    assert torch.equal(torch.stack(ours.logits), torch.stack(stock.logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_the_stock_cache(family):
    assert_same(*both(random_model(family), {"input_ids": IDS}))


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 5},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_every_way_to_generate_gives_the_same(options):
    assert_same(*both(random_model("llama"), {"input_ids": IDS}, **options))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_gives_the_same(attention):
    assert_same(*both(random_model("llama", attn_implementation=attention), PADDED))


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_the_same_sublayers_are_skipped(phase):
    model = random_model("llama")
    with skipping(model, FixedPlan(num_layers=4, plan=PLAN, phase=phase)):
        stock, ours = both(model, PADDED)
    assert_same(stock, ours)
    layers = getattr(ours, CACHE).layers
    assert [type(layer) for layer in layers] == [module.InPlaceLayer, SkippedLayer] * 2


def test_lossless_mode_removes_rejected_tokens_from_it():
    model = random_model("llama")
    plain = model.generate(IDS, **{**GREEDY, "output_logits": False})
    decoder = lossless(model, FixedPlan(num_layers=4, plan=PLAN), gamma=3)
    cache = InPlaceCache(config=model.config)
    ours = model.generate(IDS, **{**GREEDY, "output_logits": False}, past_key_values=cache, custom_generate=decoder)
    assert torch.equal(ours.sequences, plain.sequences)
    assert decoder.last_request.judged > decoder.last_request.accepted, "some drafts were rejected"
    assert cache.get_seq_length() == plain.sequences.shape[1] - 1


def states(num_tokens, seed=0, heads=2, rows=1, dtype=torch.float32):
    return torch.randn(rows, heads, num_tokens, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def filled(num_tokens=6):
    layer = module.InPlaceLayer()
    layer.update(states(num_tokens), states(num_tokens, 1))
    return layer


def appended(layer, num_tokens=1, seed=2):
    """The keys that a layer should hold, and those that it returns, after more tokens."""
    before, new = layer.keys.clone(), states(num_tokens, seed)
    keys, _ = layer.update(new, states(num_tokens, seed + 1))
    return torch.cat([before, new], dim=-2), keys


@torch.no_grad()
def test_a_step_copies_earlier_tokens_only_when_the_room_is_used_up(room):
    layer = filled()
    places = [layer.keys.data_ptr()]
    for _ in range(8):
        appended(layer)
        places.append(layer.keys.data_ptr())
    moves = sum(a != b for a, b in pairwise(places))
    assert moves == (4 if room == 1 else 0)
    assert layer.allocated_bytes == 2 * 2 * 4 * 4 * (15 if room == 1 else 6 + room)


@torch.no_grad()
def test_removed_tokens_are_overwritten_in_place(room):
    layer = filled()
    place = layer.keys.data_ptr()
    layer.crop(-3)
    expected, keys = appended(layer, 3)
    assert torch.equal(keys, expected)
    assert keys.shape[-2] == 6
    assert keys.data_ptr() == place


def assign(layer, keys, values):
    layer.keys, layer.values = keys, values


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.crop(-6),
        lambda layer: assign(layer, layer.keys[:1], layer.values[:1]),
        lambda layer: assign(layer, layer.keys[:, :, 1:], layer.values[:, :, 1:]),
    ],
    ids=["reorder", "select", "repeat", "crop all", "first row", "without the first token"],
)
def test_stocks_methods_change_it_as_they_change_a_stock_layer(change):
    layers = (module.InPlaceLayer(), DynamicLayer())
    for layer in layers:
        layer.update(states(6, rows=2), states(6, 1, rows=2))
        change(layer)
        rows = 2 if layer.keys is None or not layer.keys.numel() else layer.keys.shape[0]
        for step in range(3):
            layer.update(states(1, 2 + step, rows=rows), states(1, 5 + step, rows=rows))
    ours, stock = layers
    assert torch.equal(ours.keys, stock.keys)
    assert torch.equal(ours.values, stock.values)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_layer_and_its_copy_do_not_write_to_each_other(copied):
    layer = filled()
    twin = copied(layer)
    for each in (layer, twin):
        each.crop(-2)
    first, second = appended(layer, 2, seed=2), appended(twin, 2, seed=5)
    assert torch.equal(*first)
    assert torch.equal(*second)
    assert torch.equal(layer.keys, first[0])
    assert not torch.equal(layer.keys, twin.keys)


def test_a_prompt_read_in_inference_mode_can_be_continued_outside():
    model = random_model("llama")
    caches = DynamicCache(config=model.config), InPlaceCache(config=model.config)
    for cache in caches:
        with torch.inference_mode():
            model(IDS, past_key_values=cache)
        with torch.no_grad():
            model(IDS[:, :3], past_key_values=cache)
    stock, ours = caches
    for a, b in zip(stock.layers, ours.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


def test_bytes_are_those_allocated_and_are_freed_with_the_attention():
    model = random_model("llama")
    cache = InPlaceCache(config=model.config)
    with torch.no_grad(), skipping(model, FixedPlan(num_layers=4, plan=PLAN, phase="decode")):
        model(IDS, past_key_values=cache)
        before = kv_bytes(cache)
        model(IDS[:, :1], past_key_values=cache)
    per_layer = 2 * (12 + module.ROOM_TOKENS) * model.config.num_key_value_heads * model.config.head_dim * 4
    assert before == 4 * per_layer
    assert kv_bytes(cache) == 2 * per_layer


def test_an_answer_is_removed_again_for_the_loss_of_a_reference():
    model = random_model("llama")
    cache = InPlaceCache(config=model.config)
    model.generate(IDS, past_key_values=cache, **GREEDY)
    assert rewound(cache, IDS.shape[1], None, GREEDY["max_new_tokens"] - 1)
    assert cache.get_seq_length() == IDS.shape[1]


def test_sliding_windows_keep_the_stock_layer():
    kinds = [type(layer) for layer in InPlaceCache(config=random_model("gemma3").config).layers]
    assert kinds == [DynamicSlidingWindowLayer, module.InPlaceLayer] * 2


def test_a_cache_without_a_config_grows_by_layers_in_place():
    model, cache = random_model("llama"), InPlaceCache()
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == [module.InPlaceLayer] * 4


def trained(model, names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in names))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("names", [["layers.2"], ["layers.3.self_attn.q_proj"], [""]], ids=str)
@pytest.mark.parametrize("first_graded", [True, False])
def test_gradients_are_those_of_the_stock_cache(names, first_graded):
    model, gradients = random_model("llama"), []
    for kind in (DynamicCache, InPlaceCache):
        parameters, cache = trained(model, names), kind(config=model.config)
        with torch.set_grad_enabled(first_graded):
            first = model(IDS, past_key_values=cache).logits
        second = model(IDS[:, :2], past_key_values=cache).logits
        with torch.no_grad():
            third = model(IDS[:, :3], past_key_values=cache).logits
        loss = second.square().sum() + (first.square().sum() if first_graded else 0)
        gradients.append([*torch.autograd.grad(loss, parameters), third])
    stock, ours = gradients
    assert all(map(torch.equal, stock, ours))


def test_a_step_in_another_dtype_gives_what_the_stock_cache_gives():
    model, outputs = random_model("llama"), []
    for kind in (DynamicCache, InPlaceCache):
        cache = kind(config=model.config)
        with torch.no_grad():
            model(IDS, past_key_values=cache)
            with torch.autocast("cpu", torch.bfloat16):
                outputs.append(model(IDS[:, :1], past_key_values=cache).logits)
            outputs.append(model(IDS[:, :2], past_key_values=cache).logits)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 2, 1, 4), (1, 1, 1, 4), (1, 2, 1, 1)], ids=["rows", "heads", "head size"])
def test_what_does_not_fit_is_refused_as_by_the_stock_cache(shape):
    layer = filled()
    before = layer.keys.clone()
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer.update(torch.ones(shape), torch.ones(shape))
    assert torch.equal(layer.keys, before)


def test_a_compiled_model_takes_it_in_one_graph():
    model = random_model("llama")
    compiled = torch.compile(model.model, backend="eager", fullgraph=True)
    stock, ours = DynamicCache(config=model.config), InPlaceCache(config=model.config)
    with torch.no_grad():
        for cache in (stock, ours):
            model.model(IDS, past_key_values=cache)
            compiled(IDS[:, :1], past_key_values=cache)
    assert torch.equal(stock.layers[3].keys, ours.layers[3].keys)


@torch.no_grad()
def test_a_reset_frees_memory_and_begins_anew():
    layer = filled()
    twin = copy.copy(layer)
    kept = twin.keys.clone()
    layer.reset()
    assert layer.allocated_bytes == layer.get_seq_length() == 0
    assert torch.equal(twin.keys, kept)
    new = states(2, 7)
    assert torch.equal(layer.update(new, new)[0], new)


@torch.no_grad()
def test_bytes_are_counted_after_a_copy_and_after_rows_were_selected():
    layer = module.InPlaceLayer()
    layer.update(states(6, rows=3), states(6, rows=3))
    whole = layer.allocated_bytes
    assert copy.copy(layer).allocated_bytes == layer.allocated_bytes == whole == 2 * 3 * (6 + module.ROOM_TOKENS) * 32
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.allocated_bytes == 2 * 6 * 32


@torch.no_grad()
def test_a_pickle_has_no_room():
    layer, stock = filled(), DynamicLayer()
    stock.update(states(6), states(6, 1))
    loaded = pickle.loads(pickle.dumps(layer))
    assert len(pickle.dumps(layer)) < len(pickle.dumps(stock)) + 200
    expected, keys = appended(loaded)
    assert torch.equal(keys, expected)
