"""A decoder layer whose parts have names that the library does not know, skipped once its structure is registered."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from adaskip import Budget, EarlyExit, FixedPlan, SkipPlan, calibrate, register_structure, skipping
from adaskip.core import blocks
from adaskip.core.blocks import BlockStructure, Sublayers, UnsupportedModelError, known_structures
from tests.families import random_model, random_prompts

MIXING = BlockStructure(
    "toy",
    Sublayers("mixer", pre_norm="before", post_norm="after"),
    Sublayers("widening", pre_norm=None, post_norm="end"),
)
PLAN = SkipPlan(attention=frozenset({1, 3}), ffn=frozenset({0, 3}))


@pytest.fixture(autouse=True)
def own_structures(monkeypatch):
    monkeypatch.setattr(blocks, "_structures", dict(blocks._structures))


class ToyLayer(nn.Module):
    """Computes h + after(mixer(before(h))) and then h + end(widening(h))."""

    def __init__(self, llama: Any, width: int):
        super().__init__()
        self.mixer: Any
        self.widening: Any
        self.before: Any
        self.after: Any
        self.end: Any
        self.mixer, self.widening, self.before = llama.self_attn, llama.mlp, llama.input_layernorm
        self.after, self.end = nn.LayerNorm(width), llama.post_attention_layernorm

    def forward(self, hidden_states, **kwargs):
        mixed, _ = self.mixer(hidden_states=self.before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.after(mixed)
        return hidden_states + self.end(self.widening(hidden_states))


@pytest.fixture
def model():
    model = random_model("llama")
    width = model.config.hidden_size
    model.model.layers = nn.ModuleList(ToyLayer(layer, width) for layer in model.model.layers)
    return model.eval()


def generated(model):
    (ids,) = random_prompts([6])
    return model.generate(
        ids[None], max_new_tokens=8, do_sample=False, output_scores=True, return_dict_in_generate=True
    )


def test_a_layer_of_unknown_parts_says_how_to_make_it_known(model):
    with pytest.raises(UnsupportedModelError, match=r"mixer.*register_structure"), skipping(model, early_exit()):
        pass


def early_exit() -> EarlyExit:
    return EarlyExit(num_layers=4, budget=Budget(layers=1))


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_a_registered_structure_is_skipped_as_if_its_sublayers_gave_zero(model, phase):
    register_structure(MIXING)
    full = generated(model)
    with skipping(model, FixedPlan(num_layers=4, plan=PLAN, phase=phase)):
        ours = generated(model)
    silenced = [model.model.layers[i].after for i in PLAN.attention] + [model.model.layers[i].end for i in PLAN.ffn]

    def silence(module, args, output):
        prompt = output.shape[1] > 1
        return output if prompt and phase == "decode" else output * 0

    handles = [part.register_forward_hook(silence) for part in silenced]
    expected = generated(model)
    for handle in handles:
        handle.remove()
    assert torch.equal(ours.sequences, expected.sequences)
    for mine, theirs in zip(ours.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not torch.equal(torch.stack(ours.scores[1:2]), torch.stack(full.scores[1:2]))
    assert torch.equal(generated(model).sequences, full.sequences)  # restored


def test_a_registered_structure_is_calibrated(model):
    register_structure(MIXING)
    profile = calibrate(model, random_prompts([6, 7]))
    assert len(profile.attention.similarity) == len(profile.ffn.similarity) == 4
    assert len(set(profile.attention.similarity)) == 4


def test_a_registration_that_is_not_what_the_layer_computes_is_refused_at_the_model(model):
    wrong = BlockStructure(
        "wrong", Sublayers("mixer", pre_norm="before", post_norm="end"), Sublayers("widening", None, "after")
    )
    register_structure(wrong)
    with pytest.raises(UnsupportedModelError, match="computes something else"), skipping(model, early_exit()):
        pass


def test_an_equal_structure_may_be_registered_again():
    before = len(known_structures())
    assert register_structure(MIXING) is MIXING
    register_structure(BlockStructure("toy", MIXING.attention, MIXING.ffn))
    assert len(known_structures()) == before + 1


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ("pre-norm", "takes a BlockStructure; got 'pre-norm'"),
        (BlockStructure("pre-norm", MIXING.attention, MIXING.ffn), "named 'pre-norm' is already registered"),
        (BlockStructure("", MIXING.attention, MIXING.ffn), "needs a name; got ''"),
        (BlockStructure("x", cast(Any, ("mixer",)), MIXING.ffn), "must be Sublayers; got"),
        (BlockStructure("x", Sublayers("", None, None), MIXING.ffn), "names a part ''"),
        (BlockStructure("x", Sublayers("a.b", None, None), MIXING.ffn), "names a part 'a.b'"),
        (BlockStructure("x", Sublayers(cast(Any, None), None, None), MIXING.ffn), "names a part None"),
        (BlockStructure("x", Sublayers("mixer", "end", None), MIXING.ffn), "uses end for more than one part"),
        (
            BlockStructure(
                "x",
                Sublayers("mlp", pre_norm="input_layernorm", post_norm=None),
                Sublayers("self_attn", pre_norm="post_attention_layernorm", post_norm=None),
            ),
            "'x' has the same parts as 'pre-norm'",
        ),
    ],
)
def test_what_cannot_be_registered_is_refused(structure, message):
    before = known_structures()
    with pytest.raises(ValueError, match=message):
        register_structure(structure)
    assert known_structures() == before
