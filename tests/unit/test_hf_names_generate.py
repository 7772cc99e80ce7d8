"""Each private name of transformers' `generate` does what the library takes it to do."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache

from adaskip.common.optional import UnsupportedReleaseError
from adaskip.core import hf
from adaskip.core.decoding import OwnGenerationConfig
from tests.families import random_model, random_prompts


def tiny(family: str = "llama", num_layers: int = 1) -> Any:
    return random_model(family, num_layers=num_layers)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(num_layers=2)


def parameters_of(owner, name: str) -> list[str]:
    return list(inspect.signature(getattr(owner, name)).parameters)


def test_generate_takes_its_steps_by_the_methods_that_are_replaced():
    given = {
        hf.NEXT_STEP: ["input_ids", "next_sequence_length", hf.CACHE, "is_first_iteration"],
        hf.COMPILED_STEPS: ["compile_config"],
        hf.CANDIDATES: ["generation_config", "assistant_model"],
        hf.STOPPING: ["generation_config", "stopping_criteria", "tokenizer"],
        hf.HEALING: ["input_ids", "tokenizer"],
    }
    for name, needed in given.items():
        assert set(needed) <= set(parameters_of(tiny(), name)), name


def test_a_release_that_passes_the_cache_in_another_argument_is_refused(monkeypatch):
    monkeypatch.setattr(GenerationMixin, hf.NEXT_STEP, lambda self, input_ids, memory=None: None)
    spec = importlib.util.spec_from_file_location("another_hf", hf.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(UnsupportedReleaseError, match=r"passes the KV cache in another argument.*works with"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_cache_may_be_given_by_its_old_name():
    model, cache = tiny(), DynamicCache()
    ids = torch.tensor([[3, 4]])
    model(ids, **{hf.OLD_CACHE: cache}, use_cache=True)
    assert cache.get_seq_length() == 2, "models of this release still accept it"
    assert hf.with_cache_name({hf.OLD_CACHE: cache, "use_cache": True}) == {hf.CACHE: cache, "use_cache": True}
    assert hf.with_cache_name({"use_cache": True}) == {"use_cache": True}


def test_generate_reads_a_prompt_by_one_method(monkeypatch):
    model = tiny()
    calls = noted(model, monkeypatch, hf.PREFILL)
    (ids,) = random_prompts([5])
    model.generate(ids[None], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert len(calls) == 1


def test_some_method_serves_many_requests_from_one_cache(model):
    assert any(hasattr(model, name) for name in hf.CONTINUOUS_BATCHING)


def noted(model, monkeypatch, name: str) -> list[dict]:
    """The keywords of each call of a method of the model."""
    stock, calls = getattr(model, name), []

    def note(*args, **kwargs):
        calls.append(dict(inspect.signature(stock).bind(*args, **kwargs).arguments))
        return stock(*args, **kwargs)

    monkeypatch.setitem(model.__dict__, name, note)
    return calls


def test_generate_prepares_each_step_and_says_which_reads_the_prompt(monkeypatch):
    model = tiny()
    calls = noted(model, monkeypatch, hf.NEXT_STEP)
    (ids,) = random_prompts([5])
    model.generate(ids[None], max_new_tokens=3, do_sample=False, eos_token_id=None)
    reads = [call.get("is_first_iteration") or call.get("next_sequence_length") is None for call in calls]
    assert reads == [True, False, False]
    assert all(isinstance(call[hf.CACHE], Cache) for call in calls)


def test_assisted_decoding_alone_begins_with_its_candidates(monkeypatch):
    model = tiny()
    calls = noted(model, monkeypatch, hf.CANDIDATES)
    (ids,) = random_prompts([5])
    model.generate(ids[None], max_new_tokens=3, do_sample=False)
    assert calls == []
    model.generate(ids[None], max_new_tokens=3, do_sample=False, prompt_lookup_num_tokens=2)
    assert len(calls) == 1
    assert isinstance(calls[0]["generation_config"], GenerationConfig)


def test_a_static_cache_is_decoded_by_the_compiled_call_on_any_device_if_asked(monkeypatch):
    model, calls = tiny(), []
    monkeypatch.setitem(model.__dict__, hf.COMPILED_STEPS, lambda config: calls.append(config) or model.__call__)
    (ids,) = random_prompts([5])
    config = CompileConfig()
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "eos_token_id": None}
    model.generate(ids[None], **options, compile_config=config)
    assert len(calls) == torch.cuda.is_available()
    calls.clear()
    ours = hf.on_any_device(config)
    model.generate(ids[None], **options, compile_config=ours)
    assert calls
    assert ours is not config
    assert not config._compile_all_devices
    assert "_compile_all_devices" not in ours.to_dict()  # torch.compile would not take it


def test_the_prefill_reads_the_whole_prompt_into_the_cache():
    model = tiny()
    assert parameters_of(model, "_prefill")[:3] == ["input_ids", "generation_config", "model_kwargs"]
    (ids,) = random_prompts([5])
    for chunk in (None, 2):
        cache = DynamicCache(config=model.config)
        kwargs = {hf.CACHE: cache, "use_cache": True, "attention_mask": torch.ones(1, 5, dtype=torch.long)}
        config = GenerationConfig(prefill_chunk_size=chunk)
        with torch.no_grad():
            output = hf.prefill(model, ids[None], config, kwargs)
            expected = model(ids[None]).logits[:, -1]
        assert cache.get_seq_length() == 5
        torch.testing.assert_close(output.logits[:, -1], expected)


def test_a_model_that_changes_its_arguments_itself_is_told_by_its_class(model):
    class Own(type(model)):
        def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
            raise AssertionError("called after every token")

    assert not hf.changes_arguments(model)
    own = Own(model.config).eval()
    assert hf.changes_arguments(own)
    (ids,) = random_prompts([5])
    with pytest.raises(AssertionError, match="called after every token"):
        own.generate(ids[None], max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "pad"), [({"pad_token_id": 5}, 5), ({"pad_token_id": None, "eos_token_id": [7, 8]}, 7)]
)
def test_the_pad_token_of_a_prepared_config_is_the_one_that_generate_appends(model, options, pad):
    found = []

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        found.append(hf.pad_token_of(generation_config))
        return input_ids

    (ids,) = random_prompts([5])
    model.generate(ids[None], max_new_tokens=2, custom_generate=decode, **options)
    assert found == [pad]


def test_stopping_criteria_are_made_with_the_tokenizer_and_tokens_healed_by_it():
    mixin: Any = GenerationMixin
    source = inspect.getsource(inspect.unwrap(mixin.generate))
    assert f"self.{hf.HEALING}(" in source
    assert f"self.{hf.STOPPING}(" in source


def test_a_custom_decoding_method_finds_what_generate_keeps_from_it(model):
    found: list[dict] = []
    streamer = SimpleNamespace(put=lambda value: None, end=lambda: None)

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        found.append(hf.generate_arguments() or {})
        return input_ids

    (ids,) = random_prompts([5])
    model.generate(ids[None], max_new_tokens=2, custom_generate=decode, streamer=streamer)
    assert found[0].keys() >= hf.GENERATE_LOCALS
    assert found[0]["streamer"] is streamer
    assert found[0]["assistant_model"] is None
    assert hf.generate_arguments() is None


def test_generate_merges_the_models_config_by_the_one_update_that_allows_custom_entries(model):
    assert {"defaults_only", "allow_custom_entries"} <= set(parameters_of(GenerationConfig, "update"))
    sampling = copy.deepcopy(model.generation_config)
    sampling.do_sample, sampling.temperature, sampling.top_k = True, 2.5, 7
    before, model.generation_config = model.generation_config, sampling
    try:
        merged, _ = model._prepare_generation_config(GenerationConfig(max_new_tokens=2))
        ours, _ = model._prepare_generation_config(OwnGenerationConfig(max_new_tokens=2))
    finally:
        model.generation_config = before
    assert (merged.temperature, merged.top_k) == (2.5, 7)
    assert (ours.temperature, ours.top_k) != (2.5, 7)
