"""The loss of a reference answer: the mean over teacher-forced steps, each under the plan of its step."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from adaskip.core.context import skipping
from adaskip.core.generate import generate
from adaskip.core.plan import Budget, SkipPlan, Sublayer
from adaskip.core.reference_loss import reference_loss
from adaskip.strategies import AdaSkip, EarlyExit, FixedPlan, SkipDecode, UnifiedSkipping
from tests.families import random_model, random_prompts
from tests.profiles import profile_of
from tests.zeroed import zeroed

PLAN = SkipPlan.of_sublayers({Sublayer("attention", 0): 1.1, Sublayer("ffn", 1): 0.9, Sublayer("attention", 2): 1.0})


def adaskip(phase):
    """Any FFN of a similarity above -0.6 joins: its window fires."""
    low = profile_of([-0.5, -0.9, -0.6, -0.9], [-0.9, -0.9, -0.9, -0.9])
    return AdaSkip(num_layers=4, budget=Budget(sublayers=2), phase=phase, profile=low, learning_window=3)


STRATEGIES = {
    "full": lambda phase: None,
    "fixed": lambda phase: FixedPlan(num_layers=4, phase=phase, plan=PLAN),
    "early_exit": lambda phase: EarlyExit(num_layers=4, budget=Budget(sublayers=4), phase=phase),
    "unified": lambda phase: UnifiedSkipping(num_layers=4, budget=Budget(sublayers=2), phase=phase),
    "skipdecode": lambda phase: SkipDecode(num_layers=4, budget=Budget(sublayers=4), phase=phase, max_decode_steps=8),
    "adaskip": adaskip,
}


@torch.no_grad()
def token_by_token(model, strategy, prompt, answer):
    """Every token a forward of its own, on a fresh cache."""
    cache = DynamicCache(config=model.config)
    rows = []
    with nullcontext() if strategy is None else skipping(model, strategy):
        rows.append(model(input_ids=prompt[None], past_key_values=cache, use_cache=True).logits[0, -1])
        for token in answer[:-1]:
            rows.append(model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True).logits[0, -1])
    return float(cross_entropy(torch.stack(rows), answer))


def answer_and_loss(model, strategy, prompt, reference, **options):
    (made,) = generate(
        model, strategy, [prompt], max_new_tokens=6, eos_token_ids=[], pad_token_id=0, references=[reference], **options
    )
    return made


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_the_loss_is_that_of_single_steps_with_and_without_a_prompt_that_was_read(family, name, phase):
    model = random_model(family)
    prompt, answer = random_prompts([9, 7])
    strategy = STRATEGIES[name](phase)
    expected = token_by_token(model, strategy, prompt, answer)
    assert reference_loss(model, strategy, prompt, answer) == pytest.approx(expected, abs=1e-5)
    assert answer_and_loss(model, strategy, prompt, answer).reference_loss == pytest.approx(expected, abs=1e-5)


def test_the_window_of_the_test_fires():
    model = random_model("llama")
    assert answer_and_loss(model, adaskip("decode"), *random_prompts([9, 7])).online_ffns


@pytest.mark.parametrize("phase", ["prefill", "e2e"])
def test_without_scales_it_is_the_loss_of_the_model_with_zeroed_sublayers(phase):
    model = random_model("llama")
    prompt, answer = random_prompts([9, 7])
    plan = SkipPlan.of_sublayers({Sublayer("attention", 1): 1.0, Sublayer("ffn", 2): 1.0})
    ids = torch.cat([prompt, answer])[None]
    labels = torch.cat([torch.full_like(prompt, -100), answer])[None]
    expected = float(zeroed(model, plan)(input_ids=ids, labels=labels).loss.detach())
    measured = reference_loss(model, FixedPlan(num_layers=4, phase=phase, plan=plan), prompt, answer)
    assert measured == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_answer_is_the_same_with_and_without_a_reference(name):
    model = random_model("llama")
    prompt, reference = random_prompts([9, 7])
    strategy = STRATEGIES[name]("e2e")
    measured = answer_and_loss(model, strategy, prompt, reference)
    plain = answer_and_loss(model, strategy, prompt, None)
    kept = ("token_ids", "kv_bytes", "plan", "online_ffns")
    assert [getattr(measured, field) for field in kept] == [getattr(plain, field) for field in kept]
    assert plain.reference_loss is None


@pytest.mark.parametrize("options", [{"min_new_tokens": 2}, {"cache_implementation": "static"}], ids=str)
def test_where_the_cache_or_the_logits_are_not_the_prompts_own_it_is_read_again(options):
    model = random_model("llama")
    prompt, answer = random_prompts([9, 7])
    answer[0] = 2  # an end token, whose logits min_new_tokens masks
    strategy = STRATEGIES["fixed"]("e2e")
    (made,) = generate(
        model,
        strategy,
        [prompt],
        max_new_tokens=6,
        eos_token_ids=[2],
        pad_token_id=0,
        references=[answer],
        **options,
    )
    assert made.reference_loss == pytest.approx(token_by_token(model, strategy, prompt, answer), abs=1e-5)


def test_each_row_of_a_batch_has_its_own_loss():
    model = random_model("llama")
    prompts, answers = random_prompts([9, 5, 7]), [*random_prompts([4, 1], seed=1), None]
    strategy = adaskip("e2e")
    made = generate(model, strategy, prompts, max_new_tokens=6, eos_token_ids=[], pad_token_id=0, references=answers)
    for prompt, answer, each in zip(prompts[:2], answers[:2], made[:2], strict=True):
        assert each.reference_loss == pytest.approx(token_by_token(model, strategy, prompt, answer), abs=1e-5)
    assert made[2].reference_loss is None


def test_what_cannot_be_measured_is_refused_in_one_line():
    model = random_model("llama")
    prompt, answer = random_prompts([9, 7])
    with pytest.raises(ValueError, match="they have 9 and 0 tokens"):
        reference_loss(model, None, prompt, answer[:0])
    with pytest.raises(ValueError, match="one reference for each of 1 prompts is needed, not 2"):
        generate(model, None, [prompt], max_new_tokens=2, eos_token_ids=[], pad_token_id=0, references=[answer, answer])


def test_a_plan_answers_like_its_strategy_and_prompts_without_tokens_are_refused():
    model = random_model("llama")
    prompt, reference = random_prompts([9, 4])
    strategy = FixedPlan(num_layers=4, phase="e2e", plan=PLAN)
    of_plan, of_strategy = (answer_and_loss(model, each, prompt, reference) for each in (PLAN, strategy))
    assert (of_plan.token_ids, of_plan.reference_loss) == (of_strategy.token_ids, of_strategy.reference_loss)
    for prompts in ([], [prompt, prompt[:0]]):
        with pytest.raises(ValueError, match="each prompt needs at least one token; got lengths"):
            generate(model, None, prompts, max_new_tokens=2, eos_token_ids=[], pad_token_id=0)
