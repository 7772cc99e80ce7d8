"""The structure probe: whatever a model does in it ends in a proof, or in one line that names class and reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from adaskip.core.blocks import UnsupportedModelError, find_structure, probe_layers
from adaskip.core.context import skipping
from adaskip.core.hf import CACHE
from adaskip.core.plan import SkipPlan
from adaskip.strategies import FixedPlan
from tests.families import COMMON, FAMILIES, random_model, random_prompts


def state(model):
    """Every instance attribute and hook of every module, by identity."""
    held = {}
    for name, module in model.named_modules():
        for part in (vars(module), module._buffers, module._modules, module._forward_hooks, module._forward_pre_hooks):
            held |= {(name, key, id(part)): value for key, value in part.items()}
    return held


def assert_refused(model, match):
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=match) as caught:
        find_structure(model)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    assert "\n" not in str(caught.value)
    return caught.value


def replace_output(model, index, change):
    layer = model.model.layers[index]
    stock = layer.forward
    layer.forward = lambda *args, **kwargs: change(stock(*args, **kwargs))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_family_is_proved_and_left_as_it_was(family, dtype):
    model = random_model(family).to(dtype)
    before = state(model)
    proved = probe_layers(model)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    assert proved.stream_dtypes == (dtype,) * 4
    assert proved.cache_slots == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("change", "what"),
    [(lambda h: (h,), "tuple"), (lambda h: None, "NoneType"), (lambda h: {"h": h}, "dict"), (lambda h: [h], "list")],
    ids=["tuple", "None", "dict", "list"],
)
@pytest.mark.parametrize("index", [0, 3])
def test_a_layer_that_returns_more_than_hidden_states_is_refused(index, change, what):
    model = random_model("llama")
    replace_output(model, index, change)
    assert_refused(model, rf"LlamaDecoderLayer \(layer {index}\) returns {what} instead of only the hidden states")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no"), TypeError(), KeyError("k"), AttributeError("a"), IndexError(), NotImplementedError(),
     ValueError("two\nlines"), StopIteration()],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("where", ["layer", "attention", "decoder"])
def test_what_the_model_raises_is_refused_with_its_class(where, error):
    model = random_model("llama")

    def fails(*args, **kwargs):
        raise error

    layer = model.model.layers[2]
    owner, name = {
        "layer": (layer, r"LlamaDecoderLayer \(layer 2\)"),
        "attention": (layer.self_attn, r"LlamaDecoderLayer \(layer 2\)"),
        "decoder": (model.model.norm, "LlamaModel"),
    }[where]
    owner.forward = fails
    refusal = assert_refused(model, f"{name} fails on 4 tokens: {type(error).__name__}")
    assert refusal.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), torch.OutOfMemoryError("full"), MemoryError()])
def test_interrupts_and_full_memory_come_through(error):
    model = random_model("llama")

    def fails(*args, **kwargs):
        raise error

    model.model.layers[2].forward = fails
    before = state(model)
    with pytest.raises(type(error)) as caught:
        find_structure(model)
    assert caught.value is error
    after = state(model)
    assert all(after[key] is before[key] for key in before)


def test_a_sublayer_that_fails_only_by_itself_is_refused():
    model = random_model("llama")
    layer = model.model.layers[1]
    stock = layer.self_attn.forward

    def picky(hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
        if "position_ids" in kwargs:
            raise TypeError("unexpected position_ids")
        return stock(hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs)

    def forward(hidden_states, position_ids=None, **kwargs):  # keeps the positions from its attention
        hidden_states = hidden_states + layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))

    layer.self_attn.forward, layer.forward = picky, forward
    assert_refused(
        model, r"layer 1\) has the parts of a pre-norm block, but they cannot run one by one: .*position_ids"
    )


def rewire(model, loop):
    """Let `loop(layers, hidden_states, kwargs)` run the layers of a Llama, on the stock decoder's inputs."""
    decoder = model.model

    def forward(input_ids=None, inputs_embeds=None, past_key_values=None, use_cache=None):
        hidden_states = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        positions = torch.arange(hidden_states.shape[1])[None]
        rope = decoder.rotary_emb(hidden_states, position_ids=positions)
        kwargs = {"attention_mask": None, "position_embeddings": rope, "past_key_values": past_key_values}
        return loop(decoder.layers, hidden_states, kwargs)

    decoder.forward = forward
    return model


def in_order(layers, hidden_states, kwargs):
    for layer in layers:
        hidden_states = layer(hidden_states, **kwargs)
    return hidden_states


def test_the_rewired_decoder_is_proved_when_it_runs_its_layers_in_order():
    assert find_structure(rewire(random_model("llama"), in_order)).name == "pre-norm"


