"""Folders for vLLM: what they hold, and which models vLLM would compute otherwise. With vLLM: `make test-engines`."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from adaskip.core.plan import SkipPlan, Sublayer
from adaskip.core.strategy import FixedPlan
from adaskip.engines import vllm_configs
from adaskip.engines.checkpoint import Checkpoint
from adaskip.engines.errors import ExportError
from adaskip.engines.export import export_to
from adaskip.engines.registry import Export
from adaskip.engines.vllm_plugin import ARCHITECTURES
from tests.families import random_model

ROOT = Path(__file__).parents[2]
PLAN = SkipPlan.of_sublayers({Sublayer("attention", 0): 1.6, Sublayer("ffn", 1): 0.8})
MIXED_TYPES = ["sliding_attention", "full_attention"] * 2
WINDOWS = {"layer_types": MIXED_TYPES, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 4}
HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}


def source(family: str, folder: Path, **options) -> Checkpoint:
    """A checkpoint of a random model of four layers."""
    model = random_model(family, **options)
    model.save_pretrained(folder)
    return Checkpoint(folder, model.config)


def exported(checkpoint: Checkpoint, folder: Path, plan: SkipPlan = PLAN) -> dict:
    """The report of the export."""
    strategy = FixedPlan(num_layers=checkpoint.config.num_hidden_layers, plan=plan)
    return export_to("vllm", Export(strategy, checkpoint), folder)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_folder_names_an_architecture_of_the_plugin_and_lacks_the_skipped_weights(family, tmp_path):
    report = exported(source(family, tmp_path / "source"), tmp_path / "served")
    assert report["verified"]["distance"] < 1e-3
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURES[family]]
    assert config["model_type"] == f"adaskip-{family}"
    assert (config["adaskip"]["attention"], config["adaskip"]["ffn"]) == ([0], [1])
    names = load_file(tmp_path / "served" / "model.safetensors")
    assert not any(name.startswith(("model.layers.0.self_attn", "model.layers.1.mlp")) for name in names)
    assert "model.layers.0.mlp.down_proj.weight" in names


def test_transformers_does_not_load_the_folder_as_a_full_model(tmp_path):
    """It knows the type only if an earlier test of this process has registered the plugin's configurations."""
    exported(source("llama", tmp_path / "source"), tmp_path / "served")
    with pytest.raises(ValueError, match=r"adaskip-llama|AdaSkipLlamaConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "served")


def test_the_plugin_has_a_class_and_a_configuration_for_each_architecture(tmp_path):
    tree = ast.parse((ROOT / "adaskip" / "engines" / "vllm_models.py").read_text())
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert set(ARCHITECTURES.values()) <= classes
    vllm_configs.register_configs()
    vllm_configs.register_configs()
    for model_type in ARCHITECTURES:
        stock = AutoConfig.for_model(model_type)
        ours = AutoConfig.for_model(f"adaskip-{model_type}")
        assert isinstance(ours, type(stock))
        assert {**ours.to_dict(), "model_type": model_type} == stock.to_dict()


def test_the_entry_point_is_light_to_import():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["vllm.general_plugins"]["adaskip"].split(":")
    code = (
        f"import sys; from {module} import {name}; "
        "assert not {'torch', 'transformers', 'vllm', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_dynamic_rope_becomes_the_plain_rope_that_it_is_within_the_limit(tmp_path):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0}
    exported(source("llama", tmp_path / "source", rope_parameters=dynamic), tmp_path / "served")
    vllm_configs.register_configs()
    rope = AutoConfig.from_pretrained(tmp_path / "served").rope_parameters
    assert (rope["rope_type"], rope["rope_theta"]) == ("default", 5000.0)


@pytest.mark.parametrize(
    ("family", "options", "line"),
    [
        ("phi3", {}, "models of type 'phi3' cannot be exported"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'; allowed: silu"),
        ("llama", {"rope_parameters": HALF_ROPE}, "part of each head"),
        ("qwen2", {"rope_parameters": LONG_ROPE}, "rope type 'longrope'"),
        ("qwen2", WINDOWS, "a sliding window in some of the layers"),
        ("qwen3", WINDOWS, "a sliding window in some of the layers"),
        ("llama", {"sliding_window": 8}, "a sliding window, which LLaMA does not have"),
        ("qwen2", {"head_dim": 8}, "heads of 8; allowed: hidden_size / num_attention_heads = 4"),
        ("qwen3", {"attention_bias": True}, "biases in the attention; allowed: attention_bias false"),
    ],
)
def test_models_that_vllm_computes_otherwise_are_refused(family, options, line, tmp_path):
    checkpoint = source(family, tmp_path / "source", **options)
    with pytest.raises(ExportError, match=line):
        exported(checkpoint, tmp_path / "served")
    assert not (tmp_path / "served").exists()


def test_a_quantised_weights_scales_take_the_factor_and_its_integers_stay(tmp_path, caplog):
    checkpoint = source("llama", tmp_path / "source")
    quantise(checkpoint.folder, torch.float32)
    assert exported(checkpoint, tmp_path / "served")["verified"] == {"compared": False}
    assert "not compared" in caplog.text
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "served"))
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(after[f"{name}_scale"], before[f"{name}_scale"] / 1.6)
    assert torch.equal(after[name], before[name])


def test_scales_are_not_folded_into_weights_of_eight_bits(tmp_path):
    checkpoint = source("llama", tmp_path / "source")
    quantise(checkpoint.folder, torch.float8_e4m3fn)
    with pytest.raises(ExportError, match=r"weight_scale of dtype torch\.float8_e4m3fn"):
        exported(checkpoint, tmp_path / "refused")
    exported(checkpoint, tmp_path / "served", SkipPlan(attention=frozenset({1})))


@pytest.mark.parametrize(("smaller", "divisor"), [(0.05, 1e4), (1.0, 1e-7)], ids=["digits lost", "infinite"])
def test_half_precision_scales_that_cannot_hold_the_quotient_are_refused(smaller, divisor, tmp_path):
    checkpoint = source("llama", tmp_path / "source")
    quantise(checkpoint.folder, torch.float16, smaller)
    plan = SkipPlan.of_sublayers({Sublayer("attention", 0): divisor})
    with pytest.raises(ExportError, match=r"proj\.weight_scale, divided by .*allowed: 0\.01") as error:
        exported(checkpoint, tmp_path / "served", plan)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "served").exists()
    exported(checkpoint, tmp_path / "served", SkipPlan.of_sublayers({Sublayer("attention", 0): 1.2}))


def test_float64_weights_are_refused_before_anything_is_written(tmp_path):
    random_model("llama").double().save_pretrained(tmp_path / "source")
    checkpoint = Checkpoint(tmp_path / "source", AutoConfig.from_pretrained(tmp_path / "source"))
    with pytest.raises(ExportError, match=r"dtype torch\.float64; allowed: .*torch\.float32"):
        exported(checkpoint, tmp_path / "served")
    assert not (tmp_path / "served").exists()


def quantise(folder: Path, dtype: torch.dtype, smaller: float = 1.0) -> None:
    """Weights of eight bits, with a scale of `dtype` for each output channel, in the place of the layers' matrices.

    smaller: a factor of the scales."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors |= {name: (tensors[name] / scale).round().to(torch.int8), f"{name}_scale": (scale * smaller).to(dtype)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))
