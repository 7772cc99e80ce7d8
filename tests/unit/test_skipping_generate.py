"""`skipping` inside `generate`: every decoding mode, a model restored exactly, and models that are refused."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

from adaskip.calibration.measure import calibrate
from adaskip.core.blocks import UnsupportedModelError, find_structure
from adaskip.core.context import skipping
from adaskip.core.layer_patch import LayerPatch
from adaskip.core.plan import Budget, SkipPlan
from adaskip.strategies import EarlyExit
from adaskip.testbed import checkpoint_dir
from tests.families import COMMON, FAMILIES, random_model, random_prompts
from tests.padded_prompts import PLAN, fixed, greedy
from tests.reference import ReferenceDecoder


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
