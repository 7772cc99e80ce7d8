"""Options of `generate`, given or in the model's generation config: what stock gives, or one line before the prompt."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CompileConfig,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from adaskip.speculative import lossless
from tests.families import COMMON, WINDOW, random_model, random_prompts
from tests.unit.test_lossless import MODELS, fixed, generated

(PROMPT,) = random_prompts([9])
NINE = torch.arange(9)[None]

EQUAL = {
    "positions": {"position_ids": NINE + 3},
    "left pads": {"attention_mask": (NINE >= 3).long()},
    "pads in between": {"attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 1]])},
    "right pads": {"attention_mask": (NINE < 7).long()},
    "mask of floats": {"attention_mask": (NINE >= 3).float()},
    "mask of booleans": {"attention_mask": NINE >= 3},
    "chunks of one token": {"prefill_chunk_size": 1},
    "a cache without a config": {"past_key_values": DynamicCache()},
    "compile_config": {"compile_config": CompileConfig(backend="eager")},
    "max_time": {"max_time": 1000.0},
    "logits_to_keep": {"logits_to_keep": 3},
    "low_memory": {"low_memory": True},
    "end tokens in a tensor": {"eos_token_id": torch.tensor([3, 5, 9])},
    "forced first token": {"forced_bos_token_id": 5},
    "one token": {"max_new_tokens": 1},
    "dynamic": {"cache_implementation": "dynamic"},
}


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("options", EQUAL.values(), ids=EQUAL.keys())
def test_options_act_as_in_generate(family, options):
    model = MODELS[family]
    expected = generated(model, PROMPT, **copy.deepcopy(options))
    assert torch.equal(generated(model, PROMPT, lossless(model, fixed(), gamma=3), **copy.deepcopy(options)), expected)
    with lossless(model, fixed(), gamma=3):
        assert torch.equal(generated(model, PROMPT, **copy.deepcopy(options)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 20},
        {"max_new_tokens": 9},
        {"max_new_tokens": 9, "repetition_penalty": 1.5},
        {"input_ids": PROMPT[None]},
    ],
    ids=["max_length", "max_new_tokens", "penalty", "ids, too"],
)
def test_prompts_of_embeddings_with_every_way_to_say_the_length(options):
    model = MODELS["llama"]
    given = {"inputs_embeds": model.get_input_embeddings()(PROMPT[None]), "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**given, **options)
    assert torch.equal(model.generate(**given, **options, custom_generate=lossless(model, fixed(), gamma=3)), expected)


REFUSED = {
    "assistant_model": ({"assistant_model": random_model("llama", num_layers=1)}, "leave assistant_model out"),
    "assistant_early_exit": ({"assistant_early_exit": 2}, "got assisted_generation"),
    "synced_gpus": ({"synced_gpus": True}, "synced_gpus"),
    "dola_layers": ({"dola_layers": "low"}, "got dola_generation"),
    "penalty_alpha": ({"penalty_alpha": 0.5, "top_k": 4}, "got contrastive_search"),
    "a generation config": ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache=True"),
    "offloaded": ({"cache_implementation": "offloaded"}, "DynamicCache with offloading"),
}


def refusing(model, message, decoder, **options):
    """The refusal is one line, and neither the prompt nor anything else was run."""
    ran = []
    hook = model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(ValueError, match=message) as error:
            generated(model, PROMPT, decoder, **options)
    finally:
        hook.remove()
    assert "\n" not in str(error.value)
    assert not ran


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_options_that_cannot_be_verified_are_refused_before_the_prompt(options, message, monkeypatch):
    monkeypatch.setattr(torch, "Stream", lambda: None)  # an offloaded cache makes one, which needs a driver
    model = MODELS["llama"]
    refusing(model, message, lossless(model, fixed()), **options)
    with lossless(model, fixed()):
        refusing(model, message, None, **options)
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("use_cache", False, "use_cache=True"),
        ("prompt_lookup_num_tokens", 2, "got assisted_generation"),
        ("assistant_early_exit", 2, "got assisted_generation"),
        ("num_beams", 2, "got beam_search"),
        ("cache_implementation", "static", "got StaticCache"),
        ("stop_strings", ["a"], "stop_strings needs a tokenizer"),
        ("guidance_scale", 1.5, None),
        ("repetition_penalty", 1.5, None),
    ],
)
def test_the_models_generation_config_counts_as_if_it_were_given(name, value, message, monkeypatch):
    model = MODELS["llama"]
    monkeypatch.setattr(model.generation_config, name, value)
    decoder = lossless(model, fixed(), gamma=3)
    if message is not None:
        refusing(model, message, decoder)
    else:
        assert torch.equal(generated(model, PROMPT, decoder), generated(model, PROMPT))


class NewestFirst(DynamicCache):
    """A cache of the user's own: what it does with tokens nobody knows."""


def test_a_cache_of_the_users_own_class_is_refused():
    model = MODELS["llama"]
    refusing(model, "got NewestFirst", lossless(model, fixed()), past_key_values=NewestFirst(config=model.config))


TEXT = {key: value for key, value in COMMON.items() if key != "tie_word_embeddings"} | {"num_hidden_layers": 4}
VISION = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 8, "patch_size": 4, "num_channels": 3},
}
IMAGE = 60


def gemma3():
    kinds = ["sliding_attention", "full_attention"] * 2
    text = Gemma3TextConfig(**TEXT, head_dim=4, sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=4)
    tokens = {"image_token_index": IMAGE, "mm_tokens_per_image": 4, "boi_token_index": 59, "eoi_token_index": 58}
    config = Gemma3Config(text_config=text, vision_config=SiglipVisionConfig(**VISION), **tokens)
    return Gemma3ForConditionalGeneration(config)


def llava():
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_index=IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("make", [gemma3, llava])
def test_prompts_with_an_image(make):
    """Gemma 3 marks its tokens by `token_type_ids`, of as many values as there are tokens."""
    model, generator = make().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1.0 + 0.1 * noise)
    ids = torch.tensor([5, 6, IMAGE, IMAGE, IMAGE, IMAGE, 7, 8, 9])
    inputs = {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator), "eos_token_id": None}
    inputs["attention_mask"] = torch.ones_like(ids)[None]
    if make is gemma3:
        inputs["token_type_ids"] = (ids == IMAGE).long()[None]
    expected = generated(model, ids, **inputs)
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    assert torch.equal(generated(model, ids, lossless(model, fixed(), gamma=3), **inputs), expected)
    inputs["pixel_values"] = -inputs["pixel_values"]
    assert not torch.equal(generated(model, ids, **inputs), expected), "the image matters"


def test_arguments_with_a_value_a_token_grow_as_transformers_lets_them():
    """`token_type_ids` of a text model, which nobody but the model's own preparation reads."""
    model, seen = random_model("llama"), []
    stock = model.prepare_inputs_for_generation
    kinds = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0, 1]])

    def prepare_inputs_for_generation(input_ids, token_type_ids=None, mm_token_type_ids=None, **kwargs):
        seen.append((input_ids.shape[1], token_type_ids.tolist(), mm_token_type_ids.tolist()))
        return stock(input_ids, **kwargs)

    model.prepare_inputs_for_generation = prepare_inputs_for_generation
    given = {"token_type_ids": kinds, "mm_token_type_ids": kinds, "eos_token_id": None}
    generated(model, PROMPT, **given)
    expected = {length: rest for length, *rest in seen}
    seen.clear()
    generated(model, PROMPT, lossless(model, fixed(), gamma=3), **given)
    assert len(seen) > 16
    assert all(rest == expected[length] for length, *rest in seen)
