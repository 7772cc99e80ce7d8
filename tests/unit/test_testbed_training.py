"""Training: labels sit on answers only, a killed run continues to the same weights, and the parts match naive twins."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from adaskip import testbed
from adaskip.testbed.tasks import draw
from dev.testbed_training import attention, train
from dev.testbed_training.curriculum import IGNORED, batch, encode, segments
from dev.testbed_training.families import model_config
from dev.testbed_training.muon import Muon, orthogonalize
from dev.testbed_training.recipe import RECIPE, REPEAT, Phase, Recipe
from dev.testbed_training.tokenizer import build_tokenizer
from dev.testbed_training.trainer import Trainer

TINY = Recipe(
    phases=(
        Phase(steps=2, tokens=96, context_tokens=(16, 24), bare=1.0, lr=1.0, weights={REPEAT: 1.0}),
        Phase(steps=4, tokens=128, context_tokens=(20, 40), bare=0.5, lr=0.5, weights={"trec": 1.0, "gov_report": 1.0}),
    ),
    warmup=2,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_trainer(tokenizer, seed=0, recipe=TINY, family="llama") -> Trainer:
    return Trainer(family, recipe, seed, torch.device("cpu"), tokenizer)


@pytest.mark.parametrize("task", testbed.TASKS)
def test_only_answers_are_learnt(task, tokenizer):
    sample = draw(task, "train", 120, random.Random(0))
    ids, labels = encode(segments(sample, bare=False), tokenizer)
    learnt = tokenizer.decode([label for label in labels if label != IGNORED])
    assert (sample.response or sample.answer) + "<eos>" in learnt
    assert "Question" not in learnt
    assert "Section" not in learnt
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))


def test_a_batch_depends_on_seed_and_step_alone(tokenizer):
    ids, labels, tasks = batch(RECIPE, 700, 0, tokenizer)
    again = batch(RECIPE, 700, 0, tokenizer)
    assert torch.equal(ids, again[0])
    assert torch.equal(labels, again[1])
    assert tasks == again[2]
    assert not torch.equal(ids, batch(RECIPE, 701, 0, tokenizer)[0])
    assert not torch.equal(ids, batch(RECIPE, 700, 1, tokenizer)[0])


def test_the_learning_rate_warms_up_and_decays():
    scales = [RECIPE.lr_scale(step) for step in range(RECIPE.steps)]
    assert scales[0] < scales[RECIPE.warmup] == 1.0
    assert scales[-1] < 0.05
    with pytest.raises(ValueError, match=f"the recipe has {RECIPE.steps} steps, there is no step {RECIPE.steps}"):
        RECIPE.phase_at(RECIPE.steps)


def test_a_run_continued_from_a_checkpoint_ends_with_the_same_weights(tokenizer, tmp_path):
    whole = new_trainer(tokenizer)
    train.train(whole, tmp_path / "whole", steps=5)
    train.train(new_trainer(tokenizer), tmp_path / "parts", steps=3)
    continued = new_trainer(tokenizer)
    train.train(continued, tmp_path / "parts", steps=5)
    assert continued.step == 5
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, continued.model.state_dict()[name]), name
    assert [line["step"] for line in train.read_log(tmp_path / "parts" / "log.jsonl")] == [3, 5]


def test_lines_logged_after_the_last_checkpoint_are_logged_once(tokenizer, tmp_path):
    trainer = new_trainer(tokenizer)
    train.train(trainer, tmp_path, steps=2)
    (tmp_path / "log.jsonl").write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n')
    train.train(new_trainer(tokenizer), tmp_path, steps=4)
    assert [line["step"] for line in train.read_log(tmp_path / "log.jsonl")] == [2, 4]


@pytest.mark.parametrize("other", [{"seed": 1}, {"family": "vicuna"}, {"recipe": replace(TINY, muon_lr=0.5)}])
def test_a_checkpoint_of_another_run_is_refused(tokenizer, tmp_path, other):
    new_trainer(tokenizer).save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="is of family llama, seed 0"):
        new_trainer(tokenizer, **other).load(tmp_path / "checkpoint.pt")


def test_a_step_count_outside_the_recipe_is_refused():
    with pytest.raises(ValueError, match="--steps is 0, allowed is 1 to"):
        train.main(["--family", "llama", "--steps", "0"])


def test_an_exported_model_loads_with_its_tokenizer(tokenizer, tmp_path):
    trainer = new_trainer(tokenizer, family="internlm")
    trainer.export(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Passage 1:\nHeadline 1: Ada sells red boats to Oslo."
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.padding_side == "left"
    assert (loaded.eos_token_id, loaded.pad_token_id) == (model.config.eos_token_id, model.config.pad_token_id)
    ids = loaded(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert_close(model(ids).logits, trainer.model(ids).logits, atol=5e-3, rtol=0)


@pytest.mark.parametrize("family", testbed.FAMILIES)
def test_block_attention_matches_eager_attention(family):
    config = model_config(family, vocab_size=50, num_layers=2)
    torch.manual_seed(0)
    eager = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    blocks = LlamaForCausalLM._from_config(config, attn_implementation=attention.register())
    blocks.load_state_dict(eager.state_dict())
    ids = torch.randint(50, (2, 2 * attention.BLOCK + 30))
    assert_close(blocks(ids, use_cache=False).logits, eager(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(64, 128), (128, 128), (288, 128)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(3, *shape)))
    assert singular.max() < 1.4
    assert singular.median() > 0.6


def test_muon_matches_torch_muon():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(64, 128)) for _ in range(2)] + [torch.nn.Parameter(torch.randn(128, 64))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = (
        Muon(ours, lr=0.1),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p, q, atol=0.02, rtol=0)
