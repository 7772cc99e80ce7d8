"""Models that cannot be loaded: every missing, damaged or unsuitable file and every wrong option is one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from adaskip.models import checkpoints
from adaskip.models.registry import registry
from tests import family_snapshots
from tests.family_snapshots import FAMILIES, edit_config, refused

no_network = family_snapshots.no_network
snapshots = family_snapshots.snapshots
damaged = family_snapshots.damaged


def first_weights(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


@pytest.mark.parametrize(("name", "hint"), [("lama", "Did you mean 'llama'?"), ("gpt", "Allowed: llama, internlm")])
def test_unknown_model_name(name, hint):
    message = refused(name)
    assert f"unknown model {name!r}" in message
    assert hint in message


def test_nothing_to_load_is_refused():
    assert (
        "give a model (llama, internlm, vicuna, smollm2, a Hub id, a folder or a .gguf file) or a checkpoint"
        in refused()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_weights_say_what_to_do(tmp_path, monkeypatch, family):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused(family)
    for part in (
        registry()[family].checkpoint,
        registry()[family].revision,
        "--checkpoint DIR",
        "hf download",
        "--testbed",
    ):
        assert part in message


def test_hub_out_of_reach_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no\nroute")))
    assert "download failed (no route)" in refused(None, "org/name")


def test_missing_folder():
    assert "'./no/such/folder' does not exist" in refused("llama", "./no/such/folder")


def test_file_instead_of_folder(snapshots):
    assert "is a file" in refused("llama", snapshots["llama"] / "config.json")


def test_folder_without_config(tmp_path):
    assert "has no config.json" in refused("llama", tmp_path)


def test_broken_config(damaged):
    (damaged / "config.json").write_text("{")
    assert "is not valid JSON" in refused("llama", damaged)


def test_impossible_config(damaged):
    edit_config(damaged, num_attention_heads=5)
    assert "config.json is not usable" in refused("llama", damaged)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "made_up", "architectures": ["MadeUpForCausalLM"], "auto_map": {"AutoConfig": "code.Config"}},
    ],
)
def test_wrong_architecture(damaged, config):
    edit_config(damaged, **config)
    (damaged / "code.py").write_text("raise SystemExit('remote code was run')")
    message = refused("llama", damaged)
    assert config["architectures"][0] in message
    assert "not a causal language model" in message


def test_no_weights(damaged):
    for path in damaged.glob("model*"):
        path.unlink()
    assert "has no weights" in refused("llama", damaged)


def test_truncated_safetensors(damaged):
    path = first_weights(damaged)
    path.write_bytes(path.read_bytes()[:-100])
    message = refused("llama", damaged)
    assert path.name in message
    assert "truncated" in message


def test_git_lfs_pointer_instead_of_weights(damaged):
    first_weights(damaged).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "truncated or not a safetensors file" in refused("llama", damaged)


def test_missing_shard(damaged):
    path = first_weights(damaged)
    path.unlink()
    message = refused("llama", damaged)
    assert "lacks 1 of" in message
    assert path.name in message


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', "null", "{"])
def test_an_index_that_is_none(damaged, content):
    (damaged / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json is not a weight index: " in refused("llama", damaged)


def test_an_index_that_names_no_files(damaged):
    (damaged / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": 1}}')
    assert "lacks 1 of 1 weight files, first 1" in refused("llama", damaged)


def test_weights_missing_from_the_files(damaged):
    (damaged / "model.safetensors.index.json").unlink()
    first_weights(damaged).rename(damaged / "model.safetensors")
    assert "weights of LlamaForCausalLM, first" in refused("llama", damaged)


def test_damaged_bin_and_bin_with_code_are_refused(snapshots, tmp_path):
    folder = Path(shutil.copytree(snapshots["vicuna"], tmp_path / "copy"))
    path = sorted(folder.glob("pytorch_model-*.bin"))[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path} is truncated ({len(whole) // 2} bytes): download it again" in refused("vicuna", folder)
    path.write_bytes(b"no torch file")
    assert "cannot be loaded" in refused("vicuna", folder)
    torch.save({"model.norm.weight": print}, path)
    assert "cannot be loaded" in refused("vicuna", folder)


def test_missing_tokenizer(snapshots, damaged, tmp_path):
    for path in damaged.glob("tokenizer*"):
        path.unlink()
    assert "the tokenizer in" in refused("llama", damaged)
    folder = Path(shutil.copytree(snapshots["internlm"], tmp_path / "internlm"))
    (folder / "tokenizer.model").unlink()
    assert "has no tokenizer.model" in refused("internlm", folder)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"dtype": "half-ish"}, "unknown dtype 'half-ish'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device_map": "auto"}, "device and device_map both place the model"),
        ({"attn_implementation": "no_such_attention"}, "no_such_attention"),
    ],
)
def test_impossible_options(snapshots, options, text):
    assert text in refused("llama", snapshots["llama"], **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there(snapshots):
    assert "finds no CUDA device" in refused("llama", snapshots["llama"], device="cuda")
