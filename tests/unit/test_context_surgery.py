"""Models, caches and strategies that change around a context: proved again, right, or refused."""

from __future__ import annotations

import copy
import types

import accelerate.hooks
import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from adaskip.core.blocks import UnsupportedModelError
from adaskip.core.context import skipping
from adaskip.core.layer_patch import LayerPatch
from adaskip.core.plan import Affine, Budget, SkipPlan, Sublayer
from adaskip.core.strategy import Strategy
from adaskip.speculative import lossless
from adaskip.strategies import FixedPlan
from tests.families import WIDTH, random_model, random_prompts
from tests.reference import ReferenceDecoder
from tests.zeroed import zeroed

PLAN = SkipPlan(attention={1}, ffn={2})
IDS = random_prompts([9])[0][None]


def fixed(phase="e2e", plan=PLAN):
    return FixedPlan(num_layers=4, phase=phase, plan=plan)


def logits(model, plan=PLAN):
    with torch.no_grad(), skipping(model, fixed("e2e", plan)):
        return model(IDS).logits


def greedy(model, ids=IDS, new_tokens=8, **options):
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**settings, **options})


def halving(layer):
    stock = type(layer).forward
    return types.MethodType(lambda self, *args, **kwargs: stock(self, *args, **kwargs) * 0.5, layer)


def test_a_layer_that_computes_something_else_than_when_it_was_proved_is_refused():
    model = random_model("llama")
    logits(model)
    model.model.layers[1].forward = halving(model.model.layers[1])
    with pytest.raises(UnsupportedModelError, match=r"something else|scaled|times"):
        logits(model)
    del model.model.layers[1].forward
    assert logits(model).isfinite().all()


def test_a_part_replaced_between_two_contexts_is_the_one_that_runs():
    model = random_model("llama")
    logits(model)
    model.model.layers[1].mlp = random_model("llama", seed=5).model.layers[0].mlp
    assert torch.allclose(logits(model), zeroed(model, PLAN)(IDS).logits, atol=1e-6)


def test_cache_slots_follow_layers_that_are_numbered_anew():
    model = random_model("llama", 6)
    model.model.layers = nn.ModuleList([layer for i, layer in enumerate(model.model.layers) if i != 2])
    model.config.num_hidden_layers = 5
    strategy = FixedPlan(num_layers=5, plan=SkipPlan(attention={4}))
    with skipping(model, strategy), pytest.raises(ValueError, match="indices up to 5"):
        greedy(model)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    cache = DynamicCache(config=model.config)
    with skipping(model, strategy):
        greedy(model, past_key_values=cache)
    assert [i for i, layer in enumerate(cache.layers) if layer.keys is not None] == [0, 1, 2, 3]


def sharing(model):
    twin = LlamaForCausalLM(model.config).eval()
    twin.model.layers = model.model.layers
    return twin


def test_layers_shared_with_a_model_inside_a_context_are_refused():
    model = random_model("llama")
    twin, stock = sharing(model), model(IDS).logits
    with skipping(model, fixed()):
        with pytest.raises(ValueError, match="also a layer of another model"):
            logits(twin)
        with torch.no_grad():
            assert not torch.equal(model(IDS).logits, stock)
    assert torch.equal(model(IDS).logits, stock)
    assert copy.deepcopy(model) is not model
    logits(twin)


@pytest.mark.parametrize("replace", ["layer", "forward"])
def test_a_skipped_layer_replaced_inside_the_context_is_refused(replace):
    model = random_model("llama")
    with torch.no_grad(), skipping(model, fixed("e2e", SkipPlan(ffn={2}))):
        model(IDS)
        if replace == "layer":
            model.model.layers[2] = random_model("llama", seed=1).model.layers[2]
        else:
            del model.model.layers[2].forward
        with pytest.raises(ValueError, match=r"layer 2 .* replaced inside the context"):
            model(IDS)


def test_a_hook_of_accelerate_added_inside_the_context_works_and_leaves_a_stock_layer():
    model = random_model("llama")
    stock, layer = model(IDS).logits, model.model.layers[2]
    with torch.no_grad(), skipping(model, fixed()):
        expected = model(IDS).logits
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, stock)
    accelerate.hooks.remove_hook_from_module(layer)
    assert not any(isinstance(getattr(value, "__self__", None), LayerPatch) for value in vars(layer).values())
    assert torch.equal(copy.deepcopy(model)(IDS).logits, stock)


def test_training_mode_inside_the_context_is_refused():
    model = random_model("llama")
    with skipping(model, fixed()):
        model.train()
        with pytest.raises(ValueError, match="training mode inside"):
            model(IDS)


