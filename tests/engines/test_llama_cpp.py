"""What llama.cpp answers from an exported GGUF file is what `skipping` answers on the model that it was made of.

Run where llama-cpp-python is installed, which `make setup-llama-cpp` compiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
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
from adaskip.engines.checkpoint import Checkpoint
from adaskip.engines.export import export_to
from adaskip.engines.registry import Export
from adaskip.models.loading import load_model
from adaskip.models.source import find_source
from tests.checkpoints import write_family
from tests.engines.exports import LENGTHS, LLAMA3_ROPE, NUM_TOKENS, SHAPE, tokens_of_skipping
from tests.engines.exports import PLANS as FAMILY_PLANS
from tests.families import random_model
from tests.unit.test_gguf_export_tokenizer import LLAMA3_REGEX, byte_level, split

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.engines

MOST_DIFFERENT, MOST_KL = 1, 1e-4
EXACT = {**SHAPE, "rms_norm_eps": 1e-9}
"""What folding leaves of a larger epsilon flips near ties of random logits. SmolLM2's is 1e-5."""
MODELS = {
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "internlm": ("llama-biased", {"mlp_bias": True}),
    "vicuna": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 64}),
}
ATTENTION, FFN = "attention", "ffn"
PLANS = {
    **FAMILY_PLANS,
    "ffn, scaled": SkipPlan.of_sublayers({Sublayer(FFN, 0): 1.7, Sublayer(FFN, 3): 1.1}),
    "whole layers": SkipPlan.of_layers([0, 3]),
}
LAYERS_16 = (3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 21, 22, 23)
SMOLLM2_PLANS = {
    "attention": SkipPlan.of_sublayers({Sublayer(ATTENTION, layer): 1.03 for layer in (6, 9, 13, 15, 17, 19, 21, 23)}),
    "both": SkipPlan.of_sublayers(
        {Sublayer(ATTENTION, 0): 1.1, Sublayer(FFN, 12): 1.1, Sublayer(ATTENTION, 21): 1.03, Sublayer(FFN, 16): 1.05}
    ),
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
    wanted = tokens_of_skipping(model, plan, prompts)
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
    model = random_model(family, **EXACT, **options)
    file, report = exported(model, tmp_path, plan)
    assert report["verified"]["kl"] < 1e-5
    draw = torch.Generator().manual_seed(0)
    assert_same(file, model, plan, [torch.randint(3, 512, (length,), generator=draw) for length in LENGTHS])


def test_the_exported_model_drafts_for_the_full_one(tmp_path):
    from adaskip.studies.engines.llama_cpp_draft import Draft

    model = random_model("llama", **EXACT)
    small, _ = exported(model, tmp_path / "small", SkipPlan(attention=frozenset({3})))
    full, _ = exported(model, tmp_path / "full", EMPTY_PLAN)
    prompt = torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(0))
    with opened(small, 256) as drafting, opened(full, 256) as alone:
        draft = Draft(drafting)
        with opened(full, 256, draft_model=draft) as drafted:
            tokens = [*islice(drafted.generate(prompt.tolist(), temp=0), NUM_TOKENS)]
        assert tokens == greedy(alone, prompt)
    assert draft.calls < NUM_TOKENS - 1, "no drafted token was accepted"


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
