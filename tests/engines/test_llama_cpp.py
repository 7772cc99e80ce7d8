"""What llama.cpp answers from an exported GGUF file is what `skipping` answers on the model that it was made of.

Run where llama-cpp-python is installed, which `make setup-llama-cpp` compiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from adaskip.core.context import skipping
from adaskip.core.plan import EMPTY_PLAN, SkipPlan, Sublayer
from adaskip.core.strategy import FixedPlan
from adaskip.core.token_ids import left_padded
from adaskip.engines.checkpoint import Checkpoint
from adaskip.engines.export import export_to
from adaskip.engines.registry import Export
from adaskip.models.loading import load_model
from adaskip.models.source import find_source
from tests.checkpoints import write_family
from tests.families import random_model
from tests.unit.test_gguf_export_tokenizer import LLAMA3_REGEX, byte_level, split

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.engines

NUM_TOKENS, MOST_DIFFERENT, MOST_KL = 64, 1, 1e-4
LENGTHS = [3, 150, *range(8, 80, 4)]
"""Tokens of the 20 prompts of the random models."""
EPSILON = 1e-9
"""Of the random models' norms: what folding leaves of it flips near ties of random logits else. SmolLM2's is 1e-5."""
SHAPE = {
    **{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 512},
    "rms_norm_eps": EPSILON,
}
LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
MODELS = {
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "internlm": ("llama-biased", {"mlp_bias": True}),
    "vicuna": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 64}),
}
ATTENTION, FFN = "attention", "ffn"
PLANS = {
    "attention": SkipPlan.of_sublayers({Sublayer(ATTENTION, 1): 1.2, Sublayer(ATTENTION, 2): 0.8}),
    "ffn": SkipPlan.of_sublayers({Sublayer(FFN, 0): 1.7, Sublayer(FFN, 3): 1.1}),
    "both": SkipPlan.of_sublayers({Sublayer(ATTENTION, 2): 1.2, Sublayer(FFN, 1): 0.7, Sublayer(FFN, 2): 0.9}),
    "first attention": SkipPlan.of_sublayers({Sublayer(ATTENTION, 0): 1.6, Sublayer(FFN, 1): 1.2}),
    "whole layers": SkipPlan.of_layers([0, 3]),
}
LAYERS_16 = (3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 21, 22, 23)
SMOLLM2_PLANS = {
    "attention": SkipPlan.of_sublayers({Sublayer(ATTENTION, layer): 1.03 for layer in (6, 9, 13, 15, 17, 19, 21, 23)}),
    "both": SkipPlan.of_sublayers(
        {Sublayer(ATTENTION, 13): 1.02, Sublayer(FFN, 12): 1.1, Sublayer(ATTENTION, 21): 1.03, Sublayer(FFN, 16): 1.05}
    ),
    "first attention": SkipPlan.of_sublayers({Sublayer(ATTENTION, 0): 1.1}),
}
SUBJECTS = (
    *("tides", "a lost umbrella", "glass making", "the moon", "bicycles", "a village choir", "volcanoes", "old maps"),
    *("beekeeping", "rivers", "the first trains", "bread", "a lighthouse", "whales", "clocks", "chess", "paper"),
    *("winter gardens", "bridges", "a long walk"),
)
PROMPTS = [f"Write a short, clear text about {subject} for readers of twelve. Begin at once." for subject in SUBJECTS]


@contextmanager
def opened(file: Path, context: int, **options) -> Iterator:
    """A file in llama.cpp on one thread of the CPU, keys and values in float32."""
    settings = {"n_ctx": context, "n_batch": context, "n_threads": 1, "n_threads_batch": 1, "n_gpu_layers": 0}
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "logits_all": True}
    llama = llama_cpp.Llama(str(file), verbose=False, **{**settings, **exact, **options})
    try:
        yield llama
    finally:
        llama.close()


def greedy(llama, prompt: Tensor) -> list[int]:
    llama.reset()
    llama.eval(prompt.tolist())
    made: list[int] = []
    while len(made) < NUM_TOKENS:
        made.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(made[-1:])
    return made


@torch.no_grad()
def answers(model: PreTrainedModel, plan: SkipPlan, prompts: list[Tensor]) -> list[list[int]]:
    """Greedy tokens of each prompt [T] in transformers, ends not minded."""
    ids, mask = left_padded(prompts, 0, torch.device("cpu"))
    settings = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 0}
    with skipping(model, FixedPlan(num_layers=model.config.num_hidden_layers, plan=plan)):
        output = model.generate(input_ids=ids, attention_mask=mask, **settings, eos_token_id=None)
    return output[:, ids.shape[1] :].tolist()


@torch.no_grad()
def divergence(llama, model: PreTrainedModel, plan: SkipPlan, text: Tensor) -> float:
    """KL of llama.cpp's next tokens from those of the plan, the mean over a text [T], nats."""
    llama.reset()
    llama.eval(text.tolist())
    found = torch.from_numpy(llama.scores[: len(text)].copy()).double().log_softmax(-1)
    with skipping(model, FixedPlan(num_layers=model.config.num_hidden_layers, plan=plan)):
        wanted = model(input_ids=text[None]).logits[0].double().log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def assert_same(file: Path, model: PreTrainedModel, plan: SkipPlan, prompts: list[Tensor]) -> None:
    """At least 19 of 20 answers are the same, and distributions along them agree."""
    wanted = answers(model, plan, prompts)
    with opened(file, 256) as llama:
        found = [greedy(llama, prompt) for prompt in prompts]
        texts = [torch.cat([prompt, torch.tensor(answer)]) for prompt, answer in zip(prompts, wanted, strict=True)]
        kl = np.mean([divergence(llama, model, plan, text) for text in texts])
    assert sum(one != other for one, other in zip(found, wanted, strict=True)) <= MOST_DIFFERENT
    assert kl < MOST_KL


