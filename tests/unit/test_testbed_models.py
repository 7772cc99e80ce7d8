"""The committed models: small, shaped like their families, and as good as their cards say."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from adaskip import testbed
from dev.testbed_training.evaluate import evaluate
from dev.testbed_training.families import model_config
from dev.testbed_training.recipe import RECIPE
from dev.testbed_training.tokenizer import build_tokenizer
from dev.testbed_training.train import TRAINING_LOG, read_log

MEGABYTE = 1_000_000
SHAPED_LIKE = {"llama": ("llama3", 2, False), "internlm": ("dynamic", 4, True), "vicuna": ("linear", 4, False)}
PAPER_TASKS = ("multifieldqa_en", "triviaqa", "trec", "gov_report", "multi_news")


@pytest.mark.parametrize("family", testbed.FAMILIES)
def test_a_model_has_16_layers_and_less_than_8_megabytes(family):
    folder = testbed.checkpoint_dir(family)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 16
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8 * MEGABYTE


@pytest.mark.parametrize("family", testbed.FAMILIES)
def test_a_model_is_shaped_like_its_family(family):
    config = AutoConfig.from_pretrained(testbed.checkpoint_dir(family))
    rope, kv_heads, bias = SHAPED_LIKE[family]
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.rope_parameters["rope_type"] == rope
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, kv_heads)
    assert config.attention_bias is bias
    fresh = model_config(family, config.vocab_size)
    assert config.rope_parameters == fresh.rope_parameters
    assert config.intermediate_size == fresh.intermediate_size


@pytest.mark.parametrize("family", testbed.FAMILIES)
def test_a_model_carries_the_tokenizer_that_the_code_builds(family):
    built, saved = build_tokenizer(), AutoTokenizer.from_pretrained(testbed.checkpoint_dir(family))
    assert saved.get_vocab() == built.get_vocab()
    assert saved.padding_side == "left"
    text = testbed.records("triviaqa", limit=1)[0]["context"]
    assert saved(text)["input_ids"] == built(text)["input_ids"]


@pytest.mark.parametrize("family", testbed.FAMILIES)
def test_a_model_comes_with_its_card_and_the_log_of_the_whole_recipe(family):
    folder = testbed.checkpoint_dir(family)
    assert read_log(folder / TRAINING_LOG)[-1]["step"] == RECIPE.steps
    assert f"--family {family}" in (folder / "README.md").read_text()
    assert (folder / "curve.svg").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", testbed.FAMILIES)
def test_the_full_model_scores_at_least_90_on_every_task(family):
    scores = evaluate(testbed.checkpoint_dir(family), limit=20, tasks=PAPER_TASKS)
    assert {task: score for task, score in scores.items() if score < 90} == {}
