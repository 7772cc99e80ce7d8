"""`lossless` gives the tokens of stock `generate` for every row of a batch, whatever each row drafts and keeps."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    LogitsProcessor,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from adaskip.core.plan import SkipPlan
from adaskip.speculative import batch_rounds, lossless
from adaskip.speculative.batch_checks import MODEL_TYPES
from adaskip.speculative.drafting import Drafting, NextDraft
from adaskip.speculative.ngrams import NGrams
from tests.families import VOCAB, random_model, random_prompts
from tests.unit.test_lossless import Recorder
from tests.unit.test_skipping_generate import instance_state

MODELS = {name: random_model(name) for name in MODEL_TYPES if name != "mistral"}
MODELS["mistral"] = random_model("mistral", sliding_window=None)
LLAMA = MODELS["llama"]


@pytest.fixture(autouse=True)
def changing_drafts(monkeypatch):
    """Drafts of every length, some of them right: the next tokens are guessed from a seed, or copied."""
    draw = random.Random(0)

    def next_draft(self, most):
        return NextDraft(self.sources[0], min(draw.randrange(7), most)) if most > 0 else NextDraft()

    monkeypatch.setattr(Drafting, "next", next_draft)


def batch(lengths, seed=0):
    """Prompts that repeat themselves, padded on the left: token ids and mask, [B, S]."""
    rows = [row.repeat(2) for row in random_prompts(lengths, seed)]
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    return {"inputs": ids, "attention_mask": mask}


def generated(model, rows, decoder=None, **options):
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(**rows, custom_generate=decoder, **options).tolist()


@pytest.mark.parametrize("lengths", [[5, 5], [3, 9, 1, 6], [2] * 8])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_greedy_rows_are_those_of_the_full_model(family, lengths):
    model, decoder = MODELS[family], lossless(MODELS[family], SkipPlan())
    rows = batch(lengths)
    assert generated(model, rows, decoder) == generated(model, rows)
    seen = decoder.last_request
    assert 0 < seen.accepted < seen.judged <= seen.copied
    assert seen.verify_forwards < 24


def oracle(model, rows, right=0.7, **options):
    """Drafts that know the full model's answer and lie sometimes, so that rows accept different numbers of tokens."""
    whole = torch.tensor(generated(model, rows, **options))
    draw = random.Random(1)

    class Source(NGrams):
        def draft(self, ids, most, least_survival):
            for answer in whole:
                if answer[: ids.shape[1]].equal(ids[0]):
                    ahead = answer[ids.shape[1] : ids.shape[1] + most].tolist()
                    return [token if draw.random() < right else draw.randrange(VOCAB) for token in ahead]
            raise AssertionError("a row left the full model's answer")

    return Source


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=2, max_size=5),
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    max_new_tokens=st.integers(1, 30),
    end=st.one_of(st.none(), st.integers(0, 1000)),
    sample=st.booleans(),
    seed=st.integers(0, 50),
)
def test_any_lengths_drafts_ends_and_limits(lengths, right, max_new_tokens, end, sample, seed):
    """The end token is one that some row does produce, so that rows end at different places, in and after drafts."""
    rows = batch(lengths, seed)
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": None, "do_sample": sample}

    def run(decoder=None):
        torch.manual_seed(seed)
        return generated(LLAMA, rows, decoder, **options), torch.rand(()).item()

    if end is not None:
        answers = torch.tensor(run()[0])[:, rows["inputs"].shape[1] :].flatten().tolist()
        options["eos_token_id"] = answers[end % len(answers)]
    torch.manual_seed(seed)
    source = oracle(LLAMA, rows, right, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_rounds, "NGrams", source)
        assert run(lossless(LLAMA, SkipPlan())) == run()


