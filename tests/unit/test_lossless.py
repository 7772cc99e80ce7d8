"""`lossless` gives what the full model gives, token by token, whatever the draft, its length and the end."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from adaskip.core.context import skipping
from adaskip.core.kv_cache import kv_bytes
from adaskip.core.plan import Budget, SkipPlan, Sublayer
from adaskip.speculative import lossless
from adaskip.strategies import AdaSkip, EarlyExit, FixedPlan, SkipDecode, UnifiedSkipping
from tests.families import FAMILIES, VOCAB, random_model, random_prompts
from tests.profiles import profile_of
from tests.unit.test_skipping_generate import instance_state

LAYERS = 4
PLAN = SkipPlan.of_sublayers({Sublayer("attention", 0): 1.1, Sublayer("ffn", 1): 0.9, Sublayer("attention", 2): 1.0})
MODELS = {family: random_model(family) for family in ("llama", "mistral", "granite")}


def fixed(plan=PLAN):
    return FixedPlan(num_layers=LAYERS, plan=plan)


def generated(model, prompt, decoder=None, **options):
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0} | options
    if decoder is not None:
        options["custom_generate"] = decoder
    return model.generate(prompt[None], **options)


def agree(model, prompt, decoder, **options):
    expected, ours = generated(model, prompt, **options), generated(model, prompt, decoder, **options)
    return expected.tolist() == ours.tolist()


@pytest.mark.parametrize(
    ("family", "gamma"), [*product(FAMILIES, (None, 3)), *product(("llama", "mistral", "gemma3"), (1, 9))]
)
def test_greedy_tokens_are_those_of_the_full_model(family, gamma):
    model = random_model(family)
    decoder = lossless(model, fixed(), gamma=gamma)
    for prompt in random_prompts([1, 9]):
        assert agree(model, prompt, decoder)
    assert decoder.statistics.requests == 2
    assert gamma is None or decoder.statistics.draft_forwards > 0


def test_the_draft_alone_goes_another_way_and_is_accepted_in_part():
    model = MODELS["granite"]
    (prompt,) = random_prompts([9])
    expected = generated(model, prompt)
    with skipping(model, fixed()):
        assert not torch.equal(generated(model, prompt), expected)
    decoder = lossless(model, fixed(), gamma=3)
    assert torch.equal(generated(model, prompt, decoder), expected)
    seen = decoder.last_request
    assert 0 < seen.accepted < seen.judged <= seen.draft_forwards
    assert seen.new_tokens == 15 == seen.accepted + seen.verify_forwards


@st.composite
def plans(draw):
    attention = draw(st.sets(st.integers(0, LAYERS - 1), max_size=LAYERS - 1))
    ffn = draw(st.sets(st.integers(0, LAYERS - 1)))
    scales = st.floats(0.5, 1.5)
    chosen = [Sublayer("attention", i) for i in sorted(attention)] + [Sublayer("ffn", i) for i in sorted(ffn)]
    return SkipPlan.of_sublayers({sublayer: draw(scales) for sublayer in chosen})


@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(sorted(MODELS)),
    prompt=st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=14),
    drafts=st.lists(plans(), min_size=1, max_size=3),
    gamma=st.one_of(st.none(), st.integers(1, 12)),
    max_new_tokens=st.integers(1, 24),
    end_after=st.one_of(st.none(), st.integers(1, 24)),
)
def test_any_plans_draft_length_end_token_and_limit(family, prompt, drafts, gamma, max_new_tokens, end_after):
    """The end token is one that the full model does produce, so that it falls anywhere in a draft."""
    model, prompt = MODELS[family], torch.tensor(prompt)
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": None}
    if end_after is not None:
        answer = generated(model, prompt, **options)[0, len(prompt) :].tolist()
        options["eos_token_id"] = [answer[min(end_after, len(answer)) - 1], 2]
    decoder = lossless(model, [*map(fixed, drafts)], gamma=gamma if len(drafts) == 1 else None)
    assert agree(model, prompt, decoder, **options)


@pytest.mark.parametrize(
    "strategy",
    [
        EarlyExit(num_layers=LAYERS, budget=Budget(layers=1), phase="decode"),
        UnifiedSkipping(num_layers=LAYERS, budget=Budget(layers=1)),
        SkipDecode(num_layers=LAYERS, budget=Budget(layers=3), max_decode_steps=8),
        AdaSkip(
            num_layers=LAYERS,
            budget=Budget(sublayers=3),
            profile=profile_of([0.9, 0.8, 0.7, 0.6], [0.95, 0.5, 0.5, 0.85]),
        ),
        EarlyExit(num_layers=LAYERS, budget=Budget(layers=0)),
    ],
    ids=lambda strategy: f"{strategy.name} {strategy.budget}",
)
def test_every_strategy_drafts(strategy):
    model = MODELS["granite"]
    decoder = lossless(model, strategy, gamma=2)
    assert agree(model, random_prompts([9])[0], decoder)
    everything_accepted = decoder.last_request.accepted == decoder.last_request.judged
    assert everything_accepted == (not strategy.skipped)


class Favour(LogitsProcessor):
    """A processor of the user's: the token after `prefix` tokens depends on them."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, int(input_ids.sum()) % VOCAB] += 2.0
        return scores


