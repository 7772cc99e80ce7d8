"""Where the decoder layers are, which layer of the cache each fills, and what is said of models without any."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from adaskip.core.blocks import UnsupportedModelError, cache_slots, execution_device, find_decoder, find_structure
from tests.families import random_model

SMALL = {"vocab_size": 61, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}


@pytest.mark.parametrize(
    ("model_class", "config", "match"),
    [
        (GPT2LMHeadModel, GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=61),
         r"GPT2LMHeadModel has no list of decoder layers named `layers`, only transformer.h \(2 GPT2Block\)"),
        (BertLMHeadModel, BertConfig(**SMALL, num_attention_heads=2, is_decoder=True),
         r"only bert.encoder.layer \(2 BertLayer\)"),
        (MambaForCausalLM, MambaConfig(**SMALL, state_size=4), r"MambaBlock has parts \['mixer', 'norm'\]"),
        (T5ForConditionalGeneration, T5Config(vocab_size=61, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2),
         "T5ForConditionalGeneration is an encoder-decoder model"),
        (BartForConditionalGeneration,
         BartConfig(vocab_size=61, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8,
                    encoder_attention_heads=2, decoder_attention_heads=2),
         "BartForConditionalGeneration is an encoder-decoder model"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_a_model_without_decoder_layers_is_told_what_it_has(model_class, config, match):
    with pytest.raises(UnsupportedModelError, match=match):
        find_structure(model_class(config).eval())


def test_a_module_without_any_list_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"Linear has no list .*nor any other list of modules"):
        find_decoder(nn.Linear(2, 2))


def test_a_get_decoder_that_fails_is_refused():
    model = random_model("llama")

    def fails():
        raise NotImplementedError

    model.get_decoder = fails
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no decoder: get_decoder\(\) raises Not"):
        find_decoder(model)


@pytest.mark.parametrize("name", ["language_model", "text_model", "model"])
def test_the_decoder_is_found_inside_of_wrappers(name):
    inner = random_model("llama")
    outer = nn.Module()
    setattr(outer, name, inner)
    outermost = nn.Module()
    outermost.model = outer
    assert find_decoder(outermost) is inner.model


def test_wrappers_that_refer_to_each_other_end():
    one, other = nn.Module(), nn.Module()
    one.model = other
    other.__dict__["model"] = one
    with pytest.raises(UnsupportedModelError, match="has no list of decoder layers"):
        find_decoder(one)


def test_cache_slots_are_the_indices_of_the_attention():
    layers = random_model("llama").model.layers
    assert cache_slots(layers) == (0, 1, 2, 3)
    assert cache_slots(layer for i, layer in enumerate(layers) if i != 1) == (0, 2, 3)
    for layer in layers:
        del layer.self_attn.layer_idx
    assert cache_slots(layers[:2]) == (0, 1)


@pytest.mark.parametrize("index", [-1, 1.0, True, "1", torch.tensor(1)], ids=repr)
def test_an_index_that_is_none_is_refused(index):
    layers = random_model("llama").model.layers
    layers[1].self_attn.layer_idx = index
    with pytest.raises(UnsupportedModelError, match=r"LlamaDecoderLayer at position 1 has layer_idx .* not an index"):
        cache_slots(layers)


def test_one_index_of_two_layers_is_refused_by_their_positions():
    model = random_model("llama")
    model.model.layers[3].self_attn.layer_idx = 1
    with pytest.raises(UnsupportedModelError, match="at positions 1 and 3 have the same layer_idx 1"):
        cache_slots(model.model.layers)
    with pytest.raises(UnsupportedModelError, match="at positions 1 and 3 have the same layer_idx 1"):
        find_structure(model)


def test_a_module_without_weights_has_no_device():
    with pytest.raises(ValueError, match="Identity has no weights"):
        execution_device(nn.Identity())
