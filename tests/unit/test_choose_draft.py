"""`choose_draft`: what drafts earn and cost, and which set is chosen."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from adaskip import POP, AdaSkip, Budget, SkipPlan, choose_draft, lossless, skipping, testbed
from adaskip.core.blocks import find_decoder
from adaskip.speculative import DraftChoice
from adaskip.speculative.draft_choice import choice_of
from adaskip.speculative.draft_trials import LONGEST, Trial
from adaskip.speculative.drafting import GAIN
from adaskip.strategies import FixedPlan, SkipDecode
from tests.families import random_model, random_prompts
from tests.profiles import profile_of
from tests.unit.test_lossless import LAYERS, PLAN, fixed, generated
from tests.unit.test_skipping_generate import instance_state
from tests.zeroed import zeroed

NEW_TOKENS = 20
NO_END = {"eos_token_ids": [10**6]}
WITHOUT_OUTPUT = SkipPlan(attention={1, 2, 3}, ffn={1, 2, 3})
"""Sublayers that add nothing in `idle_model`."""


def idle_model(family="granite"):
    """A model in which the sublayers of `WITHOUT_OUTPUT` add nothing."""
    model = random_model(family)
    with torch.no_grad():
        for layer in find_decoder(model).layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def measured(model, strategies, prompts=None, **options):
    prompts = random_prompts([7, 12]) if prompts is None else prompts
    return choose_draft(model, strategies, prompts, new_tokens=NEW_TOKENS, **(NO_END | options))


@pytest.mark.parametrize("plan", [SkipPlan(), WITHOUT_OUTPUT], ids=["nothing", "no output"])
def test_a_set_that_changes_nothing_is_always_accepted(plan):
    (candidate,) = measured(idle_model(), plan).candidates
    assert candidate.acceptance == 1.0
    last = NEW_TOKENS - 1 - LONGEST
    assert candidate.accepted == candidate.judged == (4,) * last + (2,) * (LONGEST - last), "2 answers, 2 drafts each"


def test_a_destructive_set_is_seldom_accepted():
    mild, destructive = measured(
        random_model("llama"), [SkipPlan(attention={0}), SkipPlan.of_layers([1, 2])]
    ).candidates
    assert destructive.acceptance < 0.1 < 0.4 < mild.acceptance < 1.0


@torch.no_grad()
def by_hand(model, prompt, plan, new_tokens=NEW_TOKENS):
    """Accepted and judged tokens by their place, with a new cache of the full model for each draft."""
    tokens, draft = (
        generated(model, prompt, max_new_tokens=new_tokens, eos_token_id=None)[0].tolist(),
        zeroed(model, plan),
    )
    accepted, judged, known = [0] * LONGEST, [0] * LONGEST, len(prompt) + 1
    while known < len(tokens):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([tokens[: known - 1]]), past_key_values=cache, use_cache=True)
        for place in range(LONGEST):
            if known == len(tokens):
                break
            last = torch.tensor([[tokens[known - 1]]])
            chosen = int(draft(last, past_key_values=cache, use_cache=True).logits[0, -1].argmax())
            right, known = chosen == tokens[known], known + 1
            judged[place] += 1
            accepted[place] += right
            if not right:
                break
    return accepted, judged


@pytest.mark.parametrize("family", ["llama", "mistral", "granite", "gemma3"])
def test_acceptance_is_that_of_the_model_stepped_by_hand(family):
    """Models with sliding windows among them; two candidates do not disturb each other."""
    model, (prompt,) = random_model(family), random_prompts([12])
    plans = [SkipPlan(attention={0}, ffn={2}), SkipPlan(ffn={1})]
    for plan, candidate in zip(plans, measured(model, plans, [prompt]).candidates, strict=True):
        assert (list(candidate.accepted), list(candidate.judged)) == by_hand(model, prompt, plan)
        assert sum(candidate.judged) == NEW_TOKENS - 1, "every token but the first is drafted once"
        assert sum(candidate.accepted) > 0


def test_acceptance_on_a_testbed_model():
    folder = testbed.checkpoint_dir("vicuna")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    text = "Passage: Ada sells copper ships to Oslo. Question: What is said about Ada? Answer:"
    (prompt,) = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    plans = [SkipPlan(attention={12}), SkipPlan.of_layers(range(2, 12))]
    mild, destructive = choose_draft(model, plans, [prompt], new_tokens=6, **NO_END).candidates
    for plan, candidate in ((plans[0], mild), (plans[1], destructive)):
        assert (list(candidate.accepted), list(candidate.judged)) == by_hand(model, prompt, plan, 6)
    assert destructive.acceptance < mild.acceptance


@pytest.fixture
def clock(monkeypatch):
    """Seconds by what is computed: one for a sublayer of one token, and a tenth for each further token."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("adaskip.speculative.forwards.time", SimpleNamespace(thread_time=lambda: now.seconds))

    def count(module, args, kwargs, output):
        output = output[0] if isinstance(output, tuple) else output
        now.seconds += 1.0 + 0.1 * (output.shape[1] - 1)

    def watch(model):
        for layer in find_decoder(model).layers:
            for part in (layer.self_attn, layer.mlp):
                part.register_forward_hook(count, with_kwargs=True)
        return model

    return watch