@pytest.mark.parametrize("order", [(0, 1, 2), (), (0, 1, 2, 3, 3), (1, 0, 2, 3), (0, 1, 2, 3, 0, 1, 2, 3)], ids=str)
def test_layers_that_do_not_run_once_each_in_order_are_refused(order):
    model = rewire(random_model("llama"), lambda layers, h, kwargs: in_order([layers[i] for i in order], h, kwargs))
    called = ", ".join(map(str, order)) or "none"
    assert_refused(model, f"LlamaModel with 4 layers calls them in this order: {called};")


def test_layers_dropped_at_random_are_refused():
    def loop(layers, hidden_states, kwargs):
        kept = [layer for layer in layers if torch.rand(()) > 0.5]
        return in_order(kept, hidden_states, kwargs)

    assert_refused(rewire(random_model("llama"), loop), "LlamaModel with 4 layers calls them in this order")


def test_more_positional_arguments_are_refused_unless_they_are_none():
    def loop(layers, hidden_states, kwargs, extra):
        for layer in layers:
            hidden_states = layer(hidden_states, extra, **kwargs)
        return hidden_states

    def takes_one_more(model):
        for layer in model.model.layers:
            layer.forward = lambda hidden_states, extra, *, stock=layer.forward, **kw: stock(hidden_states, **kw)
        return model

    model = takes_one_more(random_model("llama"))
    rewire(model, lambda layers, h, kwargs: loop(layers, h, kwargs, torch.ones(1)))
    assert_refused(model, r"\(layer 0\) receives more positional arguments than the hidden states \(Tensor\)")
    rewire(model, lambda layers, h, kwargs: loop(layers, h, kwargs, None))
    assert_refused(model, "missing 1 required positional argument")  # this layer cannot do without


def test_hidden_states_passed_by_name_are_found():
    def loop(layers, hidden_states, kwargs):
        for layer in layers:
            hidden_states = layer(hidden_states=hidden_states, **kwargs)
        return hidden_states

    assert find_structure(rewire(random_model("llama"), loop)).name == "pre-norm"


def test_layers_that_are_not_given_hidden_states_are_refused():
    model = rewire(random_model("llama"), lambda layers, h, kwargs: layers[0]((h, h), **kwargs))
    assert_refused(model, r"LlamaDecoderLayer \(layer 0\) receives tuple instead of hidden states \[B, S, D\]")


def test_a_decoder_that_goes_on_after_a_failed_layer_is_refused():
    def loop(layers, hidden_states, kwargs):
        for layer in layers:
            try:
                hidden_states = layer(hidden_states, **kwargs)
            except RuntimeError:
                continue
        return hidden_states

    model = rewire(random_model("llama"), loop)

    def fails(*args, **kwargs):
        raise RuntimeError

    model.model.layers[1].forward = fails
    assert_refused(model, "LlamaModel continues after one of its layers has failed")


def test_nan_proves_nothing():
    model = random_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data.fill_(float("nan"))
    assert_refused(model, r"LlamaDecoderLayer \(layer 2\) computes NaN or infinity")


def test_large_activations_that_only_noise_makes_are_not_held_against_a_model():
    model = random_model("llama")
    replace_output(model, 1, lambda h: h if h.abs().max() < 3 else h * float("inf"))
    model.model.embed_tokens.weight.data.mul_(0.01)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.mul_(0.1)
        layer.self_attn.o_proj.weight.data.mul_(0.1)
    assert find_structure(model).name == "pre-norm"  # proved on tokens


def test_a_layer_that_works_in_place_is_refused():
    model = random_model("llama")
    layer = model.model.layers[1]
    stock = layer.forward
    layer.forward = lambda hidden_states, **kwargs: hidden_states.copy_(stock(hidden_states, **kwargs))
    assert_refused(model, r"LlamaDecoderLayer \(layer 1\) changes its input hidden states in place")


def test_a_layer_that_scales_its_output_is_refused_with_the_factor():
    model = random_model("llama")
    replace_output(model, 1, lambda h: 0.5 * h)
    assert_refused(model, r"layer 1\) .*computes something else \(its output is the sublayers' output times 0.5\)")


def test_weights_of_the_layer_itself_are_refused_even_where_they_do_nothing_yet():
    model = random_model("llama")
    model.model.layers[1].gate = nn.Parameter(torch.ones(1))
    assert_refused(model, "LlamaDecoderLayer has parts .*'gate'")


def test_a_layer_that_depends_on_chance_is_refused():
    model = random_model("llama")
    replace_output(model, 2, lambda h: h + torch.rand(()))
    assert_refused(model, r"layer 2\) computes a different output when it runs alone.*random numbers")


def shared_attention(layer, source):
    """Let a layer attend with keys that `source(kwargs)` finds elsewhere, in its own manner of a shared K/V layer."""
    stock = layer.self_attn.forward

    def forward(hidden_states, **kwargs):
        output, weights = stock(hidden_states, **kwargs)
        return output + source(kwargs[CACHE]).mean(), weights

    layer.self_attn.forward = forward