class StopAt(StoppingCriteria):
    """Stops at a token, and notes every length it was asked at."""

    def __init__(self, multiple):
        self.multiple, self.lengths = multiple, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids[:, -1] % self.multiple == 0


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.6},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12, "eos_token_id": list(range(3, 30))},
        {"forced_eos_token_id": 2},
        {"bad_words_ids": [[5], [7, 8]]},
        {"logits_processor": [Favour()]},
        {"prefix_allowed_tokens_fn": lambda _, ids: [(int(ids[-1]) * k) % VOCAB for k in (2, 3, 5)]},
        {"max_new_tokens": None, "max_length": 20},
        {"renormalize_logits": True, "sequence_bias": [[[4], 3.0]]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_logits_processors_act_as_in_generate(options):
    for model in (MODELS["llama"], MODELS["granite"]):
        for prompt in random_prompts([6, 11]):
            assert agree(model, prompt, lossless(model, fixed(), gamma=4), **options)


@pytest.mark.parametrize("multiple", [2, 5, 11])
def test_stopping_criteria_are_asked_after_every_token(multiple):
    model = MODELS["granite"]
    (prompt,) = random_prompts([7])
    theirs, ours = StopAt(multiple), StopAt(multiple)
    expected = generated(model, prompt, stopping_criteria=StoppingCriteriaList([theirs]))
    decoder = lossless(model, fixed(), gamma=5)
    assert torch.equal(generated(model, prompt, decoder, stopping_criteria=StoppingCriteriaList([ours])), expected)
    assert ours.lengths == theirs.lengths


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("chunk", [None, 4])
def test_left_padding_and_chunked_prefill(family, pads, chunk):
    model = MODELS[family]
    (prompt,) = random_prompts([11])
    ids = torch.cat([torch.zeros(pads, dtype=torch.long), prompt])
    mask = (torch.arange(len(ids)) >= pads).long()[None]

    def options():
        chunked = {"prefill_chunk_size": chunk, "past_key_values": DynamicCache(config=model.config)} if chunk else {}
        return {"attention_mask": mask, **chunked}

    expected = generated(model, ids, **options())
    assert torch.equal(generated(model, ids, lossless(model, fixed(), gamma=3), **options()), expected)
    if pads and not chunk:
        unmasked = generated(model, ids, attention_mask=torch.ones_like(mask))
        assert not torch.equal(unmasked, expected), "the mask matters here"


def test_prompts_given_as_embeddings():
    model = MODELS["llama"]
    (prompt,) = random_prompts([9])
    embeds = model.get_input_embeddings()(prompt[None])
    options = {"inputs_embeds": embeds, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**options)
    assert torch.equal(model.generate(**options, custom_generate=lossless(model, fixed(), gamma=3)), expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_scores_logits_and_cache_are_those_of_the_full_model(family):
    model = MODELS[family]
    prompt, more = random_prompts([9, 5])
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options |= {"repetition_penalty": 1.3, "min_new_tokens": 16}
    expected = generated(model, prompt, **options)
    ours = generated(model, prompt, lossless(model, fixed(), gamma=4), **options)
    assert torch.equal(ours.sequences, expected.sequences)
    for theirs, mine in ((expected.scores, ours.scores), (expected.logits, ours.logits)):
        assert len(mine) == len(theirs) == 16
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), atol=1e-5, rtol=0)
    for theirs, mine in zip(expected.past_key_values.layers, ours.past_key_values.layers, strict=True):
        assert type(mine) is type(theirs)
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert (mine.keys - theirs.keys).abs().max() < 1e-5
        assert (mine.values - theirs.values).abs().max() < 1e-5
    turn = torch.cat([expected.sequences[0], more])
    second = generated(model, turn, past_key_values=expected.past_key_values)
    decoder = lossless(model, fixed(), gamma=4)
    assert torch.equal(generated(model, turn, decoder, past_key_values=ours.past_key_values), second)


def test_a_draft_holds_no_second_cache():
    """While drafting, the one cache holds at most the drafted tokens of the live layers on top of the full model's."""
    model = MODELS["llama"]
    cache = DynamicCache(config=model.config)
    (prompt,) = random_prompts([30])
    gamma, new_tokens = 4, 10
    decoder = lossless(model, fixed(), gamma=gamma)
    held = []
    hook = model.model.register_forward_hook(lambda *_: held.append(kv_bytes(cache)))
    generated(model, prompt, decoder, past_key_values=cache, max_new_tokens=new_tokens)
    hook.remove()
    per_token = kv_bytes(cache) / cache.get_seq_length()
    assert cache.get_seq_length() == 30 + new_tokens - 1
    assert max(held) <= per_token * (30 + new_tokens - 1 + gamma)
    first_draft = held[1] - held[0]
    assert first_draft == per_token * 2 / LAYERS, "attention 0 and 2 of 4 store nothing in a draft"


