"""What a plan leaves of a Llama in a GGUF file: llama.cpp's arithmetic of it gives the logits of `skipping`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from adaskip.core.context import skipping
from adaskip.core.plan import EMPTY_PLAN, SkipPlan, Sublayer
from adaskip.engines.checkpoint import Checkpoint
from adaskip.engines.errors import ExportError
from adaskip.engines.fold import Folded, fold_plan
from adaskip.engines.gguf_checkpoint import read_checkpoint
from adaskip.engines.gguf_file import compare_file, read_file, write_file
from adaskip.engines.gguf_layers import GGUFModel, Layer, packed, smaller
from adaskip.strategies import FixedPlan
from tests.families import VOCAB, random_model
from tests.gguf_decoder import GGUFDecoder

TOKENS = torch.randint(3, VOCAB, (24,), generator=torch.Generator().manual_seed(1))
ATTENTION, FFN = "attention", "ffn"
PLANS = {
    "nothing": EMPTY_PLAN,
    "attention": SkipPlan.of_sublayers({Sublayer(ATTENTION, 1): 1.2, Sublayer(ATTENTION, 2): 0.7}),
    "ffn": SkipPlan.of_sublayers({Sublayer(FFN, 1): 1.3, Sublayer(FFN, 3): 1.1}),
    "both": SkipPlan.of_sublayers({Sublayer(ATTENTION, 2): 1.2, Sublayer(FFN, 0): 2.5, Sublayer(FFN, 3): 0.9}),
    "first attention": SkipPlan.of_sublayers({Sublayer(ATTENTION, 0): 1.4, Sublayer(FFN, 1): 1.1}),
    "first layer": SkipPlan.of_sublayers({Sublayer(ATTENTION, 0): 1.4, Sublayer(FFN, 0): 1.1}),
    "first ffn": SkipPlan.of_sublayers({Sublayer(FFN, 0): 14.7}),
    "last layer": SkipPlan.of_sublayers({Sublayer(ATTENTION, 3): 1.4, Sublayer(FFN, 3): 1.1}),
    "last attention": SkipPlan.of_sublayers({Sublayer(ATTENTION, 3): 1.4}),
    "one attention left": SkipPlan(frozenset({0, 1, 3}), frozenset({0, 1, 2, 3})),
    "whole layers": SkipPlan.of_layers([1, 2]),
    "half of one layer, half of the next": SkipPlan(frozenset({2}), frozenset({1})),
}
SHAPES = {
    "llama": {},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 10},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    "llama3 rope": {
        "rope_parameters": {
            **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        }
    },
}


def saved(folder: Path, **options) -> tuple[torch.nn.Module, Checkpoint]:
    model = random_model("llama", **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    return model, Checkpoint(folder, model.config)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / (wanted - wanted.mean(-1, keepdim=True)).norm())


def skipped_logits(model, plan: SkipPlan) -> torch.Tensor:
    with torch.no_grad(), skipping(model, FixedPlan(num_layers=len(model.model.layers), plan=plan)):
        return model(input_ids=TOKENS[None]).logits[0].double()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_in_float32_computes_what_skipping_computes(shape, tmp_path):
    model, checkpoint = saved(tmp_path / "model", **SHAPES[shape])
    whole = read_checkpoint(checkpoint, None, "f32")
    for plan in (PLANS["both"], PLANS["first attention"]):
        file = tmp_path / "smaller.gguf"
        write_file(smaller(whole, fold_plan(plan, 4)), file)
        assert distance(GGUFDecoder(file).logits(TOKENS), skipped_logits(model, plan)) < 1e-4


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_plan_computes_what_skipping_computes(plan, tmp_path):
    model, checkpoint = saved(tmp_path / "model")
    file = tmp_path / "smaller.gguf"
    write_file(smaller(read_checkpoint(checkpoint, None, "f32"), fold_plan(plan, 4)), file)
    decoder = GGUFDecoder(file)
    assert distance(decoder.logits(TOKENS), skipped_logits(model, plan)) < 1e-4
    assert sum(decoder.of_layer("attention.head_count_kv", i) > 0 for i in range(decoder.layers)) == 4 - len(
        plan.attention
    )


@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16", "q8_0"])
def test_a_gguf_file_gives_what_its_checkpoint_gives(type_name, tmp_path):
    """Skipping in a GGUF file of the whole model, against the checkpoint's own smaller file."""
    _, checkpoint = saved(tmp_path / "model", hidden_size=32, intermediate_size=64)
    whole = read_checkpoint(checkpoint, None, type_name)
    files = tmp_path / "whole.gguf", tmp_path / "smaller.gguf"
    write_file(smaller(whole, fold_plan(EMPTY_PLAN, 4)), files[0])
    again = smaller(read_file(files[0]), fold_plan(PLANS["both"], 4))
    write_file(again, files[1])
    assert compare_file(again, files[1]) < 4e-3
    direct = smaller(whole, fold_plan(PLANS["both"], 4))
    assert list(direct.weights) == list(again.weights)
    write_file(direct, tmp_path / "direct.gguf")
    found, wanted = (GGUFDecoder(file).logits(TOKENS) for file in (files[1], tmp_path / "direct.gguf"))
    assert distance(found, wanted) < {"f32": 1e-6, "q8_0": 0.05}.get(type_name, 0.02)