def test_costs_are_those_of_the_forwards(clock):
    choice = measured(clock(random_model("granite")), [SkipPlan(), SkipPlan(attention={1}, ffn={2}), WITHOUT_OUTPUT])
    assert [each.cost_ratio for each in choice.candidates] == pytest.approx([1.0, 0.75, 0.25])
    assert choice.verify_ratios == pytest.approx([1.0 + 0.1 * i for i in range(LONGEST + 1)])


def test_the_chosen_set_drafts_losslessly(clock):
    model = clock(idle_model())
    given = [SkipPlan(attention={0}), FixedPlan(num_layers=LAYERS, plan=WITHOUT_OUTPUT, phase="decode")]
    choice = measured(model, given)
    assert choice.strategy is given[1]
    assert (choice.plan, choice.gamma) == (WITHOUT_OUTPUT, LONGEST)
    assert choice.speedup == pytest.approx(16 / (15 * 0.25 + 2.5))
    (prompt,) = random_prompts([9])
    expected = generated(model, prompt)
    for gamma in (None, choice.gamma):
        decoder = lossless(model, choice.strategy, gamma=gamma)
        assert torch.equal(generated(model, prompt, decoder), expected)
    assert decoder.last_request.acceptance_rate == 1.0


def trial(accepted, judged, cost_ratio, plan=PLAN):
    made = Trial(plan, fixed(plan))
    made.accepted[0], made.judged[0], made.cost_ratios = accepted, judged, [cost_ratio]
    return made


FLAT = {2: [1.0], 16: [1.0]}
DEAR = {2: [1.5], 4: [2.2], 16: [3.0]}


@pytest.mark.parametrize(
    ("accepted", "cost_ratio", "costs", "gamma", "speedup"),
    [
        (50, 0.1, FLAT, 2, 1.75 / 1.2),
        (100, 0.1, FLAT, 15, 16 / 2.5),
        (0, 0.1, FLAT, 1, 1 / 1.1),
        (60, 0.5, FLAT, 1, 1.6 / 1.5),
        (90, 0.05, DEAR, 12, 10 * (1 - 0.9**13) / (0.6 + 2.8)),
    ],
)
def test_length_and_speedup_follow_from_acceptance_and_costs(accepted, cost_ratio, costs, gamma, speedup):
    (candidate,) = choice_of([trial(accepted, 100, cost_ratio)], costs).candidates
    assert (candidate.gamma, candidate.acceptance) == (gamma, accepted / 100)
    assert candidate.speedup == pytest.approx(speedup)


