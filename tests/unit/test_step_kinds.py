"""Whether a forward is prompt or answer is decided by what reaches the decoder."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from adaskip.calibration.measure import calibrate
from adaskip.core.context import skipping
from adaskip.core.hf import CACHE
from adaskip.core.plan import Affine, Budget, SkipPlan, Sublayer
from adaskip.strategies import AdaSkip, FixedPlan
from tests.families import WIDTH, random_model, random_prompts
from tests.reference import ReferenceDecoder
from tests.zeroed import greedy_reference

PLAN = SkipPlan(attention={1}, ffn={2})


def fixed(phase="decode", plan=PLAN, num_layers=4):
    return FixedPlan(num_layers=num_layers, phase=phase, plan=plan)


def greedy(model, ids, new_tokens, **options):
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**settings, **options})


SWITCH = 16


def longrope(**options):
    factors = {"short_factor": [1.0] * 2, "long_factor": [4.0] * 2}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SWITCH, **factors}
    return random_model(
        "phi3", original_max_position_embeddings=SWITCH, max_position_embeddings=64, rope_parameters=rope, **options
    )


def reads_again(model, prompt, **options):
    """transformers 5.17 drops the cache and goes on with the last token alone: its own answer is wrong."""
    before = SWITCH - prompt.shape[1] + 1
    cut = greedy(model, greedy(model, prompt, before, **options), 12 - before, **options)
    return torch.equal(greedy(model, prompt, 12, **options), cut)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_a_dropped_cache_is_a_new_prompt(phase, cache):
    """Phi-3 throws its cache away where the rotary factors switch; then prompt and answer are read again."""
    model, prompt = longrope(), random_prompts([12])[0][None]
    options = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    before = SWITCH - prompt.shape[1] + 1
    if not reads_again(model, prompt, **options):
        with skipping(model, fixed(phase)), pytest.raises(ValueError, match="dropped the KV cache"):
            greedy(model, prompt, 12, **options)
        return
    with skipping(model, fixed(phase)):
        whole = greedy(model, prompt, 12, **options)
        cut = greedy(model, greedy(model, prompt, before, **options), 12 - before, **options)
    assert torch.equal(whole, cut), "the switch falls on the first forward of the second request"
    mask = torch.ones_like(whole[:, : prompt.shape[1] + before])
    expected = greedy_reference(model, whole[:, : mask.shape[1]], mask, PLAN, phase, 12 - before)
    assert torch.equal(whole[:, mask.shape[1] :], expected)


def test_a_request_keeps_its_step_and_what_it_learnt_when_its_cache_is_dropped():
    model, prompt = longrope(), random_prompts([12])[0][None]
    profile = calibrate(model, random_prompts([9, 7]))
    strategy = AdaSkip(
        num_layers=4, budget=Budget(sublayers=1), profile=profile, learning_window=2, beta_quantile=0.0, phase="decode"
    )
    plans = []
    if not reads_again(model, prompt):
        pytest.skip("this transformers does not read again")
    with skipping(model, strategy) as session:
        model.model.register_forward_hook(lambda *args: plans.append(session.patches.work))
        greedy(model, prompt, 12)
        trace = session.last_request
    assert trace.online_ffns
    assert trace.decode_steps == 11
    reread = SWITCH - prompt.shape[1] + 1
    assert all(not any(layer[:2]) for layer in plans[reread]), "a prompt is dense in phase decode"
    assert plans[reread - 1] == plans[-1], "what was learnt before the switch holds after it"


def test_a_model_that_swaps_in_a_filled_cache_is_refused(monkeypatch):
    model, ids = random_model("llama"), random_prompts([9])[0][None]
    other = model(ids, use_cache=True).past_key_values
    stock = type(model).prepare_inputs_for_generation

    def swapping(self, *args, **kwargs):
        inputs = stock(self, *args, **kwargs)
        return inputs if inputs["input_ids"].shape[1] > 1 else {**inputs, CACHE: other}

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", swapping)
    with (
        skipping(model, fixed()),
        pytest.raises(ValueError, match="replaced the request's KV cache by another filled one"),
    ):
        greedy(model, ids, 4)


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_a_direct_call_with_embeddings_is_a_request_of_its_own(phase):
    """Also with the shape of the step that `generate` ran last, whose tokens somebody may still hold."""
    model, ids = random_model("llama"), random_prompts([9])[0][None]
    embeds = model.get_input_embeddings()(ids[:, :1]).detach()
    with torch.no_grad(), skipping(model, fixed(phase)) as session:
        alone = model(inputs_embeds=embeds).logits
        greedy(model, ids, 4)
        assert torch.equal(model(inputs_embeds=embeds).logits, alone)
        assert session.last_request.decode_steps == 0


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_generate_that_failed_leaves_no_plan_behind(fails_at):
    model, ids = random_model("llama"), random_prompts([9])[0][None]
    embeds = model.get_input_embeddings()(ids[:, :1]).detach()
    with torch.no_grad(), skipping(model, fixed()):
        alone = model(inputs_embeds=embeds).logits
        calls = []

        def fail(*args):
            calls.append(args)
            if len(calls) == fails_at:
                raise RuntimeError("out of memory")

        hook = model.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            greedy(model, ids, 6)
        hook.remove()
        assert torch.equal(model(inputs_embeds=embeds).logits, alone)


def test_a_verification_can_be_declared_an_answer():
    model, prompt = random_model("llama"), random_prompts([9])[0]
    decoder = ReferenceDecoder(model)
    decoder.run(prompt.tolist())
    decoder.drop(PLAN.attention)
    expected = decoder.run([5, 6, 7], PLAN)
    with torch.no_grad(), skipping(model, fixed()) as session:
        cache = model(prompt[None], use_cache=True).past_key_values
        with session.decoding():
            got = model(torch.tensor([[5, 6, 7]]), past_key_values=cache).logits[0]
        assert session.trace(cache).decode_steps == 1
    assert (got - expected).abs().max() < 1e-5


def test_an_emptied_cache_holds_no_answer_whatever_is_declared():
    model, prompt = random_model("llama"), random_prompts([9])[0][None]
    with torch.no_grad():
        stock = model(prompt).logits
        with skipping(model, fixed("decode")) as session, session.decoding():
            cache = DynamicCache(config=model.config)
            for _ in range(2):
                assert torch.equal(model(prompt, past_key_values=cache).logits, stock)
                assert session.trace(cache).decode_steps == 0
                model(prompt[:, :3], past_key_values=cache)
                assert session.trace(cache).decode_steps == 1
                cache.reset()


def test_what_is_no_cache_of_layers_is_refused():
    model, ids = random_model("llama"), random_prompts([9])[0][None]
    with skipping(model, fixed()), pytest.raises(ValueError, match=r"needs a transformers Cache.*tuple"):
        model(ids, past_key_values=((ids, ids),))


def shortened(drop=2, num_layers=6):
    """A model from which somebody deleted a layer: the layers behind it keep their `layer_idx`."""
    model = random_model("llama", num_layers)
    model.model.layers = nn.ModuleList([layer for i, layer in enumerate(model.model.layers) if i != drop])
    model.config.num_hidden_layers = num_layers - 1
    return model


@pytest.mark.parametrize("attention", [{0}, {1}, {2}, {3}, {0, 3}, {2, 4}, {0, 1, 2, 3}], ids=str)
@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_layers_use_the_cache_slot_of_their_own_index(phase, attention):
    model, ids = shortened(), random_prompts([9])[0][None]
    plan = SkipPlan(attention=attention, ffn={1})
    renumbered = shortened()
    for i, layer in enumerate(renumbered.model.layers):
        layer.self_attn.layer_idx = i
    expected = greedy_reference(renumbered, ids, torch.ones_like(ids), plan, phase, 8)
    cache = DynamicCache()
    with skipping(model, fixed(phase, plan, num_layers=5)):
        assert torch.equal(greedy(model, ids, 8, past_key_values=cache)[:, 9:], expected)
    held = [
        i for i, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None and layer.keys.numel()
    ]
    assert held == [slot for i, slot in enumerate((0, 1, 3, 4, 5)) if i not in attention]


class Stored(nn.Linear):
    """Weights in one dtype, arithmetic in another, as in quantised checkpoints."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype))