@pytest.mark.parametrize("width", [1, 3, WIDTH + 1])
def test_an_affine_of_another_width_is_refused_and_leaves_no_trace(width):
    model = random_model("llama")
    wrong = SkipPlan.of_sublayers({Sublayer("ffn", 2): Affine([1.5] * width, [0.5] * width)})
    right = SkipPlan.of_sublayers({Sublayer("ffn", 2): Affine([1.5] * WIDTH, [0.5] * WIDTH)})
    with pytest.raises(ValueError, match=rf"has {width} channels, but the hidden states have {WIDTH}"):
        logits(model, wrong)
    expected = ReferenceDecoder(model).run(IDS[0].tolist(), right)
    assert (logits(model, right)[0] - expected).abs().max() < 1e-5


class Given(Strategy):
    """Gives whatever plan it is told to."""

    name = "given"
    plan: object = None

    @property
    def skipped(self):
        return SkipPlan(ffn={1})

    def decode_plan(self, step):
        return self.plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (SkipPlan(ffn={9}), "layers .9., but the model has layers 0..3"),
        (SkipPlan(attention={9}), "layers .9., but the model has layers 0..3"),
        (SkipPlan(attention={0, 1, 2, 3}), "at least one must stay live"),
        (None, "strategy given returned NoneType instead of a SkipPlan"),
        ({"ffn": [1]}, "strategy given returned dict instead of a SkipPlan"),
    ],
    ids=str,
)
def test_what_a_strategy_gives_is_checked(plan, message):
    model, strategy = random_model("llama"), Given(num_layers=4, budget=Budget(sublayers=1))
    object.__setattr__(strategy, "plan", plan)
    with skipping(model, strategy), pytest.raises(ValueError, match=message):
        greedy(model)


HELD = SkipPlan.of_sublayers({Sublayer("attention", 1): 1.3, Sublayer("ffn", 2): 0.9})


@pytest.mark.parametrize("how", ["same", "copied", "entered again"])
def test_the_scale_of_an_attention_stays_with_its_cache(how):
    """A later turn in phase decode is dense, but for the attention whose K/V is gone: it keeps its scale."""
    model, strategy = random_model("llama"), fixed("decode", HELD)
    decoder = ReferenceDecoder(model)
    decoder.run(IDS[0].tolist())
    decoder.drop(HELD.attention)
    decoder.step(5, HELD)
    expected = decoder.run([7, 8, 9], HELD.attention_only())
    turn = torch.tensor([[7, 8, 9]])
    with torch.no_grad(), skipping(model, strategy):
        cache = model(IDS, use_cache=True).past_key_values
        model(torch.tensor([[5]]), past_key_values=cache)
        if how != "entered again":
            got = model(turn, past_key_values=copy.deepcopy(cache) if how == "copied" else cache).logits[0]
    if how == "entered again":
        with torch.no_grad(), skipping(model, strategy):
            got = model(turn, past_key_values=cache).logits[0]
    assert (got - expected).abs().max() < 1e-5


def by_hand(model, slices: bool, outside: bool, new_tokens=8):
    """A loop of one's own around `prepare_inputs_for_generation`. slices: gives the new token alone."""
    ids, cache = IDS, None if outside else DynamicCache(config=model.config)
    for step in range(new_tokens):
        given = ids[:, -1:] if slices and step else ids
        rest = {} if slices or not step else {"next_sequence_length": 1}
        inputs = model.prepare_inputs_for_generation(given, past_key_values=cache, use_cache=True, **rest)
        output = model(**inputs)
        cache = output.past_key_values
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("outside", [True, False], ids=["no cache given", "cache given"])
@pytest.mark.parametrize("slices", [True, False], ids=["one token", "all tokens"])
@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_loops_by_hand_decode_as_generate_does(phase, slices, outside):
    model = random_model("llama")
    with torch.no_grad(), skipping(model, fixed(phase)) as session:
        expected = greedy(model)
        assert torch.equal(by_hand(model, slices, outside), expected)
        assert session.last_request.decode_steps == 7
        method = greedy(model, custom_generate=lambda model, *args, **kwargs: by_hand(model, slices, outside))
        assert torch.equal(method, expected)


@pytest.mark.parametrize("family", ["llama", "olmo2", "granite"])
def test_lossless_refuses_a_sliding_cache_under_masks_without_a_window(family):
    model = random_model(family)
    model.config.sliding_window = 5
    with pytest.raises(ValueError, match="has a sliding_window"):
        greedy(model, custom_generate=lossless(model, fixed()))


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_lossless_follows_windows_that_masks_have_too(family):
    model = random_model(family)
    assert torch.equal(greedy(model, custom_generate=lossless(model, fixed())), greedy(model))
