"""Logits processors and stopping criteria that keep state act in lossless mode as in `generate`."""

from __future__ import annotations

import threading
from collections import Counter
from functools import cache
from itertools import product

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    SynthIDTextWatermarkLogitsProcessor,
)
from transformers.generation import logits_process

from adaskip.core.context import skipping
from adaskip.core.plan import SkipPlan, Sublayer
from adaskip.speculative import lossless
from adaskip.speculative.processors import STATELESS, for_draft
from adaskip.strategies import FixedPlan
from tests.families import VOCAB, random_model, random_prompts
from tests.unit.test_lossless import MODELS, fixed, generated


class Dfa(LogitsProcessor):
    """A grammar: its place in it goes on with every call."""

    state = None

    def __call__(self, input_ids, scores):
        self.state = 0 if self.state is None else (3 * self.state + int(input_ids[0, -1])) % 7
        return scores.masked_fill(torch.arange(VOCAB) % 7 == self.state, -torch.inf)


class FrequencyPenalty(LogitsProcessor):
    """Counts the tokens it has seen one by one."""

    def __init__(self):
        self.counts = torch.zeros(VOCAB)

    def __call__(self, input_ids, scores):
        self.counts[input_ids[0, -1]] += 1
        return scores - 2.0 * self.counts


class CopiesShareState(LogitsProcessor):
    """Every copy has the same counts."""

    def __init__(self):
        self.counts = Counter()

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __call__(self, input_ids, scores):
        self.counts[int(input_ids[0, -1])] += 1
        return scores - 2.0 * torch.tensor([float(self.counts[i]) for i in range(VOCAB)])


class CannotBeCopied(Dfa):
    def __init__(self):
        self.lock = threading.Lock()


def closure():
    """A plain function whose state is in its closure."""
    calls = []

    def process(input_ids, scores):
        calls.append(int(input_ids[0, -1]))
        return scores.masked_fill(torch.arange(VOCAB) % 5 == sum(calls) % 5, -torch.inf)

    return process


class CountsInItsClass(LogitsProcessor):
    def __call__(self, input_ids, scores):
        type(self).calls += 1
        return scores.masked_fill(torch.arange(VOCAB) % 5 == type(self).calls % 5, -torch.inf)


def counts_in_its_class():
    CountsInItsClass.calls = 0
    return CountsInItsClass()


class SubclassOfAStatelessOne(logits_process.RepetitionPenaltyLogitsProcessor):
    def __call__(self, input_ids, scores):
        self.penalty += 0.1
        return super().__call__(input_ids, scores)


STATEFUL = {
    "grammar": Dfa,
    "frequency penalty": FrequencyPenalty,
    "copies share state": CopiesShareState,
    "cannot be copied": CannotBeCopied,
    "closure": closure,
    "class attribute": counts_in_its_class,
    "subclass": lambda: SubclassOfAStatelessOne(1.1),
}


@cache
def without_processors(family, length):
    return generated(MODELS[family], *random_prompts([length]), eos_token_id=None)


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL.keys())
def test_processors_with_state_act_as_in_generate(make):
    for family, length in product(("llama", "granite"), (6, 11)):
        model, (prompt,) = MODELS[family], random_prompts([length])

        def run(decoder=None, model=model, prompt=prompt):
            processors = LogitsProcessorList([make()])
            return generated(model, prompt, decoder, logits_processor=processors, eos_token_id=None)

        expected = run()
        assert not torch.equal(expected, without_processors(family, length)), "the processor matters"
        for gamma in (None, 4):
            decoder = lossless(model, fixed(), gamma=gamma)
            assert torch.equal(run(decoder), expected)
            assert gamma is None or decoder.last_request.draft_forwards > 0


