"""Whatever calls the model's `generate` gets what the full model would give: streams, stop strings, pipelines."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from queue import Empty

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from adaskip.core.context import skipping
from adaskip.speculative import lossless
from tests.checkpoints import write_family
from tests.families import random_model, random_prompts
from tests.unit.test_lossless import MODELS, Recorder, fixed, generated
from tests.unit.test_skipping_generate import instance_state

TEXT = "The quick brown fox"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(write_family("llama", tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def model(tokenizer):
    """A model of the tokenizer's vocabulary that answers in printable text."""
    return random_model("llama", vocab_size=len(tokenizer))


def answer(model, tokenizer, /, *, context=None, **options):
    inputs = tokenizer(TEXT, return_tensors="pt")
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    if context is None:
        return model.generate(**inputs, **options)
    with context:
        return model.generate(**inputs, **options)


def both_ways(model):
    """Options of `answer` that decode losslessly: as a decoding method, and inside the context."""
    return (
        {"custom_generate": lossless(model, fixed(), gamma=3)},
        {"context": lossless(model, fixed(), gamma=3)},
    )


def test_generate_has_the_arguments_that_are_looked_up_in_its_frame():
    arguments = inspect.signature(GenerationMixin.generate).parameters
    assert {"streamer", "assistant_model", "synced_gpus", "generation_config"} <= set(arguments)


def test_a_streamer_given_to_generate_sees_what_generate_would_show_it(model, tokenizer):
    stock = Recorder()
    answer(model, tokenizer, streamer=stock)
    for way in both_ways(model):
        ours = Recorder()
        answer(model, tokenizer, streamer=ours, **way)
        assert ours.values == stock.values
        assert ours.ended == stock.ended == 1


@pytest.mark.parametrize("way", [0, 1], ids=["decoding method", "context"])
def test_an_iterator_in_another_thread_ends_with_the_text_of_generate(model, tokenizer, way):
    texts = []
    for options in ({}, both_ways(model)[way]):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20.0)
        thread = threading.Thread(target=answer, args=(model, tokenizer), kwargs={"streamer": streamer, **options})
        thread.start()
        texts.append("".join(streamer))
        thread.join()
    assert texts[0] == texts[1] != ""


def test_a_text_streamer_prints_what_generate_prints(model, tokenizer, capsys):
    printed = []
    for options in ({}, *both_ways(model)):
        answer(model, tokenizer, streamer=TextStreamer(tokenizer, skip_prompt=True), **options)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2] != ""


class FailsAfter(LogitsProcessor):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > self.length:
            raise RuntimeError("stop")
        return scores


def test_a_streamer_is_left_as_generate_leaves_it_when_generate_fails(model, tokenizer):
    """Its tokens so far are there, its end is not."""
    left = []
    for options in ({}, *both_ways(model)):
        streamer = TextIteratorStreamer(tokenizer, timeout=0.05)
        processors = LogitsProcessorList([FailsAfter(tokenizer(TEXT, return_tensors="pt").input_ids.shape[1] + 5)])
        with pytest.raises(RuntimeError, match="stop"):
            answer(model, tokenizer, streamer=streamer, logits_processor=processors, **options)
        left.append(list(streamer.text_queue.queue))
        with pytest.raises(Empty):
            list(streamer)
    assert left[0] == left[1] == left[2]


def test_the_streamer_of_the_decoder_serves_calls_without_one(model, tokenizer):
    stock, ours = Recorder(), Recorder()
    answer(model, tokenizer, streamer=stock)
    decoder = lossless(model, fixed(), streamer=ours)
    answer(model, tokenizer, custom_generate=decoder)
    assert ours.values == stock.values
    answer(model, tokenizer, custom_generate=decoder, streamer=ours)
    assert ours.values == stock.values * 2, "the same one twice is one"
    with pytest.raises(ValueError, match="different streamers"):
        answer(model, tokenizer, custom_generate=decoder, streamer=Recorder())


def stop_string(model, tokenizer):
    """Text that ends the answer after some tokens."""
    prompt_length = tokenizer(TEXT, return_tensors="pt").input_ids.shape[1]
    tokens = answer(model, tokenizer)[0, prompt_length:]
    return next(text for i in range(4, 12) if len(text := tokenizer.decode(tokens[i : i + 2])) > 1 and text.isascii())


@pytest.mark.parametrize("where", ["argument", "generation config", "config of the model"])
def test_stop_strings_stop_inside_the_context(model, tokenizer, where, monkeypatch):
    strings = [stop_string(model, tokenizer)]
    options = {"tokenizer": tokenizer}
    if where == "argument":
        options["stop_strings"] = strings
    elif where == "generation config":
        options["generation_config"] = copy.deepcopy(model.generation_config)
        options["generation_config"].stop_strings = strings
    else:
        monkeypatch.setattr(model.generation_config, "stop_strings", strings)
    expected = answer(model, tokenizer, **options)
    method, context = both_ways(model)
    assert torch.equal(answer(model, tokenizer, **options, **context), expected)
    with pytest.raises(ValueError, match=r"stop_strings needs a tokenizer.*with lossless.*StopStringCriteria") as error:
        answer(model, tokenizer, **options, **method)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, strings)])
    assert torch.equal(answer(model, tokenizer, stopping_criteria=criteria, **method), expected)
    assert expected.shape[1] < answer(model, tokenizer).shape[1]


