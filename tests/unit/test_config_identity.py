"""A profile belongs to a configuration, too: the same weights compute something else under another one."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig

from adaskip.calibration.measure import calibrate
from adaskip.calibration.select import select
from adaskip.core.config_identity import config_fingerprint
from adaskip.models.companion_files import model_files, tokenizer_fingerprint
from adaskip.models.errors import ModelError
from adaskip.profiles.fields import ProfileError
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from tests.families import FAMILIES, random_model, random_prompts

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def model():
    return random_model("llama")


@pytest.fixture(scope="module")
def measured(model):
    """A profile of each kind."""
    prompts = random_prompts([8, 9])
    chosen = select(model, prompts, "prefill", up_to=1, eos_token_ids=[2], pad_token_id=0)
    return {"importance": calibrate(model, prompts), "selection": chosen}


@pytest.fixture
def changed(model, monkeypatch):
    """The same weights under another configuration."""
    monkeypatch.setattr(model, "config", deepcopy(model.config))
    model.config.rope_parameters = YARN
    return model


@pytest.mark.parametrize("kind", ["importance", "selection"])
def test_a_profile_of_another_configuration_is_refused_and_allowed_with_a_warning(measured, changed, kind, caplog):
    profile = measured[kind]
    with pytest.raises(ProfileError, match=r"another configuration .*--allow-other-weights"):
        profile.check_fits(changed)
    profile.check_fits(changed, allow_other_weights=True)
    assert "another configuration" in caplog.text


@pytest.mark.parametrize("kind", ["importance", "selection"])
def test_a_profile_records_its_configuration_and_a_file_without_one_fits_as_before(
    measured, model, changed, kind, tmp_path
):
    profile = measured[kind]
    assert profile.config_fingerprint != config_fingerprint(changed.config)
    record = json.loads(profile.save(tmp_path / "profile.json").read_text())
    assert record["config_fingerprint"] == profile.config_fingerprint
    for name in ("config_fingerprint", "tokenizer_files"):
        del record[name]
    (tmp_path / "older.json").write_text(json.dumps(record))
    reader = ImportanceProfile if kind == "importance" else SelectionProfile
    assert reader.load(tmp_path / "older.json", changed) == replace(profile, config_fingerprint=None)


def test_a_fingerprint_that_is_no_text_is_refused(measured):
    with pytest.raises(ProfileError, match="config_fingerprint must be a string, or null; got 3"):
        replace(measured["importance"], config_fingerprint=3)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": YARN},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"num_attention_heads": 2, "head_dim": 8},
        {"max_position_embeddings": 64},
        {"tie_word_embeddings": True},
        {"num_hidden_layers": 3},
    ],
)
def test_what_changes_the_output_changes_the_fingerprint(change):
    shape: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 4, "max_position_embeddings": 128}
    assert config_fingerprint(LlamaConfig(**shape)) != config_fingerprint(LlamaConfig(**{**shape, **change}))


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("mistral", "sliding_window", 7),
        ("gemma2", "layer_types", ["full_attention", "sliding_attention"]),
        ("gemma2", "attn_logit_softcapping", 30.0),
        ("gemma3", "query_pre_attn_scalar", 8),
        ("granite", "residual_multiplier", 0.5),
        ("granite", "logits_scaling", 3.0),
        ("mixtral", "num_experts_per_tok", 1),
    ],
)
def test_what_a_family_has_of_its_own_counts(family, name, value):
    config = random_model(family, num_layers=2).config
    known = config_fingerprint(config)
    assert getattr(config, name) != value
    setattr(config, name, value)
    assert config_fingerprint(config) != known


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_configuration_has_the_fingerprint_of_the_model(family, tmp_path):
    config = random_model(family, num_layers=2).config
    config.save_pretrained(tmp_path)
    assert config_fingerprint(type(config).from_pretrained(tmp_path)) == config_fingerprint(config)


def test_notation_and_fields_that_nothing_depends_on_do_not_count():
    newer = LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})
    older_fields: dict[str, Any] = {"rope_theta": 5000, "rope_scaling": {"type": "linear", "factor": 2}}
    older = LlamaConfig(**older_fields, attention_dropout=0.1)
    assert config_fingerprint(older) == config_fingerprint(newer)
    windowless = MistralConfig(sliding_window=None)
    known = config_fingerprint(windowless)
    windowless.layer_types = ["full_attention"] * windowless.num_hidden_layers
    assert config_fingerprint(windowless) == known


def test_end_tokens_are_those_of_generation_and_else_of_the_configuration(tmp_path):
    config = LlamaConfig(eos_token_id=7)
    assert model_files(tmp_path, config)["config_stop_token_ids"] == [7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 8]}')
    assert model_files(tmp_path, config)["config_stop_token_ids"] == [8, 9]
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ModelError, match=r"generation_config\.json is invalid"):
        model_files(tmp_path, config)


def test_a_tokenizer_is_known_by_its_files_alone(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    known = tokenizer_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("about")
    assert tokenizer_fingerprint(tmp_path) == known
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_fingerprint(tmp_path) != known


def test_the_header_of_a_gguf_file_is_its_tokenizer(tmp_path):
    (file := tmp_path / "a.gguf").write_bytes(b"GGUF" + b"tokens" * 10000)
    known = tokenizer_fingerprint(file)
    file.write_bytes(b"GGUF" + b"tokens" * 5000 + b"others" + b"tokens" * 4999)
    assert tokenizer_fingerprint(file) != known