def exported(model: PreTrainedModel, folder: Path, plan: SkipPlan, **options) -> tuple[Path, dict]:
    if not (folder / "model.safetensors").exists():
        model.save_pretrained(folder)
    strategy = FixedPlan(num_layers=model.config.num_hidden_layers, plan=plan)
    file = folder / "smaller.gguf"
    file.unlink(missing_ok=True)
    return file, export_to("gguf", Export(strategy, Checkpoint(folder, model.config), **options), file)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_random_models_answer_as_under_the_plan(name, plan, tmp_path):
    family, options = MODELS[name]
    model = random_model(family, **SHAPE, **options)
    file, report = exported(model, tmp_path, plan)
    assert report["verified"]["kl"] < 1e-5
    draw = torch.Generator().manual_seed(0)
    assert_same(file, model, plan, [torch.randint(3, 512, (length,), generator=draw) for length in LENGTHS])


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2", device="cpu", dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("plan", SMOLLM2_PLANS.values(), ids=SMOLLM2_PLANS)
def test_smollm2_answers_as_under_the_plan(plan, smollm2, tmp_path):
    file, report = exported(smollm2.model, tmp_path, plan)
    assert report["verified"]["kl"] < MOST_KL
    prompts = [smollm2.tokenizer(text, return_tensors="pt").input_ids[0] for text in PROMPTS]
    assert_same(file, smollm2.model, plan, prompts)


def test_smollm2s_own_file_runs_with_fewer_keys_and_values(tmp_path):
    source = find_source("smollm2")
    whole = source.path
    plan = SkipPlan.of_sublayers({Sublayer(ATTENTION, layer): 1.03 for layer in LAYERS_16})
    export = Export(FixedPlan(num_layers=30, plan=plan), Checkpoint(whole.parent, source.own_config), gguf_file=whole)
    report = export_to("gguf", export, tmp_path / "smaller.gguf")
    assert report["verified"]["kl"] < 0.1
    sizes = {}
    for name, file in (("whole", whole), ("smaller", tmp_path / "smaller.gguf")):
        with opened(file, 512, flash_attn=True) as llama:
            ids = llama.tokenize(PROMPTS[0].encode())
            assert len(greedy(llama, torch.tensor(ids))) == NUM_TOKENS
            sizes[name] = llama_cpp.llama_state_seq_get_size(llama.ctx, 0)
    assert sizes["smaller"] / sizes["whole"] == pytest.approx(14 / 30, rel=0.01)


TEXTS = (
    *("The quick brown fox jumps over the lazy dog.", "a", "I've been 'told he's there, 'RE you sure? We'Ve a'lL"),
    *("3 33 333 3333 33333 3.3 3..3 1314151天", "naïve café, нещо на Български, 你好，世界。 🚀 👩‍👩‍👧"),  # noqa: RUF001
    *("Question: who? Answer: she.\n\n", "tabs\t\tand  \n \n\n   lines   ", '------======= ```` """......!!!!!!??????'),
)


def tokenizers(folder: Path):
    yield "llama-bpe", byte_level(split(LLAMA3_REGEX), ignore_merges=True)
    yield "smaug-bpe", byte_level(split(LLAMA3_REGEX))
    yield "qwen2", byte_level(split(LLAMA3_REGEX.replace("{1,3}", "")))
    yield "smollm", byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True)
    yield "gpt-2", byte_level(use_regex=True)
    yield "default", AutoTokenizer.from_pretrained(write_family("vicuna", folder))


@pytest.mark.parametrize("name", ["llama-bpe", "smaug-bpe", "qwen2", "smollm", "gpt-2", "default"])
def test_tokens_are_those_of_transformers(name, tmp_path):
    tokenizer = dict(tokenizers(tmp_path / "vicuna"))[name]
    model = random_model("llama", 2, vocab_size=len(tokenizer), pad_token_id=None, eos_token_id=None, bos_token_id=None)
    file, _ = exported(model, tmp_path / "model", EMPTY_PLAN, tokenizer=tokenizer)
    with opened(file, 64, vocab_only=True) as llama:
        for text in TEXTS:
            found = llama.tokenize(text.encode(), add_bos=True, special=True)
            assert found == tokenizer(text).input_ids, text
            assert llama.detokenize(found, special=False).decode().strip() == text.strip() or name == "default"
        assert (llama.token_bos(), llama.token_eos()) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