def stored_in(dtype):
    """A llama whose first parameters have another dtype than the stream of hidden states."""
    model = random_model("llama")
    for layer in model.model.layers:
        for part, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")), (layer.mlp, ("up_proj",))):
            for name in names:
                linear = getattr(part, name)
                twin = Stored(linear.in_features, linear.out_features, bias=False)
                twin.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
                setattr(part, name, twin)
    return model


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.int8], ids=str)
def test_scales_have_the_precision_of_the_stream(dtype):
    model, ids = stored_in(dtype), random_prompts([9])[0][None]
    affine = Affine(scale=[1.0 + 0.001 * i for i in range(WIDTH)], shift=[0.0009] * WIDTH)
    scales = {Sublayer("attention", 1): 1.0009, Sublayer("ffn", 2): 0.9991, Sublayer("ffn", 3): affine}
    plan = SkipPlan.of_sublayers(scales)
    expected = ReferenceDecoder(model).run(ids[0].tolist(), plan)
    with torch.no_grad(), skipping(model, fixed("e2e", plan)):
        assert (model(ids).logits[0] - expected).abs().max() < 1e-5


def test_scales_follow_a_model_that_changes_its_dtype_and_autocast():
    model, ids = random_model("llama"), random_prompts([9])[0][None]
    plan = SkipPlan.of_sublayers(
        {Sublayer("attention", 1): 1.25, Sublayer("ffn", 2): Affine([1.5] * WIDTH, [0.5] * WIDTH)}
    )
    with torch.no_grad(), skipping(model, fixed("e2e", plan)):
        expected = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(ids).logits - expected).abs().max() < 0.2
        assert torch.equal(model(ids).logits, expected)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        with torch.no_grad(), skipping(model, fixed("e2e", plan)):
            logits = model(ids).logits
        assert logits.dtype == dtype
        assert (logits.double() - expected.double()).abs().max() < (0.5 if dtype == torch.bfloat16 else 0.05)