class Recorder(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values += value.flatten().tolist()

    def end(self):
        self.ended += 1


def test_a_streamer_sees_what_generate_would_show_it():
    """The prompt first, which a TextStreamer may skip, then every token once."""
    model = MODELS["granite"]
    (prompt,) = random_prompts([7])
    stock, ours = Recorder(), Recorder()
    generated(model, prompt, streamer=stock)
    generated(model, prompt, lossless(model, fixed(), gamma=4, streamer=ours))
    assert ours.values == stock.values
    assert ours.values[: len(prompt)] == prompt.tolist()
    assert ours.ended == stock.ended == 1


@pytest.mark.parametrize("fails", [False, True], ids=["after success", "after an exception"])
def test_model_and_cache_are_restored_exactly(fails):
    class Failing(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if fails and input_ids.shape[1] == 12:
                raise RuntimeError("stop")
            return torch.zeros(1, dtype=torch.bool)

    model = random_model("mistral")
    (prompt,) = random_prompts([7])
    generated(model, prompt)
    before, logits = instance_state(model), model(prompt[None]).logits
    cache = DynamicCache(config=model.config)
    with pytest.raises(RuntimeError, match="stop") if fails else torch.no_grad():
        criteria = StoppingCriteriaList([Failing()])
        generated(model, prompt, lossless(model, fixed()), stopping_criteria=criteria, past_key_values=cache)
    assert instance_state(model) == before
    assert torch.equal(model(prompt[None]).logits, logits)
    assert not any(layer.record_past for layer in cache.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "one beam; got beam_search"),
        ({"num_return_sequences": 9, "do_sample": True}, "at most 8 rows"),
        ({"prompt_lookup_num_tokens": 3}, "got assisted_generation"),
        ({"use_cache": False}, "use_cache=True"),
        ({"cache_implementation": "static"}, "got StaticCache"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "no attentions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_verified_is_refused(options, message):
    model = MODELS["llama"]
    with pytest.raises(ValueError, match=message) as refusal:
        generated(model, random_prompts([5])[0], lossless(model, fixed()), **options)
    assert "\n" not in str(refusal.value)


def test_a_cache_of_a_skipping_context_is_refused():
    model = MODELS["llama"]
    (prompt,) = random_prompts([5])
    cache = DynamicCache(config=model.config)
    with skipping(model, fixed()):
        generated(model, prompt[:-1], past_key_values=cache, max_new_tokens=1)
    with pytest.raises(ValueError, match="filled by the full model; got DynamicCache of DynamicLayer, SkippedLayer"):
        generated(model, prompt, lossless(model, fixed()), past_key_values=cache)


def test_an_offloaded_cache_is_refused():
    model = MODELS["llama"]
    cache = DynamicCache(config=model.config)
    cache.offloading = True  # asked for in the constructor it would want a device to come back to
    with pytest.raises(ValueError, match="got DynamicCache with offloading"):
        generated(model, random_prompts([5])[0], lossless(model, fixed()), past_key_values=cache)


def test_inside_a_skipping_context_it_is_refused():
    model = MODELS["llama"]
    with skipping(model, fixed()), pytest.raises(ValueError, match="do not nest"):
        generated(model, random_prompts([5])[0], lossless(model, fixed()))


@pytest.mark.parametrize(
    ("kind", "prompt_length", "refused"), [("dynamic", 5, True), ("longrope", 5, True), ("longrope", 25, False)]
)
def test_positions_that_depend_on_the_length_are_refused_where_they_change(kind, prompt_length, refused):
    half = random_model("llama").config.head_dim // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [2.0] * half, "original_max_position_embeddings": 20}
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, **(factors if kind == "longrope" else {})}
    model = random_model("llama", rope_parameters=rope, max_position_embeddings=20 if kind == "dynamic" else 40)
    (prompt,) = random_prompts([prompt_length])
    decoder = lossless(model, fixed())
    assert agree(model, prompt, decoder, max_new_tokens=14)
    if refused:
        with pytest.raises(ValueError, match=f"{kind} rotary positions change at 20 tokens"):
            generated(model, prompt, decoder, max_new_tokens=16)


def test_wrong_arguments_are_refused_in_one_line():
    model = MODELS["llama"]
    with pytest.raises(ValueError, match="was made for 6 layers, LlamaForCausalLM has 4"):
        lossless(model, EarlyExit(num_layers=6, budget=Budget(layers=1)))
    with pytest.raises(ValueError, match="gamma must be a whole number above 0"):
        lossless(model, fixed(), gamma=0)
    with pytest.raises(ValueError, match="with one strategy or plan; got 3, with 2"):
        lossless(model, [fixed(), fixed()], gamma=3)
    for number in (0, 5):
        with pytest.raises(ValueError, match=f"1 to 4 strategies or plans; got {number}"):
            lossless(model, [fixed()] * number)
    for other, kind in (((fixed() for _ in range(2)), "generator"), ("ee", "str"), (None, "NoneType")):
        for take in (lossless, lambda *given: skipping(*given).__enter__()):
            with pytest.raises(ValueError, match=f"expected a Strategy or a SkipPlan .*; got {kind}"):
                take(model, other)
    with pytest.raises(ValueError, match="another model"):
        generated(MODELS["granite"], random_prompts([5])[0], lossless(model, fixed()))