@pytest.mark.parametrize("acceptance", [0.1, 0.6, 0.93])
def test_no_other_length_promises_more(acceptance):
    a, cost_ratio = acceptance, 0.2
    curve = choice_of([trial(1, 1, 0.0)], DEAR).verify_ratios
    (candidate,) = choice_of([trial(100 * a, 100, cost_ratio)], DEAR).candidates
    rates = {g: (1 + a * (1 - a**g) / (1 - a)) / (g * cost_ratio + curve[g]) for g in range(1, LONGEST + 1)}
    assert candidate.speedup == pytest.approx(max(rates.values()))
    assert candidate.gamma == max(rates, key=lambda g: rates[g])


def test_acceptance_and_cost_both_count():
    fast_but_wrong, both, right_but_slow = trial(20, 100, 0.1), trial(80, 100, 0.3), trial(95, 100, 0.9)
    choice = choice_of([fast_but_wrong, both, right_but_slow], FLAT)
    assert choice.speedup == choice.candidates[1].speedup == max(each.speedup for each in choice.candidates)
    assert choice.candidates[0].speedup < choice.candidates[1].speedup > choice.candidates[2].speedup


def test_medians_of_costs_count():
    made = trial(80, 100, 0.3)
    made.cost_ratios += [0.2, 50.0]
    choice = choice_of([made], {2: [1.0, 1.2, 40.0], 16: [1.2]})
    assert choice.candidates[0].cost_ratio == 0.3
    assert choice.verify_ratios[1] == 1.2


def barely(gain):
    """Costs of a token that is always right, so that a draft of one token promises so much more than a step."""
    return trial(100, 100, 2 / gain - 1.0), {2: [1.0], 16: [100.0]}


def test_no_set_is_chosen_if_none_pays():
    dear, useless = trial(80, 100, 0.8), trial(0, 100, 0.01)
    choice = choice_of([dear, useless], DEAR)
    assert (choice.strategy, choice.plan, choice.gamma, choice.speedup) == (SkipPlan(), SkipPlan(), None, 1.0)
    model, (prompt,) = random_model("granite"), random_prompts([9])
    decoder = lossless(model, choice.strategy, gamma=choice.gamma)
    assert torch.equal(generated(model, prompt.repeat(3), decoder), generated(model, prompt.repeat(3)))
    assert decoder.last_request.draft_forwards == 0 < decoder.last_request.copied
    for gain, paying in ((GAIN - 0.01, False), (GAIN + 0.01, True)):
        made, costs = barely(gain)
        choice = choice_of([made], costs)
        assert choice.candidates[0].speedup == pytest.approx(gain)
        assert (choice.gamma is not None) == paying, "as much more as lossless asks of every draft"


def test_a_set_must_beat_useless_drafts_where_they_are_faster_than_a_step():
    cheap = {2: [0.6], 16: [0.6]}
    choice = choice_of([trial(50, 100, 0.6)], cheap)
    assert GAIN < choice.candidates[0].speedup < 1 / 0.6
    assert choice.gamma is None
    assert choice_of([trial(90, 100, 0.2)], cheap).gamma is not None


def test_the_empty_plan_is_measured_but_not_chosen():
    choice = choice_of([trial(100, 100, 0.5, SkipPlan()), trial(100, 100, 0.6)], FLAT)
    assert choice.candidates[0].speedup > choice.speedup > 1.0
    assert choice.strategy == PLAN


def test_a_choice_shows_what_was_measured():
    shown = str(choice_of([trial(50, 100, 0.1), trial(0, 9, 0.5)], FLAT)).splitlines()
    assert shown[0] == "plan, 3 sublayers: 0.500 of 100 tokens accepted, 0.100 steps each; drafts of 2: speedup 1.458"
    assert shown[2:] == [
        "steps that a forward takes: 2 tokens 1.00, 4 tokens 1.00, 8 tokens 1.00, 16 tokens 1.00",
        "chosen: 3 sublayers, drafts of 2",
    ]
    assert str(choice_of([trial(0, 9, 0.5)], FLAT)).endswith("chosen: no set")