def test_there_is_no_window_where_nothing_is_left_to_learn():
    model, ids = random_model("llama", 2), random_prompts([9])[0][None]
    profile = calibrate(model, random_prompts([9, 7]))
    strategy = AdaSkip(num_layers=2, budget=Budget(sublayers=3), profile=profile, phase="decode")
    assert strategy.skipped.ffn == {0, 1}, "the case needs a set of all FFNs"
    with skipping(model, strategy) as session:
        assert greedy(model, ids, 30).shape[1] == 39
        assert session.last_request.online_ffns == ()


def warnings(caplog):
    return [record for record in caplog.records if "phase decode skips nothing" in record.getMessage()]


def test_phase_decode_warns_once_if_it_has_only_seen_prompts(caplog):
    model, ids = random_model("llama"), random_prompts([9])[0][None]
    with caplog.at_level(logging.WARNING):
        with skipping(model, fixed("decode")):
            for _ in range(20):
                model(ids)
        assert len(warnings(caplog)) == 1
        with skipping(model, fixed("decode")):
            model(ids)
        assert len(warnings(caplog)) == 2, "at the end of a context, too"
        for strategy in (fixed("e2e"), fixed("prefill"), fixed("decode", SkipPlan())):
            with skipping(model, strategy):
                model(ids)
        with skipping(model, fixed("decode")):
            greedy(model, ids, 3)
        with skipping(model, fixed("decode")):
            pass
    assert len(warnings(caplog)) == 2
