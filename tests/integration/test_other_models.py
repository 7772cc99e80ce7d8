"""Quantised models, adapters and the language models inside of vision-language models: skipped as if the sublayers of
the plan put out zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from adaskip.core.blocks import find_structure
from adaskip.core.wrappers import unwrapped
from tests.families import random_model
from tests.integration.test_every_class import LAYERS, check_against_zeroed, tiny_model

WIDE = {"hidden_size": 64, "intermediate_size": 64}
VISION = (
    *("Gemma3Config", "Idefics3Config", "InternVLConfig", "LlavaConfig", "LlavaNextConfig", "Mistral3Config"),
    *("PaliGemmaConfig", "Qwen3VLConfig", "SmolVLMConfig", "VipLlavaConfig"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION)
def test_the_language_model_of_a_vision_language_model(name):
    config_class = next(each for each in AutoModelForImageTextToText._model_mapping if each.__name__ == name)
    model = tiny_model(config_class, AutoModelForImageTextToText)
    check_against_zeroed(model, find_structure(model))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_model_in_bitsandbytes_weights(kind):
    bnb = pytest.importorskip("bitsandbytes")
    model = random_model("llama", LAYERS, **WIDE)
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                sizes = (child.in_features, child.out_features)
                if kind == "int8":
                    layer = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                else:
                    layer = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4", compute_dtype=torch.float32)
                layer.load_state_dict(child.state_dict())
                setattr(parent, name, layer.to("cpu"))
    check_against_zeroed(model.eval(), find_structure(model))


def test_a_model_with_a_lora_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(random_model("llama", LAYERS), config).eval()
    inner = unwrapped(model)
    check_against_zeroed(inner, find_structure(inner))
