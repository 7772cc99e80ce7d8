"""Requests under `skipping`: the K/V that each holds, the steps that it counts, and caches that are refused."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

from adaskip.core.context import skipping
from adaskip.core.kv_cache import SkippedLayer, kv_bytes
from adaskip.core.plan import Budget, SkipPlan
from adaskip.strategies import FixedPlan, SkipDecode
from tests.families import COMMON, FAMILIES, random_model, random_prompts
from tests.padded_prompts import PLAN, fixed, greedy
from tests.reference import ReferenceDecoder


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("phase", ["prefill", "e2e", "decode"])
def test_kv_bytes_are_live_over_all_layers(family, phase, options):
    model = random_model(family)
    options = {"max_new_tokens": 2, "min_new_tokens": 2, **options}
    prompts = random_prompts([2])  # shorter than the sliding window, so that all layers hold as much
    full, _ = greedy(model, prompts, **options)
    with skipping(model, fixed(phase, SkipPlan(attention={0, 2, 3}))):
        part, _ = greedy(model, prompts, **options)
    assert kv_bytes(part.past_key_values) * 4 == kv_bytes(full.past_key_values)


def test_prompt_kv_is_freed_before_the_first_decode_step_runs():
    model = random_model("llama")
    cache = DynamicCache(config=model.config)
    ids = random_prompts([9])[0][None]
    with skipping(model, fixed("decode")) as session, torch.no_grad():
        model(ids, past_key_values=cache)
        held = [weakref.ref(cache.layers[i].keys) for i in (0, 2)]
        assert all(ref() is not None for ref in held)
        seen = []
        model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append([ref() for ref in held]))
        model(ids[:, :1], past_key_values=cache)
    assert seen == [[None, None]]
    assert [type(layer) is SkippedLayer for layer in cache.layers] == [True, False, True, False]
    assert session.last_request.decode_steps == 1


def test_cache_of_a_context_is_refused_outside_of_it():
    model = random_model("llama")
    ids = random_prompts([5])[0][None]
    with skipping(model, fixed()):
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="KV cache was filled while"):
        model(ids[:, :1], past_key_values=cache)


def test_one_token_prompt_is_a_prefill():
    model = random_model("llama")
    ids = random_prompts([1])[0][None]
    stock = model(ids).logits
    with skipping(model, fixed("decode")) as session:
        greedy(model, [ids[0]], max_new_tokens=3, min_new_tokens=3)
        assert session.last_request.decode_steps == 2
        assert session.last_request.prefill_plan == SkipPlan()
        assert torch.equal(model(ids).logits, stock)


def test_chunks_and_turns_belong_to_one_request():
    model = random_model("llama")
    first, second = random_prompts([7, 5])
    strategy = fixed("decode")
    decoder = ReferenceDecoder(model)
    decoder.run(first.tolist())
    decoder.drop(PLAN.attention)
    expected = [decoder.step(5, PLAN), decoder.step(6, PLAN)]
    # the second turn's prompt is dense but for the attention whose K/V is gone
    turn_plan = PLAN.attention_only()
    expected += list(decoder.run(second.tolist(), turn_plan))
    expected.append(decoder.step(8, PLAN))
    with skipping(model, strategy) as session, torch.no_grad():
        cache = model(first[None], use_cache=True).past_key_values
        got = [model(torch.tensor([[t]]), past_key_values=cache).logits[0, -1] for t in (5, 6)]
        got += list(model(second[None], past_key_values=cache).logits[0])
        got.append(model(torch.tensor([[8]]), past_key_values=cache).logits[0, -1])
        assert session.last_request.decode_steps == 3
    assert (torch.stack(got) - torch.stack(expected)).abs().max() < 1e-5


def test_a_one_token_chunk_can_be_declared_a_prefill():
    model = random_model("llama")
    ids = random_prompts([5])[0][None]
    with skipping(model, fixed("decode")) as session, session.prefilling():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:], past_key_values=cache)
        assert session.last_request.decode_steps == 0


def test_interleaved_requests_do_not_share_state():
    model = random_model("llama")
    strategy = SkipDecode(num_layers=4, budget=Budget(layers=3), phase="decode", max_decode_steps=4)

    def steps(prompt, tokens):
        with skipping(model, strategy), torch.no_grad():
            cache = model(prompt[None], use_cache=True).past_key_values
            return [model(torch.tensor([[t]]), past_key_values=cache).logits for t in tokens]

    a, b = random_prompts([6, 8])
    alone = steps(a, (5, 6, 7)), steps(b, (8, 9, 10))
    with skipping(model, strategy), torch.no_grad():
        caches = [model(p[None], use_cache=True).past_key_values for p in (a, b)]
        mixed = [[], []]
        for pair in ((5, 8), (6, 9), (7, 10)):
            for i, token in enumerate(pair):
                mixed[i].append(model(torch.tensor([[token]]), past_key_values=caches[i]).logits)
    for one, other in zip(alone, mixed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("static", [False, True])
def test_an_emptied_cache_begins_a_new_request(static):
    from transformers import StaticCache

    model = random_model("llama")
    ids = random_prompts([6])[0][None]
    cache = StaticCache(model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    with skipping(model, fixed("decode")) as session, torch.no_grad():
        fresh = [model(ids, past_key_values=cache).logits, model(ids[:, :1], past_key_values=cache).logits]
        cache.reset()
        if int(cache.get_seq_length()):
            pytest.skip("this transformers' reset leaves a dynamic cache its length")
        again = [model(ids, past_key_values=cache).logits, model(ids[:, :1], past_key_values=cache).logits]
        assert session.last_request.decode_steps == 1
    assert all(torch.equal(x, y) for x, y in zip(fresh, again, strict=True))


@pytest.mark.parametrize("static", [False, True])
def test_an_emptied_cache_forgets_the_context_before(static):
    from transformers import StaticCache

    model = random_model("llama")
    ids = random_prompts([6])[0][None]
    cache = StaticCache(model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    with skipping(model, fixed(plan=SkipPlan(attention={3}))), torch.no_grad():
        model(ids, past_key_values=cache)
    cache.reset()
    if int(cache.get_seq_length()):
        pytest.skip("this transformers' reset leaves a dynamic cache its length")
    with skipping(model, fixed(plan=SkipPlan(attention={1}))) as session, torch.no_grad():
        model(ids, past_key_values=cache)
        assert session.last_request.prefill_plan.attention == {1}


def test_a_wrapper_that_embeds_the_tokens_does_not_count_steps_twice():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    from transformers.models.gemma3 import Gemma3TextConfig

    text = Gemma3TextConfig(**{**COMMON, **FAMILIES["gemma3"][1], "num_hidden_layers": 4})
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).eval()
    with skipping(model, fixed("decode")) as session:
        model.generate(random_prompts([6])[0][None], max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert session.last_request.decode_steps == 7


def test_an_offloaded_cache_is_refused():
    model = random_model("llama")
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    with skipping(model, fixed()), pytest.raises(ValueError, match="offloaded KV cache"):
        model(random_prompts([6])[0][None], past_key_values=cache)


def test_skipdecode_counts_per_request_and_may_run_twice_end_to_end():
    model = random_model("llama")
    strategy = SkipDecode(num_layers=4, budget=Budget(layers=2), phase="e2e", max_decode_steps=8)
    with skipping(model, strategy) as session:
        first, _ = greedy(model, random_prompts([6]))
        second, _ = greedy(model, random_prompts([6]))
        assert session.last_request.decode_steps == 7
    assert torch.equal(first.sequences, second.sequences)


def test_decode_skipping_without_a_cache_is_refused():
    model = random_model("llama")
    with skipping(model, fixed("decode")), pytest.raises(ValueError, match="use_cache=True"):
        greedy(model, random_prompts([4]), use_cache=False)


def test_prefill_skipping_without_a_cache_is_the_same_as_with_one():
    model = random_model("llama")
    with skipping(model, fixed("prefill")):
        without, _ = greedy(model, random_prompts([6]), use_cache=False)
        with_cache, _ = greedy(model, random_prompts([6]))
    assert torch.equal(without.sequences, with_cache.sequences)


def logits_after(model, strategy, cache, ids):
    with skipping(model, strategy), torch.no_grad():
        return model(ids, past_key_values=cache).logits[:, -1]


def test_a_later_context_on_a_cache_keeps_the_latest_scale_of_an_attention_without_kv():
    """Contexts with scale 0.5, 0.8 and none for attention 1, which the fourth does not name: it still has no scale."""
    model, (ids,) = random_model("llama"), random_prompts([9])
    ids = ids[None]
    plans = [SkipPlan({1}, scales={("attention", 1): scale}) for scale in (0.5, 0.8)] + [SkipPlan({1})]
    for latest in (1, 2):
        cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for plan in plans[: latest + 1]:
            logits_after(model, fixed("prefill", plan), cache, ids)
        for plan in plans[: latest + 1]:
            logits_after(model, fixed("prefill", plan), expected, ids)
        unnamed = logits_after(model, fixed("prefill", SkipPlan(ffn={2})), cache, ids)
        named = plans[latest].union(SkipPlan(ffn={2}))
        assert torch.equal(unnamed, logits_after(model, fixed("prefill", named), expected, ids))


@dataclass(frozen=True, kw_only=True)
class OtherInPrompt(FixedPlan):
    """The prompt skips attention 1 with a scale, the answer without one."""

    prefill_plan = SkipPlan({1}, scales={("attention", 1): 0.5})  # pyright: ignore


def test_a_scale_of_the_prompt_does_not_replace_a_missing_one_of_the_answer():
    model, (ids,) = random_model("llama"), random_prompts([9])
    ids, plan = ids[None], SkipPlan({1})
    strategy = OtherInPrompt(num_layers=4, phase="e2e", plan=plan)
    cache = DynamicCache(config=model.config)
    with skipping(model, strategy) as session, torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        assert session.trace(cache).prefill_plan.scale("attention", 1) == 0.5
        assert session.trace(cache).decode_plan.scale("attention", 1) == 1.0


def test_a_generate_that_fails_between_two_steps_holds_no_cache(monkeypatch):
    model, (ids,) = random_model("llama"), random_prompts([9])
    cache = DynamicCache(config=model.config)
    held = weakref.ref(cache)
    with skipping(model, fixed()):
        prepare = model.prepare_inputs_for_generation

        def failing(*args, **kwargs):
            prepare(*args, **kwargs)
            raise RuntimeError("stop")

        monkeypatch.setitem(model.__dict__, "prepare_inputs_for_generation", failing)
        with pytest.raises(RuntimeError, match="stop"):
            model.generate(ids[None], past_key_values=cache, max_new_tokens=3)
        monkeypatch.setitem(model.__dict__, "prepare_inputs_for_generation", prepare)
        del cache
        gc.collect()
        assert held() is None
