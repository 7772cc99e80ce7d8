"""A plan's scales go into the weights of later live sublayers; what cannot is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adaskip.core.context import skipping
from adaskip.core.fingerprint import portable_fingerprint
from adaskip.core.plan import Affine, Budget, SkipPlan, Sublayer
from adaskip.core.same_model import identity
from adaskip.engines.checkpoint import Checkpoint, save_in_memory, write_checkpoint
from adaskip.engines.errors import ExportError
from adaskip.engines.families import Edit, family_of
from adaskip.engines.fold import fold, fold_plan
from adaskip.strategies import FixedPlan, SkipDecode
from tests.families import random_model, random_prompts

SCALED = SkipPlan.of_sublayers(
    {Sublayer("attention", 0): 1.5, Sublayer("ffn", 1): 0.8, Sublayer("attention", 2): 1.2, Sublayer("ffn", 2): 1.0}
)
MODEL_TYPES = ["llama", "llama-biased", "mistral", "qwen2", "qwen3", "phi3", "granite", "gemma2", "gemma3"]


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_folded_weights_under_the_plan_without_scales_are_the_model_under_the_plan(family, tmp_path):
    """The skipped tensors are missing on disk and random where they are loaded again: nothing reads them.

    What is left of a difference is the epsilon of the norms, largest where the stream is small.
    """
    model = random_model(family)
    source = save_in_memory(model, None, tmp_path / "source")
    (tmp_path / "target").mkdir()
    edit = Edit(fold_plan(SCALED, 4), family_of(source.model_type), source.tensor_files)
    write_checkpoint(source, tmp_path / "target", edit)
    folded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", attn_implementation=model.config._attn_implementation
    )
    prompt = random_prompts([12])[0][None]
    with torch.no_grad():
        with skipping(model, FixedPlan(num_layers=4, plan=SCALED)):
            expected = model(prompt).logits
        with skipping(folded, FixedPlan(num_layers=4, plan=SkipPlan(SCALED.attention, SCALED.ffn))):
            logits = folded(prompt).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert not any("layers.0.self_attn" in name for name in load_file(tmp_path / "target" / "model.safetensors"))


def test_divisors_are_the_products_of_the_scales_before():
    folded = fold_plan(SCALED, 4)
    assert folded.live == (("ffn", 0), ("attention", 1), ("attention", 3), ("ffn", 3))
    assert list(folded.divisors.values()) == pytest.approx([1.5, 1.5, 1.5 * 0.8 * 1.2, 1.5 * 0.8 * 1.2])
    assert folded.live_layers == (0, 1, 3)
    assert folded.is_scaled
    assert not folded.is_whole_layers
    assert fold_plan(SkipPlan.of_layers([1]), 3).is_whole_layers
    assert not fold_plan(SkipPlan.of_layers([1]), 3).is_scaled


@pytest.mark.parametrize(
    "strategy",
    [
        FixedPlan(num_layers=4, plan=SCALED, phase="decode"),
        SkipDecode(num_layers=4, budget=Budget(layers=2)),
    ],
    ids=lambda strategy: strategy.name,
)
def test_plans_that_change_on_the_way_are_refused(strategy):
    with pytest.raises(ExportError, match=r"changes its plan .* allowed: phase prefill"):
        fold(strategy)


@pytest.mark.parametrize("scale", [0.0, -1.0, Affine((1.0, 1.1), (0.0, 0.0)), Affine((1.0, 1.0), (0.0, 0.5))], ids=str)
def test_scales_that_are_no_positive_factor_are_refused(scale):
    with pytest.raises(ExportError, match="attention 1 cannot be folded"):
        fold_plan(SkipPlan({1}, scales={Sublayer("attention", 1): scale}), 3)


def test_an_affine_compensation_that_is_one_factor_folds():
    plan = SkipPlan({1}, scales={Sublayer("attention", 1): Affine((1.5, 1.5), (0.0, 0.0))})
    assert fold_plan(plan, 2).divisors[Sublayer("ffn", 1)] == 1.5


def test_scales_of_post_norm_blocks_are_refused_and_plain_plans_are_not():
    names = save_names(random_model("olmo2"))
    with pytest.raises(ExportError, match="no norm in front"):
        Edit(fold_plan(SCALED, 4), family_of("olmo2"), names)
    assert not Edit(fold_plan(SkipPlan({0}, {1}), 4), family_of("olmo2"), names).divided


def save_names(model):
    return model.state_dict().keys()


def test_unknown_families_and_checkpoints_of_another_depth_are_refused():
    with pytest.raises(ExportError, match=r"'mamba' cannot be exported; allowed: .*llama"):
        family_of("mamba")
    with pytest.raises(ExportError, match="weights of 4 layers"):
        Edit(fold_plan(SCALED, 5), family_of("llama"), save_names(random_model("llama")))


@pytest.mark.parametrize(
    ("parts", "divided"),
    [
        (("qweight", "qzeros", "scales"), {"scales"}),
        (("weight", "weight_scale", "bias"), {"weight_scale", "bias"}),
        (("weight", "absmax"), None),
    ],
)
def test_quantised_projections_are_scaled_by_their_scales_or_refused(parts, divided):
    plan = SkipPlan({0}, scales={Sublayer("attention", 0): 2.0})
    names = [f"model.layers.0.mlp.down_proj.{part}" for part in parts]
    if divided is None:
        with pytest.raises(ExportError, match="cannot be folded into"):
            Edit(fold_plan(SkipPlan({0}, {1}, plan.scales), 2), family_of("llama"), [*names, *other_layer()])
        return
    edit = Edit(fold_plan(SkipPlan({0}, {1}, plan.scales), 2), family_of("llama"), [*names, *other_layer()])
    assert {name.rpartition(".")[2] for name in edit.divided if "down_proj" in name} == divided


def other_layer():
    return [f"model.layers.1.{part}.weight" for part in ("self_attn.o_proj", "mlp.down_proj")]


def test_shards_keep_their_partition_and_an_index_names_them(tmp_path):
    model = random_model("llama")
    model.save_pretrained(tmp_path / "source", max_shard_size="6KB")
    source = Checkpoint(tmp_path / "source", model.config)
    (tmp_path / "target").mkdir()
    edit = Edit(fold_plan(SCALED, 4), family_of("llama"), source.tensor_files)
    write_checkpoint(source, tmp_path / "target", edit)
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    kept = {name for name in source.tensor_files if edit.keeps(name)}
    assert index["weight_map"].keys() == kept
    files = sorted((tmp_path / "target").glob("*.safetensors"))
    assert len(files) == len(set(index["weight_map"].values())) > 3
    assert {name for file in files for name in load_file(file)} == kept
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(f).values())


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_known_as_its_model_without_being_loaded(tied, tmp_path):
    model = random_model("llama", tie_word_embeddings=tied).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    known = identity(model.float(), str(tmp_path), portable_fingerprint(model))
    assert Checkpoint(tmp_path, model.config).identity == known


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path):
    model = random_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    with torch.no_grad():
        model.model.norm.weight.fill_(2)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert set(Checkpoint(tmp_path, model.config).tensor_files.values()) == {tmp_path / "model.safetensors"}
    assert type(model).from_pretrained(tmp_path).model.norm.weight.eq(2).all()


def test_damaged_missing_and_other_weights_are_one_line(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ExportError, match=r"lacks model\.safetensors.*not \.bin"):
        assert Checkpoint(tmp_path, random_model("llama").config).tensor_files
    save_file({"a": torch.zeros(8)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-4])
    with pytest.raises(ExportError, match="truncated"):
        assert Checkpoint(tmp_path, random_model("llama").config).tensor_files