def test_stop_strings_without_a_tokenizer_are_refused_inside_the_context_as_by_generate(model, tokenizer):
    with pytest.raises(ValueError, match="must pass the model's tokenizer"):
        answer(model, tokenizer, stop_strings=["a"], context=lossless(model, fixed()))


def test_token_healing_heals_inside_the_context(model, tokenizer):
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = padding.eos_token
    healing = {"token_healing": True, "tokenizer": padding}
    method, context = both_ways(model)
    assert torch.equal(answer(model, tokenizer, **healing, **context), answer(model, tokenizer, **healing))
    with pytest.raises(ValueError, match="token_healing needs a tokenizer"):
        answer(model, tokenizer, **healing, **method)


def test_a_pipeline_inside_the_context_gives_the_text_of_the_full_model(model, tokenizer):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    stop = stop_string(model, tokenizer)
    for options in ({"max_new_tokens": 12}, {"max_new_tokens": 12, "stop_sequence": stop}):
        expected = pipe(TEXT, do_sample=False, pad_token_id=0, **options)
        with lossless(model, fixed(), gamma=3) as decoder:
            assert pipe(TEXT, do_sample=False, pad_token_id=0, **options) == expected
        assert decoder.statistics.requests == 1
        assert decoder.statistics.draft_forwards > 0


def test_a_pipeline_streams_inside_the_context(model, tokenizer):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    stock, ours = Recorder(), Recorder()
    pipe(TEXT, do_sample=False, max_new_tokens=9, pad_token_id=0, streamer=stock)
    with lossless(model, fixed(), gamma=3):
        pipe(TEXT, do_sample=False, max_new_tokens=9, pad_token_id=0, streamer=ours)
    assert ours.values == stock.values
    assert ours.ended == 1


@pytest.mark.parametrize("fails", [False, True], ids=["after success", "after an exception"])
def test_the_context_restores_the_model_exactly(fails):
    model = random_model("llama")
    (prompt,) = random_prompts([7])
    expected = generated(model, prompt)
    model.generate = model.generate  # an attribute of its own, as other libraries set it
    before, own = instance_state(model), model.__dict__["generate"]
    with pytest.raises(RuntimeError, match="stop") if fails else torch.no_grad(), lossless(model, fixed()) as decoder:
        assert torch.equal(generated(model, prompt), expected)
        if fails:
            raise RuntimeError("stop")
    assert decoder.statistics.requests == 1
    assert model.__dict__["generate"] is own
    assert instance_state(model) == before
    assert torch.equal(generated(model, prompt), expected)
    assert decoder.statistics.requests == 1


@pytest.mark.parametrize("outer", ["skipping", "lossless"])
def test_skipping_and_lossless_cannot_be_entered_over_each_other_and_leave_the_model_as_it_was(outer):
    model = random_model("llama")
    contexts = {"skipping": lambda: skipping(model, fixed()), "lossless": lambda: lossless(model, fixed())}
    (prompt,) = random_prompts([9])
    stock, before = generated(model, prompt), instance_state(model)
    (other,) = contexts.keys() - {outer}
    with contexts[outer](), pytest.raises(ValueError, match=r"the model is (already )?inside"):
        contexts[other]().__enter__()
    assert instance_state(model) == before
    assert torch.equal(generated(model, prompt), stock)
    for make in contexts.values():
        with make():
            generated(model, prompt)


def test_contexts_do_not_nest():
    model = MODELS["llama"]
    (prompt,) = random_prompts([5])
    with lossless(model, fixed()) as decoder:
        with pytest.raises(ValueError, match="do not nest"), decoder:
            pass
        with pytest.raises(ValueError, match="do not nest"), lossless(model, fixed()):
            pass
        with pytest.raises(ValueError, match="leave custom_generate out"):
            generated(model, prompt, lossless(model, fixed()))
        assert torch.equal(generated(model, prompt, decoder), generated(model, prompt))
    assert "generate" not in model.__dict__


def test_inside_the_context_the_model_is_not_copied():
    """A copy would decode by the original for ever."""
    model = random_model("llama", num_layers=4)
    with lossless(model, fixed()) as decoder:
        for copied in (lambda: copy.deepcopy(model), lambda: pickle.dumps(model), lambda: copy.deepcopy(decoder)):
            with pytest.raises(ValueError, match="copy or pickle it outside of the context"):
                copied()
    copy.deepcopy(model)


def test_continuous_batching_is_refused_inside_the_context():
    model = MODELS["llama"]
    with lossless(model, fixed()), pytest.raises(ValueError, match="paged"):
        generated(model, random_prompts([5])[0], cache_implementation="paged")


def test_a_call_from_elsewhere_than_generate_is_refused():
    """Whether it had a streamer cannot be told, and one that waits would wait for ever."""
    model = MODELS["llama"]
    with pytest.raises(ValueError, match="called by the generate method of transformers"):
        lossless(model, fixed())(model, random_prompts([5])[0][None], None, None, model.generation_config)


def test_the_signature_of_a_decoder_can_be_asked_for():
    assert "input_ids" in inspect.signature(lossless(MODELS["llama"], fixed())).parameters
    inspect.signature(type(lossless(MODELS["llama"], fixed())))
