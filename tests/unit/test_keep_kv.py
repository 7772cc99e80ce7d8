"""What cannot keep the K/V is refused; strategies, plans, runs and studies that keep them."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from adaskip import POP, Budget, SkipPlan, lossless, make_plan, skipping
from adaskip.core.context import patches_for
from adaskip.core.plan import Sublayer
from adaskip.engines.fold import fold
from adaskip.runs.checks import build_strategies
from adaskip.runs.config import RunConfig
from adaskip.runs.estimate import assumed_plans
from adaskip.runs.job import resolve
from adaskip.runs.loading import Loading
from adaskip.runs.manifest import describe_job
from adaskip.runs.plans import PlanConfig, plan_to, shown
from adaskip.strategies import STRATEGIES, FixedPlan, build, needs_profile, selection_method
from adaskip.studies.ablation.peers import PeersConfig, _compared
from tests.families import random_model, random_prompts
from tests.profiles import profile_of, selection_of
from tests.reference import read_by_hand

TOLERANCE = 1e-5
PROMPT = random_prompts([9])[0]
IDS = PROMPT[None]
model_of = functools.cache(random_model)
POP_HALF = POP(num_layers=4, budget=Budget(layers=2), phase="prefill")
MIDDLE = SkipPlan.of_sublayers({Sublayer("attention", 1): 1.1, Sublayer("ffn", 1): 0.8, Sublayer("attention", 2): 0.9})
CAUSAL = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_cache": False}, "no KV cache; allowed: use_cache=True"),
        ({"attention_mask": CAUSAL}, "an attention mask that is 4-D; allowed: a 2-D mask"),
        ({"attention_mask": {"full_attention": CAUSAL}}, "an attention mask that is dict; allowed: a 2-D mask"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0]])}, "rows that end in padding; allowed: padding on the left"),
        (
            {"attention_mask": torch.tensor([[0] * 7 + [1, 0]])},
            "rows that end in padding; allowed: padding on the left",
        ),
        ({"attention_mask": torch.ones(1, 5)}, "an attention mask of 5 columns; allowed: 9, those of the KV cache and"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0, 1, 1, 1]])}, "an attention mask of 12 columns; allowed: 9"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}, "gaps in the positions but no attention mask"),
        ({"output_hidden_states": True}, "output_hidden_states; allowed: the last hidden states alone"),
        ({"output_attentions": True}, "output_attentions; allowed"),
        ({"token_type_ids": torch.zeros(1, 9)}, r"the argument token_type_ids \(Tensor\); allowed: input_ids"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_split_is_refused_before_anything_runs(arguments, message):
    model, cache = model_of("llama"), DynamicCache()
    with skipping(model, POP_HALF), pytest.raises(ValueError, match=message):
        model(IDS, **{"past_key_values": cache if "use_cache" not in arguments else None, **arguments})
    assert cache.get_seq_length() == 0


def test_a_mask_of_a_later_turn_covers_the_cache_too():
    model = model_of("gemma3")
    with skipping(model, POP_HALF), torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="an attention mask of 4 columns; allowed: 13"):
            model(IDS[:, :4], attention_mask=torch.ones(1, 4), past_key_values=cache)
        assert cache.get_seq_length() == 9
        masked = model(IDS[:, :4], attention_mask=torch.ones(1, 13), past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(masked, model(IDS[:, :4], past_key_values=cache).logits)


def test_caches_and_placements_that_cannot_keep_the_kv_are_refused():
    model = random_model("llama")
    with skipping(model, POP_HALF):
        with pytest.raises(ValueError, match=r"needs a cache that grows \(DynamicCache\).*got StaticCache"):
            model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=20))
        with pytest.raises(ValueError, match="needs a cache that grows"):
            model.generate(IDS, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(ValueError, match="not possible with no KV cache; allowed: use_cache=True"):
            model.generate(IDS, max_new_tokens=2, use_cache=False)
        with pytest.raises(ValueError, match="assisted decoding reads prompt and drafted tokens in one forward"):
            model.generate(IDS, max_new_tokens=2, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("tokens", [9, 1])
@torch.no_grad()
def test_a_cache_that_lacks_kv_is_refused_before_anything_is_written(tokens):
    model = model_of("llama")
    with skipping(model, SkipPlan.of_layers([2])):
        cache = model(IDS, use_cache=True).past_key_values
    message = r"needs a cache that holds those of every layer; layers \[2\] of this one lack them"
    for strategy in (POP_HALF, FixedPlan(num_layers=4, phase="prefill", plan=SkipPlan(ffn={0}), keep_kv=True)):
        with skipping(model, strategy), pytest.raises(ValueError, match=message):
            model(IDS[:, :tokens], past_key_values=cache)
        assert [None if layer.keys is None else layer.keys.shape[-2] for layer in cache.layers] == [9, 9, None, 9]


@pytest.mark.parametrize("offload", [True, False])
def test_an_attention_that_accelerate_offloads_is_refused_and_one_that_it_places_is_not(offload):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = random_model("llama")
    expected = read_by_hand(model_of("llama"), PROMPT, POP_HALF.skipped)[1]
    hook = AlignDevicesHook(execution_device="cpu")
    add_hook_to_module(model.model.layers[2].self_attn, hook)
    hook.offload = offload
    if offload:
        with pytest.raises(
            ValueError, match="layer 2 cannot keep the K/V of its skipped attention: accelerate's Align"
        ):
            patches_for(model, POP_HALF).check(POP_HALF.skipped)
    else:
        with skipping(model, POP_HALF), torch.no_grad():
            assert (model(IDS).logits[0] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("phase", ["decode", "e2e"])
def test_pop_and_sets_that_keep_the_kv_are_for_phase_prefill(phase):
    with pytest.raises(ValueError, match=f"strategy pop is defined for phase prefill; got phase '{phase}'"):
        POP(num_layers=4, budget=Budget(layers=1), phase=phase)
    with pytest.raises(
        ValueError, match=f"only while a prompt is read, in phase 'prefill'.*fixed has one in .*{phase}"
    ):
        FixedPlan(num_layers=4, plan=POP_HALF.skipped, phase=phase)


def built(name, phase, **options):
    method, rising = selection_method(name), [0.5, 0.6, 0.7, 0.8]
    if needs_profile(name):
        importance = profile_of(attention=rising, ffn=rising, layer=rising)
        options["profile"] = importance if method is None else selection_of(4, phase, method)
    return build(name, phase=phase, budget=Budget(layers=1), num_layers=4, **options)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_can_skip_its_set_in_the_prompt_alone(name):
    kept = built(name, "prefill", keep_kv=True)
    assert kept.prefill_plan == replace(built(name, "prefill").skipped, keeps_kv=True)
    assert kept.prefill_plan is kept.prefill_plan
    assert kept.decode_plan(1) == kept.decode_plan(600) == SkipPlan()
    assert not kept.is_steady
    assert not kept.one_plan
    for phase in STRATEGIES[name].phases[1:]:
        with pytest.raises(ValueError, match="a set that keeps the K/V is skipped only while a prompt is read"):
            built(name, phase, keep_kv=True)


@pytest.mark.parametrize("given", ["no", "False", 1, None])
def test_keep_kv_is_true_or_false(given):
    with pytest.raises(ValueError, match=f"keep_kv of strategy early_exit must be True or False; got {given!r}"):
        built("early_exit", "prefill", keep_kv=given)


@torch.no_grad()
def test_a_strategy_with_its_kv_kept_runs_as_its_set_does_by_hand():
    model, kept = model_of("qwen3"), FixedPlan(num_layers=4, phase="prefill", plan=MIDDLE, keep_kv=True)
    with skipping(model, kept):
        logits = model(IDS).logits[0]
    assert (logits - read_by_hand(model, PROMPT, replace(MIDDLE, keeps_kv=True))[1]).abs().max() < TOLERANCE


def test_keep_kv_on_the_command_line_is_an_option_of_the_strategy_and_of_the_runs_identity():
    given = {"testbed": True, "model": "llama", "phase": "prefill", "budget": 8, "limit": 1, "device": "cpu"}
    for name in ("unified", "adaskip"):
        plain, kept = (resolve(RunConfig(**given, strategy=name, keep_kv=keep_kv)) for keep_kv in (False, True))
        assert describe_job(plain)["strategy_options"] is None
        assert describe_job(kept)["strategy_options"] == {"keep_kv": True}
        prefill, decode = assumed_plans(kept, 8, 16, 4)
        assert prefill.keeps_kv
        assert (decode(1) if callable(decode) else decode) == SkipPlan()
    (strategy,) = set(build_strategies(resolve(RunConfig(**given, strategy="unified", keep_kv=True)), None))
    assert strategy.prefill_plan.keeps_kv
    for other in ({"strategy": "full", "budget": None}, {"strategy": "unified", "phase": "e2e"}):
        with pytest.raises(ValueError, match="--keep-kv is for strategies in phase prefill without --target-speedup"):
            RunConfig(**{**given, **other, "keep_kv": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"strategy": "unified", "phase": "prefill", "keep_kv": True},
            "--keep-kv applies to runs, not to a saved plan",
        ),
        ({"strategy": "pop"}, "--strategy pop is defined for phase prefill; got --phase e2e"),
    ],
)
def test_a_plan_to_be_saved_is_refused_for_sets_that_keep_the_kv_when_the_options_are_read(options, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(testbed=True, model="llama", output="plan", **options)


def test_a_plan_of_a_strategy_that_changes_its_set_is_refused_before_the_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(Loading, "load", lambda self: pytest.fail("the model is loaded"))
    given = {"testbed": True, "model": "llama", "output": str(tmp_path / "plan")}
    for name, phase in (("pop", "prefill"), ("skipdecode", "e2e")):
        with pytest.raises(ValueError, match=f"strategy {name} in phase '{phase}' changes its set"):
            plan_to(PlanConfig(**given, strategy=name, phase=phase, budget=8))


def test_pop_skips_the_last_layers_and_whole_ones_alone():
    assert POP_HALF.skipped == SkipPlan.of_layers([2, 3], keeps_kv=True) != SkipPlan.of_layers([2, 3])
    with pytest.raises(ValueError, match="even number of sublayers; got 3"):
        POP(num_layers=4, budget=Budget(sublayers=3), phase="prefill")


def test_a_study_of_peers_compares_pop_in_phase_prefill_alone():
    config = PeersConfig(testbed=True, strategies=("pop", "calibrated"))
    compared = {phase: [*_compared(config, "llama", phase, []).strategies] for phase in ("prefill", "e2e")}
    assert compared == {"prefill": ["pop", "calibrated"], "e2e": ["calibrated"]}


def test_what_runs_one_plan_or_drafts_refuses_a_set_that_keeps_the_kv():
    model = model_of("llama")
    for refuse in (fold, functools.partial(make_plan, model)):
        with pytest.raises(ValueError, match="strategy pop in phase 'prefill' changes its "):
            refuse(POP_HALF)
    with pytest.raises(ValueError, match="lossless drafts with the skipped model, but pop skips nothing in an answer"):
        lossless(model, POP_HALF)


@dataclass(frozen=True, kw_only=True)
class _Own(FixedPlan):
    """A strategy of another package: with its own plans, and FFNs that it learns."""

    name = "own"

    prompt: SkipPlan | None = None
    answer: SkipPlan = SkipPlan()  # noqa: RUF009 - frozen
    window: int = 0

    @functools.cached_property
    def prefill_plan(self) -> SkipPlan:
        return replace(self.plan, keeps_kv=True) if self.prompt is None else self.prompt

    def decode_plan(self, step: int) -> SkipPlan:
        return self.answer

    @property
    def window_tokens(self) -> int:
        return self.window

    def learn(self, window):
        return SkipPlan(ffn={3})


own = functools.partial(_Own, num_layers=4, phase="prefill", plan=SkipPlan(attention={1}))


@pytest.mark.parametrize(
    ("strategy", "skipped"),
    [
        (own(keep_kv=True, answer=SkipPlan(ffn={2})), "1 sublayers at decode step 1"),
        (own(answer=replace(MIDDLE, keeps_kv=True)), "3 sublayers at decode step 1"),
        (own(window=1), "1 sublayers at decode step 2"),  # only its prompt's plan keeps the K/V
    ],
)
@torch.no_grad()
def test_an_answer_is_refused_in_which_a_strategy_skips_although_the_prompts_kv_is_complete(strategy, skipped):
    with (
        skipping(model_of("llama"), strategy),
        pytest.raises(ValueError, match=f"so the full model answers.*{skipped}"),
    ):
        model_of("llama").generate(IDS, max_new_tokens=4, min_new_tokens=4)


def test_an_answer_that_keeps_the_kv_of_skipped_attentions_is_refused():
    strategy = own(phase="e2e", prompt=SkipPlan(), answer=replace(MIDDLE, keeps_kv=True))
    with skipping(model_of("llama"), strategy), pytest.raises(ValueError, match="only the plan of a prompt can keep K"):
        model_of("llama").generate(IDS, max_new_tokens=4, min_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": SkipPlan(attention={1})}, "strategy own is to keep the K/V of its set, but its own prefill_plan"),
        ({"window": 20}, "strategy own keeps the K/V of the prompt.*learning window of 20 tokens; allowed: 0"),
    ],
)
def test_a_strategy_that_is_to_keep_the_kv_has_such_a_prefill_plan_and_learns_nothing(options, message):
    for keeping in ({"keep_kv": True}, {"plan": replace(MIDDLE, keeps_kv=True)}):
        with pytest.raises(ValueError, match=message):
            own(**options, **keeping)


def test_a_plan_that_keeps_the_kv_is_saved_with_that_and_runs_in_phase_prefill(tmp_path):
    plan = POP_HALF.skipped
    assert SkipPlan.load(plan.save(tmp_path / "plan.json")) == plan == copy.deepcopy(plan)
    told = "a plan of 4 sublayers that names no model, skipped only while a prompt is read (keeps_kv)"
    assert shown(str(tmp_path / "plan.json"))[0] == told
    assert plan.union(SkipPlan(ffn={0})).keeps_kv
    assert plan.attention_only() == SkipPlan() == SkipPlan(keeps_kv=True)
    with pytest.raises(ValueError, match="keeps_kv of a plan must be True or False; got 1"):
        SkipPlan.from_dict({**plan.to_dict(scales=True), "keeps_kv": 1})
    model = model_of("llama")
    with skipping(model, plan), torch.no_grad():
        logits = model(IDS).logits[0]
    assert (logits - read_by_hand(model, PROMPT, plan)[1]).abs().max() < TOLERANCE