class Recorder(LogitsProcessor, StoppingCriteria):
    """Keeps the ids of every call."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids[0].tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool) if scores is None else scores


class Processor(Recorder):
    def __call__(self, input_ids, scores):
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize("end_after", [None, 3, 8])
def test_processors_and_criteria_are_called_once_for_every_token_with_what_precedes_it(end_after):
    model = MODELS["granite"]
    (prompt,) = random_prompts([9])
    answer = generated(model, prompt, eos_token_id=None)[0, len(prompt) :].tolist()
    seen = []
    for decoder in (None, lossless(model, fixed(), gamma=4)):
        processor, criterion = Processor(), Recorder()
        generated(
            model,
            prompt,
            decoder,
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList([criterion]),
            eos_token_id=None if end_after is None else answer[end_after],
        )
        seen.append((processor.seen, criterion.seen))
    assert seen[0] == seen[1]
    assert len(seen[1][0]) == len(seen[1][1]) > 1


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.5},
        {"guidance_scale": 0.5, "negative_prompt_ids": torch.tensor([[7, 8, 9]])},
        {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3, 4, 5, 6], ngram_len=3)},
        {"prefix_allowed_tokens_fn": lambda _, ids: [(int(ids[-1]) * k) % VOCAB for k in (2, 3, 5)]},
    ],
    ids=["guidance", "negative prompt", "SynthID", "allowed tokens"],
)
def test_processors_of_transformers_that_keep_state_act_as_in_generate(family, options):
    model = MODELS[family]
    for prompt in random_prompts([6, 11]):
        expected = generated(model, prompt, **options, eos_token_id=None)
        assert not torch.equal(expected, generated(model, prompt, eos_token_id=None))
        decoder = lossless(model, fixed(), gamma=4)
        assert torch.equal(generated(model, prompt, decoder, **options, eos_token_id=None), expected)


class AddsInPlace(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, int(input_ids.sum()) % VOCAB] += 3.0
        return scores


def test_what_a_processor_changes_in_place_is_returned_as_generate_returns_it():
    model = MODELS["llama"]
    (prompt,) = random_prompts([9])
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "eos_token_id": None}
    runs = [
        generated(model, prompt, decoder, logits_processor=LogitsProcessorList([AddsInPlace()]), **asked)
        for decoder in (None, lossless(model, fixed(), gamma=4))
    ]
    for name in ("scores", "logits"):
        stock, ours = (torch.stack(run[name]) for run in runs)
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)


EOS = torch.tensor([2])
KEPT = {
    "EncoderNoRepeatNGramLogitsProcessor": (2, torch.tensor([[3, 4, 5, 3]])),
    "EncoderRepetitionPenaltyLogitsProcessor": (1.5, torch.tensor([[3, 4, 5]])),
    "EpsilonLogitsWarper": (0.01,),
    "EtaLogitsWarper": (0.01,),
    "ExponentialDecayLengthPenalty": ((1, 1.5), EOS, 2),
    "ForcedBOSTokenLogitsProcessor": (1,),
    "ForcedEOSTokenLogitsProcessor": (6, EOS),
    "InfNanRemoveLogitsProcessor": (),
    "LogitNormalization": (),
    "MinLengthLogitsProcessor": (6, EOS),
    "MinNewTokensLengthLogitsProcessor": (2, 4, EOS),
    "MinPLogitsWarper": (0.1,),
    "NoBadWordsLogitsProcessor": ([[3], [4, 5]], EOS),
    "NoRepeatNGramLogitsProcessor": (2,),
    "RepetitionPenaltyLogitsProcessor": (1.5,),
    "SequenceBiasLogitsProcessor": ([[[3], 2.0], [[4, 5], -3.0]],),
    "SuppressTokensAtBeginLogitsProcessor": ([3, 4], 4),
    "SuppressTokensLogitsProcessor": ([3, 4],),
    "TemperatureLogitsWarper": (0.7,),
    "TopHLogitsWarper": (0.5,),
    "TopKLogitsWarper": (5,),
    "TopPLogitsWarper": (0.8,),
    "TypicalLogitsWarper": (0.8,),
    "WatermarkLogitsProcessor": (VOCAB, "cpu"),
}


def depends_on_earlier_calls(make):
    """Whether scores differ when drafts that are thrown away were processed in between."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(9, VOCAB, generator=generator)
    (prompt,) = random_prompts([9])
    undisturbed, disturbed = make(), make()
    for length in range(2, 9):
        for other in random_prompts([length, length + 3], seed=length):
            disturbed(other[None], torch.randn(1, VOCAB, generator=generator))
        row = scores[length][None]
        if not torch.equal(
            undisturbed(prompt[None, :length], row.clone()), disturbed(prompt[None, :length], row.clone())
        ):
            return True
    return False


@pytest.mark.parametrize("kind", sorted(STATELESS, key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_processors_that_act_on_drafts_keep_no_state(kind):
    assert not depends_on_earlier_calls(lambda: kind(*KEPT[kind.__name__]))


def test_the_check_of_state_finds_state():
    assert depends_on_earlier_calls(Dfa)
    assert depends_on_earlier_calls(FrequencyPenalty)
    keys = list(range(1, 7))
    assert depends_on_earlier_calls(lambda: SynthIDTextWatermarkLogitsProcessor(3, keys, 64, 0, 4, torch.device("cpu")))


class Favour(LogitsProcessor):
    """Without state; the scores alone decide little against it."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, int(input_ids.sum()) % VOCAB] += 100.0
        return scores


def test_a_stateless_processor_acts_on_drafts_when_its_class_is_named():
    model = MODELS["granite"]
    (prompt,) = random_prompts([9])
    options = {"logits_processor": LogitsProcessorList([Favour()]), "eos_token_id": None}
    expected = generated(model, prompt, **options)
    acceptance = []
    for stateless in ((), (Favour,)):
        decoder = lossless(model, fixed(), gamma=3, stateless=stateless)
        assert torch.equal(generated(model, prompt, decoder, **options), expected)
        acceptance.append(decoder.last_request.acceptance_rate)
    assert acceptance[0] < 0.5 < acceptance[1] == 1.0


def test_the_processors_of_a_draft_keep_their_order():
    top_k, temperature = logits_process.TopKLogitsWarper(3), logits_process.TemperatureLogitsWarper(0.5)
    chosen = for_draft(LogitsProcessorList([top_k, Dfa(), temperature]), frozenset())
    assert list(chosen) == [top_k, temperature]


@pytest.mark.parametrize("wrong", [Favour(), "Favour", object])
def test_what_is_named_stateless_must_be_a_class_of_processors(wrong):
    with pytest.raises(ValueError, match="stateless must list classes of logits processors"):
        lossless(MODELS["llama"], fixed(), stateless=[wrong])


def test_sampling_with_an_overflowing_draft_samples():
    """Its scale makes the skipped model overflow; what it wrote into the KV cache is gone afterwards."""
    model = random_model("llama", num_layers=2)
    plan = SkipPlan.of_sublayers({Sublayer("attention", 0): 1e30, Sublayer("ffn", 0): 1e30})
    decoder = lossless(model, FixedPlan(num_layers=2, plan=plan), gamma=2)
    ids = torch.tensor([[3, 5, 6]])
    with skipping(model, FixedPlan(num_layers=2, plan=plan)):
        assert model(ids).logits.isnan().any()
    output = model.generate(
        ids, do_sample=True, max_new_tokens=6, eos_token_id=None, custom_generate=decoder, pad_token_id=0
    )
    assert output.shape == (1, 9)
    assert decoder.last_request.draft_forwards > 0
