"""Who owns a context: copies, wrappers, and schedulers that would go past it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from adaskip.calibration.measure import calibrate
from adaskip.core.context import skipping
from adaskip.core.plan import Budget
from adaskip.speculative import lossless
from adaskip.strategies import EarlyExit, SkipDecode
from tests.families import random_model, random_prompts
from tests.one_prompt import PLAN, fixed, greedy, learning
from tests.wrappers import WRAPPERS, AdapterModel


@pytest.mark.parametrize("enter", [lambda m: skipping(m, fixed()), lambda m: skipping(m.model and m, fixed("decode"))])
def test_a_copy_or_pickle_made_inside_is_refused(enter):
    model = random_model("llama")
    stock = greedy(model, random_prompts([9])[0])
    with enter(model):
        for part in (model, model.model, model.model.layers, model.model.layers[2]):
            with pytest.raises(ValueError, match="copy or pickle the model outside"):
                copy.deepcopy(part)
            with pytest.raises(ValueError, match="copy or pickle the model outside"):
                pickle.dumps(part)
            with pytest.raises(ValueError, match="copy or pickle the model outside"):
                torch.save(part, io.BytesIO())
        assert copy.deepcopy(model.lm_head) is not model.lm_head
    assert torch.equal(greedy(copy.deepcopy(model), random_prompts([9])[0]), stock)


def test_a_shallow_copy_is_not_skipped_after_the_context():
    model, prompt = random_model("llama"), random_prompts([9])[0]
    with skipping(model, fixed()):
        inside = greedy(model, prompt)
        twin = copy.copy(model)
        assert torch.equal(greedy(twin, prompt), inside)
        kept = model.generate
    for call in (twin.generate, kept):
        with pytest.raises(ValueError, match="context that has ended"):
            call(prompt[None], max_new_tokens=3)


def test_continuous_batching_is_refused_before_anything_runs():
    model, prompt = random_model("llama"), random_prompts([9])[0]
    for phase in ("prefill", "decode", "e2e"):
        with skipping(model, fixed(phase)) as session:
            with pytest.raises(ValueError, match="continuous batching"):
                model.generate_batch([prompt.tolist()])
            with pytest.raises(ValueError, match="continuous batching"):
                greedy(model, prompt, cache_implementation="paged")
            with pytest.raises(ValueError, match="continuous batching"):
                model.init_continuous_batching()
            with pytest.raises(ValueError, match="no request has run"):
                print(session.last_request)


ONE_PLAN = [fixed("e2e"), fixed("prefill"), EarlyExit(num_layers=4, budget=Budget(layers=1), phase="e2e"),
            SkipDecode(num_layers=4, budget=Budget(layers=2), phase="prefill")]  # fmt: skip
SEVERAL_PLANS = [fixed("decode"), SkipDecode(num_layers=4, budget=Budget(layers=2), phase="e2e")]


@pytest.mark.parametrize("how", ["assistant", "lookup"])
@pytest.mark.parametrize("strategy", ONE_PLAN, ids=lambda s: f"{s.name} {s.phase}")
def test_assisted_decoding_under_one_plan_equals_greedy(strategy, how):
    model, assistant = random_model("llama"), random_model("llama", seed=1)
    options = {"assistant_model": assistant} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    with skipping(model, strategy):
        (prompt,) = random_prompts([14])
        assert torch.equal(greedy(model, prompt, **options), greedy(model, prompt))


@pytest.mark.parametrize("strategy", [*SEVERAL_PLANS, "learning"], ids=lambda s: getattr(s, "name", s))
def test_assisted_decoding_is_refused_where_the_plan_changes(strategy):
    model, prompt = random_model("llama"), random_prompts([9])[0]
    strategy = learning(model) if strategy == "learning" else strategy
    with skipping(model, strategy) as session:
        for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": random_model("llama")}):
            with pytest.raises(ValueError, match="assisted decoding"):
                greedy(model, prompt, **options)
        with pytest.raises(ValueError, match="no request has run"):
            print(session.last_request)


@pytest.mark.parametrize("strategy", [*ONE_PLAN, *SEVERAL_PLANS], ids=lambda s: f"{s.name} {s.phase}")
def test_early_exit_assistance_is_refused_and_leaves_the_configuration(strategy):
    model, prompt = random_model("llama"), random_prompts([9])[0]
    stock = greedy(model, prompt)
    with skipping(model, strategy), pytest.raises(ValueError, match="assistant_early_exit"):
        greedy(model, prompt, assistant_early_exit=2)
    assert model.config.num_hidden_layers == 4
    assert torch.equal(greedy(model, prompt), stock)


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_a_skipped_assistant_drafts_for_a_full_model(phase):
    """The assistant generates again and again on one cache: only its first call reads a prompt."""
    model, assistant = random_model("llama"), random_model("llama")
    for prompt in random_prompts([9, 14]):
        stock = greedy(model, prompt)
        with skipping(assistant, fixed(phase)) as session:
            assert torch.equal(greedy(model, prompt, assistant_model=assistant), stock)
            assert session.last_request.prefill_plan == fixed(phase).prefill_plan
            assert session.last_request.decode_plan == PLAN


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}], ids=str)
def test_generate_of_a_wrapper_equals_that_of_the_model_inside(wrap, options):
    model, prompt = random_model("llama"), random_prompts([9])[0]  # the last chunk has one token
    options = {**options, "disable_compile": True} if "cache_implementation" in options else options
    cached = {"past_key_values": DynamicCache(config=model.config)} if "prefill_chunk_size" in options else {}
    with skipping(model, fixed("decode")):
        expected = greedy(model, prompt, **options, **cached)
    wrapped = wrap(model)
    cached = {"past_key_values": DynamicCache(config=model.config)} if cached else {}
    with skipping(wrapped, fixed("decode")) as session:
        assert torch.equal(greedy(wrapped, prompt, **options, **cached), expected)
        assert session.last_request.decode_steps == 11
    assert calibrate(wrapped, [prompt]) == calibrate(model, [prompt])


def test_wrappers_under_which_a_plan_would_be_wrong_are_refused():
    model = random_model("llama")
    with pytest.raises(ValueError, match="puts learnt tokens before the prompt"):
        skipping(AdapterModel(model, prompt_learning=True), fixed()).__enter__()
    with pytest.raises(ValueError, match="DataParallel runs copies"):
        skipping(nn.DataParallel(model), fixed()).__enter__()


USES = {
    "skipping": lambda model: skipping(model, fixed()).__enter__(),
    "lossless": lambda model: lossless(model, fixed()),
    "calibrate": lambda model: calibrate(model, random_prompts([9])),
}


def compiled_in_place(model, part):
    part(model).compile(backend="eager")
    return model


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.model, lambda m: m.model.layers[1]])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_model_compiled_in_place_is_refused(part, use):
    with pytest.raises(ValueError, match="compiled in place"):
        use(compiled_in_place(random_model("llama"), part))


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_a_compiled_model_called_directly_is_refused_also_with_a_graph_from_before(before):
    model, prompt = random_model("llama"), random_prompts([9])[0]
    compiled = torch.compile(model, backend="eager")
    if before:
        compiled(prompt[None])
    with skipping(compiled, fixed()), pytest.raises(ValueError, match="compiled model was called directly"):
        compiled(prompt[None])
    torch.compiler.reset()


def test_a_call_from_inside_the_models_own_forward_is_refused():
    model, prompt = random_model("llama"), random_prompts([9])[0]
    with skipping(model, fixed()):
        hook = model.model.layers[0].register_forward_hook(lambda *args: model(prompt[None]))
        with pytest.raises(ValueError, match="inside its own forward"):
            model(prompt[None])
        hook.remove()
        assert model(prompt[None]).logits.isfinite().all()
