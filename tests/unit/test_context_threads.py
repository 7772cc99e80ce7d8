"""Threads and a context: what each gets, and a `generate` that runs across its beginning or end."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from adaskip.calibration.divergence import OutputDivergence
from adaskip.calibration.measure import calibrate
from adaskip.core import patching
from adaskip.core.context import skipping
from adaskip.core.patching import ModelPatches, patches_of
from adaskip.core.plan import Budget, SkipPlan
from adaskip.strategies import SkipDecode
from tests.families import random_model, random_prompts
from tests.one_prompt import fixed, greedy, learning


def in_threads(functions):
    """What each of `functions` returned or raised, all run at once."""
    results: list = [None] * len(functions)

    def work(i):
        try:
            results[i] = functions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    return results


@pytest.fixture
def fast_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def schedule(model):
    return SkipDecode(num_layers=4, budget=Budget(layers=3), phase="decode", max_decode_steps=20)


@pytest.mark.parametrize(
    "make", [learning, schedule, lambda model: fixed("decode")], ids=["learn", "schedule", "fixed"]
)
def test_threads_get_what_each_would_alone(make, fast_switching):
    model = random_model("llama")
    strategy, prompts = make(model), random_prompts([9, 14, 5, 11])
    with skipping(model, strategy):
        alone = [greedy(model, prompt, 24) for prompt in prompts]
        for _ in range(2):
            got = in_threads([lambda prompt=prompt: greedy(model, prompt, 24) for prompt in prompts])
            assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))


def test_direct_calls_of_threads_do_not_mix(fast_switching):
    model, prompts = random_model("llama"), random_prompts([6, 9, 12])

    def steps(prompt):
        cache = model(prompt[None], use_cache=True).past_key_values
        return torch.cat([model(torch.tensor([[5 + i]]), past_key_values=cache).logits for i in range(30)])

    with torch.no_grad(), skipping(model, fixed("decode")):
        alone = [steps(prompt) for prompt in prompts]

        def quiet(prompt):
            with torch.no_grad():
                return steps(prompt)

        got = in_threads([lambda prompt=prompt: quiet(prompt) for prompt in prompts])
    assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))


class Meeting(LogitsProcessor):
    """Tells when the second token is being made, and waits until it may go on."""

    def __init__(self):
        self.reached, self.may_go_on, self.calls = threading.Event(), threading.Event(), 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 2:
            self.reached.set()
            assert self.may_go_on.wait(60)
        return scores


def running(model, prompt, meeting):
    results: list = []

    def work():
        try:
            results.append(greedy(model, prompt, logits_processor=LogitsProcessorList([meeting])))
        except ValueError as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert meeting.reached.wait(60)
    return thread, results


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no cache"])
def test_a_generate_that_outlives_its_context_is_refused_and_leaves_a_stock_model(options):
    model, prompt, meeting = random_model("llama"), random_prompts([9])[0], Meeting()
    stock = greedy(model, prompt)
    phase = "prefill" if options else "e2e"
    model.generation_config.use_cache = options.get("use_cache", True)
    with skipping(model, fixed(phase, SkipPlan(ffn={2}))):
        thread, results = running(model, prompt, meeting)
    assert torch.equal(greedy(model, prompt), stock), "another call in this thread is not concerned"
    with pytest.raises(ValueError, match="still running on this model"):
        skipping(model, fixed()).__enter__()
    meeting.may_go_on.set()
    thread.join(60)
    assert "ended while this generate was running" in str(results[0])
    assert not {"generate", "prepare_inputs_for_generation"} & vars(model).keys()
    assert "forward" not in vars(model.model)
    assert torch.equal(greedy(model, prompt), stock)
    model.generation_config.use_cache = True
    with skipping(model, fixed()):
        assert not torch.equal(greedy(model, prompt), stock)


class Channel:
    """A streamer as people read it from another thread: the last thing `generate` does is to end it."""

    def __init__(self):
        self.tokens, self.ended = [], threading.Event()

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended.set()


def test_the_context_may_be_left_as_soon_as_a_stream_has_ended():
    model, prompt = random_model("llama"), random_prompts([9])[0]
    with skipping(model, fixed()):
        expected = greedy(model, prompt)
    for _ in range(20):
        channel, results = Channel(), []
        thread = threading.Thread(target=lambda c=channel, r=results: r.append(greedy(model, prompt, streamer=c)))
        with skipping(model, fixed()):
            thread.start()
            assert channel.ended.wait(60)
        thread.join(60)
        assert torch.equal(results[0], expected)
        assert channel.tokens == expected[0].tolist()
    assert not {"generate", "prepare_inputs_for_generation"} & vars(model).keys()
    assert "forward" not in vars(model.model)


def test_a_generate_from_before_the_context_is_refused():
    model, prompt, meeting = random_model("llama"), random_prompts([9])[0], Meeting()
    thread, results = running(model, prompt, meeting)
    with skipping(model, fixed("decode", SkipPlan(ffn={2}))):
        alone = greedy(model, prompt)
        meeting.may_go_on.set()
        thread.join(60)
        assert "began before skipping" in str(results[0])
        assert torch.equal(greedy(model, prompt), alone)


def test_a_thread_may_generate_while_another_measures():
    """The patches work for the thread that measures, which also proves the layers; others run the stock layers."""
    prompts = random_prompts([9] * 40)
    stock, profile = greedy(random_model("llama"), prompts[0], 30), calibrate(random_model("llama"), prompts)
    model = random_model("llama")
    got, measured = in_threads([lambda: greedy(model, prompts[0], 30), lambda: calibrate(model, prompts)])
    assert torch.equal(got, stock)
    assert measured == profile


def run_first(monkeypatch, module, other):
    """From now on, each forward of `module` in this thread first runs `other` in another one."""
    stock, here = module.forward, threading.get_ident()

    def forward(*args, **kwargs):
        if threading.get_ident() == here:
            in_threads([other])
        return stock(*args, **kwargs)

    monkeypatch.setattr(module, "forward", forward)


def test_a_thread_gets_the_stock_model_while_another_proves_its_layers(monkeypatch):
    model, ids, got = random_model("llama"), random_prompts([9])[0][None], []
    stock = model(ids).logits
    run_first(monkeypatch, model.model.layers[1].mlp, lambda: got.append(model(ids).logits))
    patches_of(model)
    assert got
    assert all(torch.equal(logits, stock) for logits in got)


def test_a_thread_gets_the_stock_model_while_another_selects(monkeypatch):
    """Neither does it get hidden states that were kept, nor are its own kept."""
    model, (prompt, ids), got = random_model("llama"), random_prompts([9, 9]), []
    stock, plans = model(ids[None]).logits, [SkipPlan(ffn={3}), SkipPlan(attention={2}), SkipPlan(ffn={2})]
    options = {"eos_token_ids": [2], "pad_token_id": 0, "answers": [[5, 6]]}
    first, divergence = (OutputDivergence(model, [prompt], "prefill", **options) for _ in range(2))
    alone = [first(plan) for plan in plans]
    run_first(monkeypatch, model.model.layers[2].input_layernorm, lambda: got.append(model(ids[None]).logits))
    assert [divergence(plan) for plan in plans] == alone
    assert got
    assert all(torch.equal(logits, stock) for logits in got)


def test_one_thread_at_a_time_proves_the_layers(monkeypatch):
    model, probe, calls = random_model("llama"), patching.probe_layers, []

    def slow_probe(model):
        calls.append(model)
        time.sleep(0.05)
        return probe(model)

    monkeypatch.setattr(patching, "probe_layers", slow_probe)
    first, second = in_threads([lambda: patches_of(model)] * 2)
    assert isinstance(first, ModelPatches)
    assert first is second
    assert len(calls) == 1
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_a_thread_that_enters_meanwhile_does_not_have_the_layers_proved_again(monkeypatch):
    model, describe = random_model("llama"), patching._description
    patches, entered, leave = patches_of(model), threading.Event(), threading.Event()

    def enter():
        with patches.install():
            entered.set()
            leave.wait(60)

    def slow_description(layers):
        other.start()
        entered.wait(0.2)
        return describe(layers)

    other = threading.Thread(target=enter)
    monkeypatch.setattr(patching, "_description", slow_description)
    assert patches_of(model) is patches
    leave.set()
    other.join(60)