def test_answers_end_at_an_end_token_and_those_without_a_second_token_are_left_out():
    model, (prompt, other) = random_model("granite"), random_prompts([7, 12])
    answer = generated(model, prompt, eos_token_id=None)[0, len(prompt) :].tolist()
    first = generated(model, other, max_new_tokens=1)[0, -1].item()
    end = next(i for i in range(3, len(answer)) if answer[i] not in answer[:i])
    options = {"new_tokens": 16, "eos_token_ids": [answer[end], first]}
    assert first not in answer[:end]
    (candidate,) = choose_draft(model, SkipPlan(ffn={1}), [prompt, other], **options).candidates
    assert sum(candidate.judged) == end - 1
    with pytest.raises(ValueError, match="gives none to any of the 1 prompts"):
        choose_draft(model, SkipPlan(ffn={1}), [other], **options)


def test_the_model_is_restored_exactly():
    model, (prompt,) = random_model("mistral"), random_prompts([7])
    before, logits = instance_state(model), model(prompt[None]).logits
    assert isinstance(measured(model, PLAN), DraftChoice)
    assert instance_state(model) == before
    assert torch.equal(model(prompt[None]).logits, logits)


def test_adaskip_drafts_with_its_offline_set():
    """In lossless mode its learning window is off, so its set does not change."""
    profile = profile_of([0.9, 0.8, 0.7, 0.6], [0.95, 0.5, 0.5, 0.85])
    strategy = AdaSkip(num_layers=LAYERS, budget=Budget(sublayers=3), profile=profile)
    assert strategy.window_tokens
    given, plan = measured(random_model("granite"), [strategy, strategy.skipped]).candidates
    assert (given.accepted, given.judged) == (plan.accepted, plan.judged)


POP_HALF = POP(num_layers=LAYERS, budget=Budget(layers=2), phase="prefill")


@pytest.mark.parametrize(
    ("strategies", "options", "message"),
    [
        ([], {}, "at least one strategy or plan and one prompt; got 0 and 1"),
        (PLAN, {"prompts": []}, "one prompt; got 1 and 0"),
        (PLAN, {"new_tokens": 1}, "after an answer's first; got new_tokens=1"),
        (SkipDecode(num_layers=LAYERS, budget=Budget(layers=3), max_decode_steps=8), {}, "skipdecode changes its set"),
        ([PLAN, POP_HALF], {}, "pop skips nothing in an answer"),
        (SkipPlan({0}, keeps_kv=True), {}, "skips nothing in an answer"),
        (FixedPlan(num_layers=6, plan=PLAN), {}, "was made for 6 layers, LlamaForCausalLM has 4"),
        ("ee", {}, "expected a Strategy or a SkipPlan .*; got str"),
    ],
    ids=["no set", "no prompt", "one token", "changing", "prompt only", "plan of a prompt", "depth", "a name"],
)
def test_what_cannot_be_compared_is_refused_in_one_line(strategies, options, message):
    options = {"prompts": random_prompts([5])} | options
    with pytest.raises(ValueError, match=message) as refusal:
        choose_draft(random_model("llama"), strategies, **options)
    assert "\n" not in str(refusal.value)


def test_models_and_places_that_lossless_refuses_are_refused():
    (prompt,) = random_prompts([9])
    with pytest.raises(ValueError, match="has a sliding_window"):
        measured(random_model("llama", sliding_window=5), PLAN, [prompt])
    model = random_model("llama")
    with skipping(model, PLAN), pytest.raises(ValueError, match="do not nest"):
        measured(model, PLAN, [prompt])
    with lossless(model, PLAN), pytest.raises(ValueError, match="leave custom_generate out"):
        measured(model, PLAN, [prompt])
