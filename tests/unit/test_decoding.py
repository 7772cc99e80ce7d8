"""Whatever a model's generation config says, measurements and scored answers are those of plain greedy decoding."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, WatermarkingConfig

from adaskip.calibration.divergence import OutputDivergence
from adaskip.calibration.measure import calibrate
from adaskip.calibration.select import select
from adaskip.core.decoding import OwnGenerationConfig, plain_generate
from adaskip.core.generate import generate
from adaskip.core.plan import SkipPlan
from adaskip.strategies import FixedPlan
from adaskip.studies.bench.timing import timed_generation
from tests.families import random_model, random_prompts

pytestmark = pytest.mark.usefixtures("short_answers")
SETTINGS = {
    "no cache": {"use_cache": False},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "several sequences of greedy search": {"num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": -2.0, "early_stopping": True},
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 7, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5},
    "renormalised": {"do_sample": True, "renormalize_logits": True, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    "repetition penalty": {"repetition_penalty": 1.9},
    "n-grams": {"no_repeat_ngram_size": 1},
    "suppressed tokens": {"suppress_tokens": list(range(3, 40)), "begin_suppress_tokens": list(range(40, 61))},
    "bad words": {"bad_words_ids": [[i] for i in range(3, 40)]},
    "forced tokens": {"forced_bos_token_id": 7, "forced_eos_token_id": 8},
    "least length": {"min_length": 40, "min_new_tokens": 30},
    "most length": {"max_length": 2, "max_new_tokens": 1, "max_time": 0.0},
    "stop strings": {"stop_strings": ["a"]},
    "guidance": {"guidance_scale": 3.0},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=20.0)},
    "bias": {"sequence_bias": [[[5], 50.0]], "exponential_decay_length_penalty": (1, 3.0)},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2},
    "early exit": {"assistant_early_exit": 1},
    "static cache": {"cache_implementation": "static"},
    "quantised cache": {"cache_implementation": "quantized"},
    "chunks": {"prefill_chunk_size": 3},
    "outputs": {"output_scores": True, "output_hidden_states": True, "return_dict_in_generate": True},
    "compiled": {"compile_config": CompileConfig(backend="no such backend"), "cache_implementation": "static"},
    "other tokens": {"pad_token_id": 5, "bos_token_id": 6},
    "healing": {"token_healing": True},
    "an entry of its own": {"temperature_schedule": [1, 2]},
}


def model_with(settings):
    """A model whose generation config holds these settings besides the end token."""
    model = random_model("llama")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


def measured(model):
    """What must not depend on the generation config: cosines, answers skipped or not, and a divergence."""
    prompts = random_prompts([9, 7])
    ends = {"eos_token_ids": [2], "pad_token_id": 0}
    profile = calibrate(model, prompts, phase="decode", max_new_tokens=8, batch_size=2)
    plan = SkipPlan(attention={1}, ffn={2})
    skips = FixedPlan(num_layers=4, plan=plan, phase="e2e")
    answers = [a.token_ids for s in (None, skips) for a in generate(model, s, prompts, max_new_tokens=8, **ends)]
    divergence = OutputDivergence(model, prompts, "decode", **ends)(plan)
    timed = timed_generation(model, None, prompts[0][None], 5, "wall")
    return profile.attention, profile.ffn, profile.tokens, answers, divergence, len(timed.steps_s)


@pytest.fixture(scope="module")
def plain():
    return measured(random_model("llama"))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_measurements_and_answers_do_not_depend_on_the_generation_config(settings, plain):
    model = model_with(settings)
    before = model.generation_config.to_dict()
    assert measured(model) == plain
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("settings", [{"use_cache": False}, {"output_hidden_states": True}])
def test_nor_on_what_the_models_config_says_of_outputs_and_cache(settings, plain):
    model = random_model("llama")
    for name, value in settings.items():
        setattr(model.config, name, value)
    assert measured(model) == plain


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_a_search_does_not_depend_on_the_generation_config(phase):
    def chosen(model):
        return select(model, random_prompts([9, 7]), phase, up_to=2, eos_token_ids=[2], pad_token_id=0).selected

    settings = {"use_cache": False, "do_sample": True, "num_return_sequences": 2, "repetition_penalty": 1.9}
    assert chosen(model_with(settings)) == chosen(random_model("llama"))


def test_end_tokens_still_come_from_the_generation_config():
    model, prompt = random_model("llama"), random_prompts([9])
    options = {"max_new_tokens": 8, "eos_token_ids": [], "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    (endless,) = generate(model, None, prompt, **options)
    assert len(endless.token_ids) == 8
    model.generation_config.eos_token_id = endless.token_ids[3]
    (ended,) = generate(model, None, prompt, **options)
    assert ended.token_ids == endless.token_ids[: endless.token_ids.index(endless.token_ids[3])]


def test_plain_generation_is_stock_generation_of_a_model_without_a_generation_config():
    model, prompt = random_model("llama"), random_prompts([9])[0][None]
    for asked in (
        {},
        {"do_sample": True},
        {"num_beams": 3},
        {"cache_implementation": "static", "disable_compile": True},
    ):
        options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "pad_token_id": 0, **asked}
        torch.manual_seed(0)
        stock = model.generate(prompt, generation_config=GenerationConfig(eos_token_id=2), **options)
        torch.manual_seed(0)
        assert torch.equal(plain_generate(model, input_ids=prompt, eos_token_id=2, **options), stock)


def test_the_copy_that_generate_makes_keeps_the_compile_config():
    config = OwnGenerationConfig(compile_config=CompileConfig(), suppress_tokens=[1])
    copied = copy.deepcopy(config)
    assert copied.compile_config is config.compile_config
    assert copied.suppress_tokens == [1]
    assert copied.suppress_tokens is not config.suppress_tokens
