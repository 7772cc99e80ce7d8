"""Exports for transformers give the tokens of `skipping`, and are there whole or not at all."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from adaskip.core.context import skipping
from adaskip.core.plan import SkipPlan, Sublayer
from adaskip.engines.checkpoint import save_in_memory
from adaskip.engines.export import export_to
from adaskip.engines.loading import load_without, read_config
from adaskip.engines.registry import Export
from adaskip.strategies import FixedPlan
from tests.families import random_model, random_prompts

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "granite", "gemma2"]
PLANS = {
    "attention": SkipPlan.of_sublayers({Sublayer("attention", 1): 1.3, Sublayer("attention", 2): 0.9}),
    "ffn": SkipPlan.of_sublayers({Sublayer("ffn", 0): 2.5, Sublayer("ffn", 3): 0.8}),
    "both": SkipPlan.of_sublayers({Sublayer("attention", 2): 1.1, Sublayer("ffn", 1): 1.2, Sublayer("ffn", 2): 0.9}),
    "layer 0": SkipPlan.of_sublayers({Sublayer("attention", 0): 1.4}),
    "no scales": SkipPlan(frozenset({0, 3}), frozenset({1})),
    "whole layers": SkipPlan.of_layers([0, 2]),
    "whole layers, scaled": SkipPlan.of_sublayers({Sublayer("attention", 1): 1.3, Sublayer("ffn", 1): 1.1}),
}


def export_of(model, plan, folder) -> Export:
    source = save_in_memory(model, None, folder)
    return Export(FixedPlan(num_layers=model.config.num_hidden_layers, plan=plan), source)


def loaded(folder, model):
    attention = {"attn_implementation": model.config._attn_implementation}
    if "adaskip" in json.loads((folder / "config.json").read_text()):
        return load_without(folder, *read_config(folder), **attention)
    return AutoModelForCausalLM.from_pretrained(folder, **attention)


def tokens(model, prompt):
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(prompt, **options)[0].tolist()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_model_gives_the_tokens_of_the_plan(family, name, tmp_path):
    model, plan = random_model(family), PLANS[name]
    report = export_to("hf", export_of(model, plan, tmp_path / "source"), tmp_path / "out")
    assert report["verified"]["distance"] <= report["verified"]["limit"]
    exported = loaded(tmp_path / "out", model)
    for prompt in random_prompts([9, 14]):
        with skipping(model, FixedPlan(num_layers=4, plan=plan)):
            expected = tokens(model, prompt[None])
        assert tokens(exported, prompt[None]) == expected