def test_keys_shared_by_way_of_the_cache_are_refused():
    model = random_model("llama")
    shared_attention(model.model.layers[3], lambda cache: cache.layers[1].keys)
    assert_refused(model, r"layer 3\) computes a different output when it runs alone .*shared keys and values")


def test_keys_left_on_a_module_are_refused():
    model = random_model("llama")
    store = model.model.layers[1].self_attn
    store.k_proj.forward = lambda x, stock=store.k_proj.forward: store.kept.append(stock(x)) or store.kept[-1]
    store.kept = []
    shared_attention(model.model.layers[3], lambda cache: store.kept[-1])
    with pytest.raises(UnsupportedModelError, match=r"layer 3\) computes a different output when it runs alone"):
        find_structure(model)


def test_an_attention_that_fills_another_layer_of_the_cache_is_refused():
    model = random_model("llama")
    model.model.layers[3].self_attn.layer_idx = 7

    def forward(hidden_states, stock=model.model.layers[3].self_attn.forward, **kwargs):
        attention = model.model.layers[3].self_attn
        attention.layer_idx = 3
        try:
            return stock(hidden_states, **kwargs)
        finally:
            attention.layer_idx = 7

    model.model.layers[3].self_attn.forward = forward
    assert_refused(model, r"layer 3\) fills layers \[3\] of the KV cache, but its layer_idx is 7")


def test_layers_with_other_indices_are_proved_and_say_where_their_keys_go():
    model = random_model("llama", 6)
    model.model.layers = nn.ModuleList([layer for i, layer in enumerate(model.model.layers) if i != 2])
    model.config.num_hidden_layers = 5
    assert probe_layers(model).cache_slots == (0, 1, 3, 4, 5)


def test_one_layer_in_two_places_is_refused():
    model = random_model("llama")
    model.model.layers[3] = model.model.layers[1]
    assert_refused(model, "layers 1 and 3 are the same LlamaDecoderLayer object")


def test_every_own_forward_comes_back_also_where_one_layer_stands_twice():
    from adaskip.core.probe import replaced_forwards

    layer, other = random_model("llama", 2).model.layers
    with replaced_forwards([layer, other, layer], [print, print, print]):
        assert layer.forward is print
    assert "forward" not in vars(layer)
    assert "forward" not in vars(other)


class Int8Embedding(nn.Module):
    """Rows of int8 with a scale: the dtype of the weight is not that of the hidden states."""

    def __init__(self, stock, dtype):
        super().__init__()
        self.register_buffer("weight", (stock.weight * 40).round().to(torch.int8))
        self.dtype = dtype

    def forward(self, ids):
        return self.weight[ids].to(self.dtype) / 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_stream_has_the_dtype_that_the_embeddings_put_out(dtype):
    model = random_model("llama").to(dtype)
    model.set_input_embeddings(Int8Embedding(model.get_input_embeddings(), dtype))
    assert probe_layers(model).stream_dtypes == (dtype,) * 4


@pytest.mark.parametrize("breaks", ["no inputs_embeds", "no embeddings", "inputs_embeds raise", "embeddings raise"])
def test_a_decoder_that_needs_token_ids_is_proved_on_these(breaks):
    model = rewire(random_model("llama"), in_order)
    stock = model.model.forward
    if breaks == "no inputs_embeds":
        model.model.forward = lambda input_ids, past_key_values=None: stock(input_ids, past_key_values=past_key_values)
    elif breaks == "inputs_embeds raise":

        def forward(input_ids=None, inputs_embeds=None, past_key_values=None):
            if input_ids is None:
                raise ValueError("input_ids are needed")
            return stock(input_ids, past_key_values=past_key_values)

        model.model.forward = forward
    else:

        def get_input_embeddings():
            if breaks == "embeddings raise":
                raise NotImplementedError

        model.model.get_input_embeddings = model.get_input_embeddings = get_input_embeddings
    assert find_structure(model).name == "pre-norm"


def test_a_hidden_size_that_the_config_does_not_know_is_no_matter():
    model = random_model("llama")
    del model.config.hidden_size
    assert find_structure(model).name == "pre-norm"


def test_weights_without_data_are_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["llama"][0](**COMMON))
    assert_refused(model.eval(), "LlamaDecoderLayer.* computes on the meta device")


def test_layers_skipped_after_a_refusal_are_those_of_the_model():
    model = random_model("llama")
    ids = random_prompts([6])[0][None]
    stock = model(ids).logits
    layer = model.model.layers[1]
    layer.forward = lambda *args, **kwargs: (layer.mlp(args[0]),)
    assert_refused(model, "returns tuple")
    del layer.forward
    with skipping(model, FixedPlan(num_layers=4, plan=SkipPlan(), phase="e2e")):
        assert torch.equal(model(ids, past_key_values=DynamicCache(config=model.config)).logits, stock)
