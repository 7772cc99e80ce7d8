"""What `--model` takes besides the names of `configs/models.yaml`, and what its runs are called."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, modeling_gguf_pytorch_utils
from transformers.utils import logging as hf_logging

from adaskip.models import gguf_file
from adaskip.models.errors import ModelError
from adaskip.models.loading import load_model
from adaskip.models.registry import registry
from adaskip.models.source import find_source
from adaskip.runs.calibrate_config import CalibrateConfig
from adaskip.runs.cells import Cell, parse_run_name
from adaskip.runs.config import GridConfig, RunConfig
from tests.checkpoints import write_family
from tests.tiny_runs import make_checkpoint


def run_config(**options) -> RunConfig:
    return RunConfig(**{"phase": "prefill", "strategy": "adaskip", **options})


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct@v1.0", "Qwen2.5-7B-Instruct"),
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct"),
        ("llama", "llama"),
    ],
)
def test_runs_are_called_by_the_last_part_of_a_hub_id(given, name):
    assert find_source(given).name == name


def test_runs_are_called_by_the_folder_or_file_whatever_the_path(tmp_path, monkeypatch):
    for folder in ("Qwen2.5-7B-Instruct", "models--Qwen--Qwen2.5-7B-Instruct/snapshots/abc"):
        (tmp_path / folder).mkdir(parents=True)
        assert find_source(str(tmp_path / folder)).name == "Qwen2.5-7B-Instruct"
    assert find_source(f"{tmp_path}/Qwen2.5-7B-Instruct/").name == "Qwen2.5-7B-Instruct"
    monkeypatch.chdir(tmp_path / "Qwen2.5-7B-Instruct")
    assert find_source(".").name == "Qwen2.5-7B-Instruct"
    (tmp_path / "a model [1]").mkdir()
    assert find_source(str(tmp_path / "a model [1]")).name == "a_model_1_"
    (tmp_path / "Tiny-1.5B.Q4_1.gguf").write_bytes(b"GGUF")
    assert find_source(str(tmp_path / "Tiny-1.5B.Q4_1.gguf")).name == "Tiny-1.5B.Q4_1"


@pytest.mark.parametrize("model", ["Qwen2.5-7B-Instruct", "a-ADA-PREFILL", "SmolLM2.Q4_1", "llama"])
def test_run_names_of_any_model_read_back(model):
    name = Cell(model, "prefill", "adaskip", 4).run_name
    assert name == f"{model}-ADA-PREFILL"
    assert parse_run_name(name) == (model, "prefill", "adaskip")


def test_only_names_of_the_registry_are_read_in_any_case():
    assert parse_run_name("LLAMA-ada-prefill") == ("llama", "prefill", "adaskip")
    assert parse_run_name("Qwen2-0.5B-ada-prefill") == ("Qwen2-0.5B", "prefill", "adaskip")


def test_a_hub_id_of_the_registry_has_its_entrys_settings_and_pinned_revision():
    source, entry = find_source("internlm/internlm-chat-7b-8k"), registry()["internlm"]
    assert (source.entry, source.revision, source.chat) == (entry, entry.revision, entry.chat)
    assert find_source("org/other").entry is None
    assert find_source("org/other").chat == "none"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            "lama",
            "unknown model 'lama'. Did you mean 'llama'? Allowed: llama, internlm, vicuna, smollm2, a Hub id org/name",
        ),
        ("./nowhere", "model './nowhere' does not exist: no such folder or .gguf file"),
        ("/no/where", "model '/no/where' does not exist"),
        ("org/file.gguf", "model 'org/file.gguf' does not exist"),
        ("", "unknown model ''"),
    ],
)
def test_what_names_no_model_is_refused_when_the_options_are_read(given, says):
    for make in (run_config, CalibrateConfig, lambda model: GridConfig(models=(model,))):
        with pytest.raises(ModelError, match=f"^{re.escape(says)}"):
            make(model=given)


def test_a_folder_that_is_called_like_a_model_of_the_registry_is_refused(tmp_path):
    (tmp_path / "llama").mkdir()
    with pytest.raises(ModelError, match=r"use --model llama --checkpoint .* or rename the folder"):
        find_source(str(tmp_path / "llama"))
    assert find_source("llama", tmp_path / "llama").name == "llama"


def test_a_file_that_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(
        ModelError, match=r"is a file, but must be a folder with config\.json and weights, or a \.gguf file"
    ):
        find_source(str(tmp_path / "weights.bin"))


def test_two_names_of_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--model org/name and --checkpoint x both name weights"):
        run_config(model="org/name", checkpoint="x")


def test_two_models_of_a_grid_whose_runs_would_be_called_alike_are_refused():
    with pytest.raises(ValueError, match="model given more than once: name"):
        GridConfig(models=("one/name", "other/name"))


def test_the_testbed_has_its_own_models_only(tmp_path):
    with pytest.raises(ValueError, match=r"unknown model of testbed 'org/name'\. Allowed: llama, internlm, vicuna"):
        run_config(model="org/name", testbed=True)


def test_a_folder_without_an_entry_is_prompted_up_to_its_positions(tmp_path):
    loaded = load_model(str(make_checkpoint(tmp_path / "Tiny-1.5")), device="cpu")
    assert (loaded.spec.name, loaded.spec.max_prompt_tokens, loaded.spec.stop_strings) == ("Tiny-1.5", 32768 - 512, ())
    assert loaded.spec.chat_template is None


# GGUF


def write_gguf(path: Path, family: Path) -> LlamaForCausalLM:
    """The weights and tokenizer of a Llama checkpoint as a GGUF file of unquantised weights."""
    gguf = pytest.importorskip("gguf")
    loaded = load_model(str(family), device="cpu")
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    tokens = sorted(loaded.tokenizer.get_vocab().items(), key=lambda item: item[1])
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), num_key_value_heads=2, **size, **shape))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([1] * len(tokens))
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_merges([])
    writer.add_bos_token_id(loaded.tokenizer.eos_token_id)  # without one, transformers 5.17 cannot read the tokenizer
    writer.add_eos_token_id(loaded.tokenizer.eos_token_id)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {
        **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
        **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
        **{"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    }
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        named = names[stem] if stem in names else f"blk.{layer}.{inner[part]}"
        if part in ("self_attn.q_proj", "self_attn.k_proj"):  # GGUF's order of the rotary halves
            tensor = tensor.view(2, 2, 16, 64).transpose(1, 2).reshape(64, 64)
        writer.add_tensor(f"{named}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval()


@pytest.fixture
def gguf_path(tmp_path) -> Path:
    return tmp_path / "Tiny-1.5B.F32.gguf"


@pytest.fixture
def written(tmp_path, gguf_path) -> LlamaForCausalLM:
    return write_gguf(gguf_path, write_family("llama", tmp_path / "family"))


@pytest.mark.parametrize("asked", [True, False])
def test_bars_while_weights_are_dequantised_are_drawn_only_if_asked_for(gguf_path, written, asked, capsys):
    before = hf_logging.is_progress_bar_enabled()
    (hf_logging.enable_progress_bar if asked else hf_logging.disable_progress_bar)()
    try:
        capsys.readouterr()
        load_model(str(gguf_path), device="cpu")
        assert ("GGUF" in capsys.readouterr().err) == asked
    finally:
        (hf_logging.enable_progress_bar if before else hf_logging.disable_progress_bar)()
    assert modeling_gguf_pytorch_utils.tqdm is tqdm


def test_a_gguf_file_is_loaded_with_its_weights_and_can_be_saved(gguf_path, written, tmp_path):
    loaded = load_model(str(gguf_path), device="cpu")
    assert loaded.spec.name == "Tiny-1.5B.F32"
    assert loaded.spec.max_prompt_tokens == 2048 - 512
    assert find_source(str(gguf_path)).num_layers == 3
    ids = torch.randint(4, 100, (1, 9))
    torch.testing.assert_close(loaded.model(ids).logits, written(ids).logits)
    assert not hasattr(loaded.model.config, "quantization_config")
    loaded.model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, loaded.model(ids).logits)


def test_a_truncated_gguf_file_is_one_line(gguf_path, written):
    gguf_path.write_bytes(gguf_path.read_bytes()[:3000])
    with pytest.raises(ModelError, match="is damaged or not usable") as error:
        load_model(str(gguf_path), device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.gguf", b"no such thing", "is not a GGUF file: it begins with b'no s'"),
        ("a-00001-of-00002.gguf", b"GGUF", "is one shard of a split GGUF file"),
    ],
)
def test_what_is_no_whole_gguf_file_is_refused(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=says):
        find_source(str(tmp_path / name)).check()


def test_without_the_package_gguf_the_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "is_gguf_available", lambda: False)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="reading it needs the package gguf: pip install gguf"):
        load_model(str(tmp_path / "a.gguf"), device="cpu")


def test_a_folder_with_a_gguf_file_alone_names_the_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"to load one of its GGUF files, name the file itself: a\.gguf"):
        find_source(str(tmp_path)).check()
