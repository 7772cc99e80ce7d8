"""Lossless mode on wrapped, adapted, copied and compiled models, and with several threads."""

from __future__ import annotations

import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from adaskip.core.context import skipping
from adaskip.speculative import lossless
from tests.families import random_model, random_prompts
from tests.unit.test_lossless import MODELS, fixed, generated
from tests.unit.test_skipping_generate import instance_state


class Adapter(nn.Module):
    """A wrapper as PEFT makes them: it changes weights of the model inside and generates by that model."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model
        self.active_peft_config = SimpleNamespace(is_prompt_learning=False)

    def get_base_model(self):
        return self.base_model

    def generate(self, *args, **kwargs):
        weight = self.base_model.model.layers[0].self_attn.q_proj.weight
        with torch.no_grad():
            weight.mul_(-1.0)
            try:
                return self.base_model.generate(*args, **kwargs)
            finally:
                weight.mul_(-1.0)


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


WRAPPERS = {
    "adapter": Adapter,
    "PEFT": lora,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "adapter, compiled": lambda model: Adapter(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("made_for", ["wrapper", "model"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_generate_of_a_wrapper_decodes_losslessly(wrap, made_for):
    model = random_model("llama")
    (prompt,) = random_prompts([9])
    alone = generated(model, prompt, eos_token_id=None)
    wrapper = wrap(model)
    expected = generated(wrapper, prompt, eos_token_id=None)
    decoder = lossless(wrapper if made_for == "wrapper" else model, fixed(), gamma=3)
    assert torch.equal(generated(wrapper, prompt, decoder, eos_token_id=None), expected)
    with decoder:
        assert torch.equal(generated(wrapper, prompt, eos_token_id=None), expected)
    assert decoder.statistics.requests == 2
    assert decoder.statistics.draft_forwards > 0
    if isinstance(wrapper, Adapter):
        assert not torch.equal(expected, alone), "the adapter matters"
        assert torch.equal(generated(model, prompt, decoder, eos_token_id=None), alone)


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match="DataParallel runs copies of the model"):
        lossless(nn.DataParallel(MODELS["llama"]), fixed())


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel cannot generate"):
        lossless(MODELS["llama"].model, fixed())


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"peft_type": "LORA", "alora_invocation_tokens": [5, 6]}, "adapter 'first' is activated LoRA"),
        ({"peft_type": SimpleNamespace(value="XLORA")}, "adapter 'first' is XLORA"),
        ({"peft_type": "LORA", "alora_invocation_tokens": None}, None),
    ],
    ids=["activated LoRA", "X-LoRA", "LoRA"],
)
def test_adapters_that_see_a_forward_as_a_whole_are_refused(config, refused):
    """Found on the model inside, where PEFT and transformers both note them."""
    model = random_model("llama")
    (prompt,) = random_prompts([5])
    model.peft_config = {"first": SimpleNamespace(**config)}
    if refused is None:
        generated(model, prompt, lossless(model, fixed()))
        return
    with pytest.raises(ValueError, match=refused) as error:
        generated(model, prompt, lossless(model, fixed()))
    assert "\n" not in str(error.value)


def test_activated_lora_of_peft_is_refused():
    peft = pytest.importorskip("peft")
    model = random_model("llama")
    (prompt,) = random_prompts([9])
    invoked = {"alora_invocation_tokens": prompt[-3:-1].tolist()}
    wrapper = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **invoked)
    ).eval()
    with pytest.raises(ValueError, match="activated LoRA"):
        generated(wrapper, prompt, lossless(wrapper, fixed()))


def test_a_model_that_changes_its_arguments_in_a_way_of_its_own_is_refused(monkeypatch):
    model = random_model("llama")

    class Special(type(model)):
        def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
            return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    model.__class__ = Special
    with pytest.raises(ValueError, match="Special updates its arguments after every token"):
        generated(model, random_prompts([5])[0], lossless(model, fixed()))


def test_the_state_of_the_model_counts_at_the_call():
    model = random_model("llama")
    (prompt,) = random_prompts([5])
    decoder = lossless(model, fixed())
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        generated(model, prompt, decoder)
    model.eval()
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="was made for 4 layers, LlamaForCausalLM has 3"):
        generated(model, prompt, decoder)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda decoder: pickle.loads(pickle.dumps(decoder))])
def test_a_copy_of_a_decoder_decodes_for_its_copy_of_the_model(copied):
    model = random_model("llama")
    (prompt,) = random_prompts([9])
    expected = generated(model, prompt)
    decoder = lossless(model, fixed(), gamma=3)
    twin = copied(decoder)
    assert twin.model is not model
    assert torch.equal(generated(twin.model, prompt, twin), expected)
    assert twin.statistics.requests == 1
    assert decoder.statistics.requests == 0
    with skipping(twin.model, fixed()):  # it holds the layers of its own model
        assert torch.equal(generated(model, prompt, decoder), expected)
    with pytest.raises(ValueError, match="another model object"):
        generated(model, prompt, twin)


class Waits(StoppingCriteria):
    """Stands still in the middle of a draft's verification until it may go on."""

    def __init__(self, length):
        self.length, self.there, self.go_on = length, threading.Event(), threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == self.length:
            self.there.set()
            assert self.go_on.wait(30)
        return torch.zeros(1, dtype=torch.bool)


@pytest.mark.parametrize("form", ["decoding method", "context"])
def test_a_second_thread_is_refused_and_the_first_goes_on(form):
    model = random_model("llama")
    (prompt,) = random_prompts([9])
    expected = generated(model, prompt, eos_token_id=None)
    before = instance_state(model)
    decoder = lossless(model, fixed(), gamma=3)
    waits, answers = Waits(15), []

    def first():
        with torch.no_grad():
            options = {"stopping_criteria": StoppingCriteriaList([waits]), "eos_token_id": None}
            answers.append(generated(model, prompt, decoder if form == "decoding method" else None, **options))

    def run():
        thread = threading.Thread(target=first)
        thread.start()
        assert waits.there.wait(30)
        try:
            with pytest.raises(ValueError, match=r"already|thread") as error:
                generated(model, prompt, decoder if form == "decoding method" else None, eos_token_id=None)
            assert "\n" not in str(error.value)
        finally:
            waits.go_on.set()
            thread.join()

    if form == "context":
        with decoder:
            run()
    else:
        run()
    assert torch.equal(answers[0], expected)
    assert decoder.statistics.requests == decoder.last_request.requests == 1
    assert decoder.statistics.new_tokens == decoder.last_request.new_tokens == 15
    assert instance_state(model) == before
    assert torch.equal(generated(model, prompt, decoder, eos_token_id=None), expected)
