"""`skipping` inside `generate`: every decoding mode, restored exactly, and state that belongs to the request."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

from adaskip.calibration.measure import calibrate
from adaskip.core.blocks import UnsupportedModelError, find_structure
from adaskip.core.context import skipping
from adaskip.core.kv_cache import SkippedLayer, kv_bytes
from adaskip.core.layer_patch import LayerPatch
from adaskip.core.plan import Budget, SkipPlan, Sublayer
from adaskip.core.token_ids import left_padded
from adaskip.strategies import EarlyExit, FixedPlan, SkipDecode
from adaskip.testbed import checkpoint_dir
from tests.families import COMMON, FAMILIES, random_model, random_prompts
from tests.reference import ReferenceDecoder

PLAN = SkipPlan.of_sublayers({Sublayer("attention", 0): 1.1, Sublayer("ffn", 1): 0.9, Sublayer("attention", 2): 1.0})


def fixed(phase="e2e", plan=PLAN, num_layers=4):
    return FixedPlan(num_layers=num_layers, phase=phase, plan=plan)


def greedy(model, prompts, **options):
    ids, mask = left_padded(prompts, 0, torch.device("cpu"))
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    out = model.generate(
        input_ids=ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings
    )
    return out, ids.shape[1]


def reference_logits(model, prompt, tokens, plan, phase):
    decoder = ReferenceDecoder(model)
    logits = [decoder.run(prompt.tolist(), SkipPlan() if phase == "decode" else plan)[-1]]
    return torch.stack(logits + [decoder.step(token, plan) for token in tokens[:-1]])


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str)
@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_generate_matches_the_reference(family, phase, options):
    model = random_model(family)
    prompts = random_prompts([9, 5, 7])
    if "cache_implementation" in options:
        options = {**options, "disable_compile": True}
    if "prefill_chunk_size" in options:
        options = {**options, "past_key_values": DynamicCache(config=model.config)}
    with skipping(model, fixed(phase)):
        out, start = greedy(model, prompts, **options)
    logits = torch.stack(out.logits, dim=1)
    for row, prompt in enumerate(prompts):
        expected = reference_logits(model, prompt, out.sequences[row, start:].tolist(), PLAN, phase)
        assert (logits[row] - expected).abs().max() < 1e-5


def test_a_pipeline_of_the_model_skips():
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir("llama"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir("llama"))
    strategy = EarlyExit(num_layers=model.config.num_hidden_layers, budget=Budget(layers=8), phase="e2e")
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    pipe, text = pipeline("text-generation", model=model, tokenizer=tokenizer), "Passage: Ada sells red ships to Oslo."
    full = pipe(text, **options)
    with skipping(model, strategy):
        (skipped,) = pipe(text, **options)
        inputs = tokenizer(text, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert skipped["generated_text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert [skipped] != full == pipe(text, **options)


def test_beam_search_scores_match_the_reference():
    model = random_model("llama")
    prompt = random_prompts([9])[0]
    with skipping(model, fixed("e2e")):
        out = model.generate(prompt[None], num_beams=3, max_new_tokens=6, min_new_tokens=6, do_sample=False,
                             length_penalty=0.0, return_dict_in_generate=True, output_scores=True)  # fmt: skip
    tokens = out.sequences[0, 9:].tolist()
    logits = reference_logits(model, prompt, tokens, PLAN, "e2e")
    score = sum(row.log_softmax(-1)[token] for row, token in zip(logits, tokens, strict=True))
    assert abs(out.sequences_scores[0] - score) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_plan_gives_equal_logits(family):
    model = random_model(family)
    prompts = random_prompts([9, 4])
    stock, _ = greedy(model, prompts)
    ids = prompts[0][None]
    stock_direct = model(ids).logits
    with skipping(model, fixed(plan=SkipPlan())):
        ours, _ = greedy(model, prompts)
        assert torch.equal(model(ids).logits, stock_direct)
    assert torch.equal(ours.sequences, stock.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, stock.logits, strict=True))


def instance_state(model):
    """Every instance attribute and hook of every module, by identity."""
    state = {}
    for name, module in model.named_modules():
        state |= {f"{name}.{key}": id(value) for key, value in vars(module).items()}
        state |= {f"{name}.{key} hook": id(hook) for key, hook in module._forward_pre_hooks.items()}
    return state


@pytest.mark.parametrize("fails", [False, True], ids=["after success", "after an exception"])
def test_model_is_restored_exactly(fails):
    model = random_model("llama")
    prompts = random_prompts([6])
    greedy(model, prompts)  # `generate` leaves a few attributes of its own at its first run
    before, logits = instance_state(model), model(prompts[0][None]).logits
    with pytest.raises(RuntimeError, match="stop") if fails else torch.no_grad(), skipping(model, fixed()):
        greedy(model, prompts)
        changed = set(instance_state(model).items()) ^ set(before.items())
        assert {name for name, _ in changed} >= {"model.layers.0.forward", ".prepare_inputs_for_generation"}
        if fails:
            raise RuntimeError("stop")
    assert not set(instance_state(model).items()) ^ set(before.items())
    assert torch.equal(model(prompts[0][None]).logits, logits)


def test_own_forward_of_a_layer_comes_back():
    model = random_model("llama")
    layer = model.model.layers[1]
    stock, calls = layer.forward, []

    def mine(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    layer.forward = mine
    with skipping(model, fixed(plan=SkipPlan())):
        model(random_prompts([4])[0][None])
    assert layer.__dict__["forward"] is mine
    assert calls


def test_accelerate_hooks_still_run():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counter(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    plain, hooked = random_model("llama"), random_model("llama")
    counters = [Counter() for _ in hooked.model.layers]
    for layer, counter in zip(hooked.model.layers, counters, strict=True):
        add_hook_to_module(layer, counter)
    ids = random_prompts([9])[0][None]
    with skipping(plain, fixed()):
        expected = plain(ids).logits
    with skipping(hooked, fixed()):
        before = [counter.calls for counter in counters]
        assert torch.equal(hooked(ids).logits, expected)
    assert [counter.calls - seen for counter, seen in zip(counters, before, strict=True)] == [1] * 4


def test_layer_offloaded_by_accelerate_is_skipped_all_the_same():
    from accelerate import cpu_offload

    plain, offloaded = random_model("llama"), random_model("llama")
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert next(offloaded.model.layers[0].parameters()).device.type == "meta"
    ids = random_prompts([9])[0][None]
    with skipping(plain, fixed()):
        expected = plain(ids).logits
    with skipping(offloaded, fixed()):
        assert torch.equal(offloaded(ids).logits, expected)
    assert calibrate(offloaded, [ids[0]]).attention == calibrate(plain, [ids[0]]).attention


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


def test_positional_arguments_of_a_direct_call_are_kept():
    model = random_model("llama")
    ids = random_prompts([6])[0][None]
    with skipping(model, fixed()):
        by_name = model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert torch.equal(model.model(ids, torch.ones_like(ids), None, None).last_hidden_state, by_name)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="language-model head"), skipping(random_model("llama").model.layers, fixed()):
        pass


def test_an_interrupted_change_of_plan_leaves_nothing_behind(monkeypatch):
    model = random_model("llama")
    ids = random_prompts([6])[0][None]
    stock = model(ids).logits

    def fails(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LayerPatch, "set_scale", fails)
        with pytest.raises(KeyboardInterrupt), skipping(model, fixed()):
            model(ids)
    assert calibrate(model, [ids[0]]).tokens == 6
    with skipping(model, fixed(plan=SkipPlan())):
        assert torch.equal(model(ids).logits, stock)


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


def test_contexts_do_not_nest():
    model = random_model("llama")
    with skipping(model, fixed()), pytest.raises(ValueError, match="do not nest"), skipping(model, fixed()):
        pass


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"model.eval\(\)"), skipping(random_model("llama").train(), fixed()):
        pass


def test_strategy_for_another_number_of_layers_is_refused():
    strategy = EarlyExit(num_layers=6, budget=Budget(layers=1))
    with pytest.raises(ValueError, match="made for 6 layers"), skipping(random_model("llama"), strategy):
        pass


def test_parallel_residual_is_refused():
    from transformers import CohereConfig, CohereForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = CohereConfig(**sizes, **heads, pad_token_id=0)
    with (
        pytest.raises(UnsupportedModelError, match="CohereDecoderLayer"),
        skipping(CohereForCausalLM(config).eval(), fixed(plan=SkipPlan(), num_layers=2)),
    ):
        pass


def test_glm4_and_olmo3_blocks_are_recognised():
    from transformers import Glm4Config, Glm4ForCausalLM, Olmo3Config, Olmo3ForCausalLM

    sizes = {**COMMON, "num_hidden_layers": 2}
    glm = Glm4ForCausalLM(Glm4Config(**sizes, head_dim=4)).eval()
    olmo = Olmo3ForCausalLM(Olmo3Config(**sizes, sliding_window=5)).eval()
    assert find_structure(glm).name == "sandwich-norm (GLM)"
    assert find_structure(olmo).name == "post-norm"


def test_a_block_with_familiar_names_that_computes_something_else_is_refused():
    model = random_model("llama")
    layer = model.model.layers[2]

    def parallel(hidden_states, **kwargs):
        x = layer.input_layernorm(hidden_states)
        return hidden_states + layer.self_attn(hidden_states=x, **kwargs)[0] + layer.mlp(x)

    layer.forward = parallel
    with pytest.raises(UnsupportedModelError, match="computes something else"), skipping(model, fixed()):
        pass


def test_patches_do_not_keep_the_model_alive():
    model = random_model("llama")
    with skipping(model, fixed()):
        greedy(model, random_prompts([4]))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