def test_an_ffn_joins_the_attention_before_it_wherever_that_comes_from():
    live = fold_plan(SkipPlan(frozenset({2, 4}), frozenset({1, 3, 5})), 6).live
    assert packed(live) == [Layer(0, 0), Layer(1, 2), Layer(3, 4), Layer(5, None)]
    assert packed(fold_plan(SkipPlan(frozenset({0, 1}), frozenset()), 3).live) == [
        *(Layer(None, 0), Layer(None, 1), Layer(2, 2))
    ]


def test_files_whose_layers_are_all_whole_are_ordinary_llamas(tmp_path):
    _, checkpoint = saved(tmp_path)
    whole = read_checkpoint(checkpoint, None, "f16")
    for name, layers in (("nothing", 4), ("whole layers", 2), ("half of one layer, half of the next", 3)):
        model = smaller(whole, fold_plan(PLANS[name], 4))
        assert (model.architecture, model.number("block_count")) == ("llama", layers)
        assert model.number("attention.head_count") == 4


def test_other_files_are_deci_with_a_number_for_each_layer(tmp_path):
    _, checkpoint = saved(tmp_path)
    model = smaller(read_checkpoint(checkpoint, None, "f16"), fold_plan(PLANS["first attention"], 4))
    assert model.architecture == "deci"
    assert [model.number(f"attention.head_count{end}") for end in ("", "_kv")] == [[4, 4, 4, 4], [0, 2, 2, 2]]
    assert model.number("feed_forward_length") == [24, 32, 24, 24]
    assert not any(key.startswith("llama.") for key in model.fields)
    assert model.fields["adaskip.skipped"].value == '{"num_layers": 4, "attention": [0], "ffn": [1]}'


def _with_field(model: GGUFModel, key: str) -> GGUFModel:
    return replace(model, fields={**model.fields, key: GGUFValue(2, GGUFValueType.UINT32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: replace(m, architecture="qwen2"), "architecture 'qwen2' cannot be exported; allowed: llama"),
        (lambda m: _with_field(m, "llama.expert_count"), "llama.expert_count, which llama.cpp's deci does not know"),
        (lambda m: _with_field(m, "llama.attention.sliding_window"), "llama.attention.sliding_window"),
        (lambda m: _with_field(m, "llama.block_count"), "has 2 layers, the plan is for 4"),
        (lambda m: replace(m, weights={**m.weights, "blk.0.attn_qkv.weight": None}), "blk.0.attn_qkv.weight"),
        (
            lambda m: replace(m, weights={k: v for k, v in m.weights.items() if "2.ffn_up" not in k}),
            "lacks tensor blk.2.ffn_up",
        ),
    ],
)
def test_what_is_no_plain_llama_is_refused(change, message, tmp_path):
    _, checkpoint = saved(tmp_path)
    with pytest.raises(ExportError, match=message):
        smaller(change(read_checkpoint(checkpoint, None, "f32")), fold_plan(EMPTY_PLAN, 4))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen2", {}, "'qwen2' cannot be exported to GGUF"),
        ("mixtral", {}, "'mixtral' cannot be exported to GGUF"),
        ("gemma2", {}, "'gemma2' cannot be exported to GGUF"),
        ("mistral", {}, "no sliding window; this model's is 5 tokens"),
        ("llama", {"hidden_act": "gelu"}, "SiLU activations, this model 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope of type 'yarn'"),
    ],
)
def test_models_that_llama_cpp_cannot_express_are_refused(family, options, message, tmp_path):
    model = random_model(family, **options)
    model.save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=message):
        read_checkpoint(Checkpoint(tmp_path, model.config), None, "f32")


def test_a_mistral_without_window_is_a_llama(tmp_path):
    model = random_model("mistral", sliding_window=None)
    model.save_pretrained(tmp_path)
    write_file(
        smaller(
            read_checkpoint(Checkpoint(tmp_path, model.config), None, "f32"),
            Folded(4, fold_plan(PLANS["both"], 4).divisors),
        ),
        tmp_path / "a.gguf",
    )
    assert distance(GGUFDecoder(tmp_path / "a.gguf").logits(TOKENS), skipped_logits(model, PLANS["both"])) < 1e-4


def test_rows_that_no_block_fits_are_refused(tmp_path):
    _, checkpoint = saved(tmp_path)
    with pytest.raises(ExportError, match="rows of 16 weights; Q8_0 has blocks of 32: use f16"):
        read_checkpoint(checkpoint, None, "q8_0")