def test_the_cache_is_no_longer_than_the_longest_row(monkeypatch):
    rows, lengths = batch([4, 6, 2, 5]), []
    options = {"max_new_tokens": 30, "eos_token_id": None}
    monkeypatch.setattr(batch_rounds, "NGrams", oracle(LLAMA, rows, **options))
    keep = batch_rounds.BatchForwards.keep

    def counted(self, kept, fed):
        keep(self, kept, fed)
        live = self.live.sum(dim=-1)
        lengths.append(self.cache.get_seq_length())
        assert lengths[-1] == int(live.max()) == self.live.shape[1]

    monkeypatch.setattr(batch_rounds.BatchForwards, "keep", counted)
    generated(LLAMA, rows, lossless(LLAMA, SkipPlan()), **options)
    assert lengths[-1] == 12 + 30 - 1
    assert len(lengths) < 29, "rows accepted drafts"


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6, "top_k": 8}, {"top_p": 0.9, "repetition_penalty": 1.3}, {"num_return_sequences": 2}],
    ids=["plain", "top-k", "top-p", "returned twice"],
)
def test_a_seed_gives_the_rows_that_it_gives_without_drafts(options):
    rows, decoder = batch([4, 7, 2]), lossless(LLAMA, SkipPlan())
    answers = []
    for way in (None, decoder):
        torch.manual_seed(3)
        answers.append((generated(LLAMA, rows, way, do_sample=True, **options), torch.rand(()).item()))
    assert answers[0] == answers[1]
    assert decoder.last_request.accepted > 0


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.6},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12, "eos_token_id": list(range(3, 30))},
        {"bad_words_ids": [[5], [7, 8]]},
        {"max_new_tokens": None, "max_length": 25},
        {"max_new_tokens": 1},
        {"pad_token_id": None},
        {"position_ids": torch.arange(18)[None].expand(3, -1) + 3, "attention_mask": None},
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(21)])},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_act_as_in_generate(options):
    rows = batch([9, 9, 9]) | {key: options[key] for key in ("attention_mask",) if key in options}
    options = {key: value for key, value in options.items() if key != "attention_mask"}
    with lossless(LLAMA, SkipPlan()):
        ours = generated(LLAMA, rows, **options)
    assert ours == generated(LLAMA, rows, **options)


def test_a_batch_where_nothing_pays_is_decoded_in_plain_steps(monkeypatch):
    monkeypatch.setattr(Drafting, "next", lambda self, most: NextDraft())
    rows, decoder = batch([4, 7, 2]), lossless(LLAMA, SkipPlan())
    assert generated(LLAMA, rows, decoder, eos_token_id=None) == generated(LLAMA, rows, eos_token_id=None)
    assert decoder.last_request.verify_forwards == 23
    assert decoder.last_request.copied == 0


def test_the_model_is_restored_exactly():
    rows = batch([4, 7])
    generated(LLAMA, rows)
    before = instance_state(LLAMA)
    generated(LLAMA, rows, lossless(LLAMA, SkipPlan(ffn=frozenset({1}))))
    assert instance_state(LLAMA) == before


class Own(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


REFUSED = {
    "nine rows": ({}, [2] * 9, "at most 8 rows; got 9"),
    "a cache": ({"past_key_values": DynamicCache()}, [2, 2], "neither takes nor returns"),
    "a dict": ({"return_dict_in_generate": True}, [2, 2], "neither takes nor returns"),
    "a processor": ({"logits_processor": [Own()]}, [2, 2], "keep no state; got Own"),
    "a criterion": (
        {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(9.0)])},
        [2, 2],
        "row by row; got MaxTimeCriteria",
    ),
    "embeddings": ({"inputs_embeds": torch.zeros(2, 4, 16)}, [2, 2], "inputs_embeds"),
}


@pytest.mark.parametrize(("options", "lengths", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_batch_does_not_support_is_refused(options, lengths, message):
    with pytest.raises(ValueError, match=message) as refusal:
        generated(LLAMA, batch(lengths), lossless(LLAMA, SkipPlan()), **options)
    assert "\n" not in str(refusal.value)


def test_a_streamer_and_a_fixed_draft_length_are_refused():
    rows = batch([2, 2])
    with pytest.raises(ValueError, match="for one sequence at a time"):
        generated(LLAMA, rows, lossless(LLAMA, SkipPlan(), gamma=3))
    with pytest.raises(ValueError, match="a streamer shows one sequence"):
        generated(LLAMA, rows, lossless(LLAMA, SkipPlan()), streamer=Recorder())


@pytest.mark.parametrize(
    ("family", "message"),
    [("mistral", "sliding windows do not allow"), ("gemma3", "got model type 'gemma3_text'")],
)
def test_models_whose_attention_needs_the_order_of_the_cache_are_refused(family, message):
    model = random_model(family)
    with pytest.raises(ValueError, match=message):
        generated(model, batch([2, 2]), lossless(model, SkipPlan()))


def test_a_processor_declared_stateless_acts_in_a_batch():
    rows = batch([3, 4])
    decoder = lossless(LLAMA, SkipPlan(), stateless=(Own,))
    assert generated(LLAMA, rows, decoder, logits_processor=[Own()]) == generated(LLAMA, rows)
