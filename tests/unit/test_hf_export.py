"""Exports for transformers give the tokens of `skipping`, and are there whole or not at all."""

from __future__ import annotations

import json
import re
import resource
import stat

import pytest
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from adaskip.common.folders import scratch_folder
from adaskip.core.context import skipping
from adaskip.core.kv_cache import skipped_layers
from adaskip.core.plan import SkipPlan, Sublayer
from adaskip.engines.checkpoint import Checkpoint, save_in_memory
from adaskip.engines.errors import ExportError
from adaskip.engines.export import export_to
from adaskip.engines.families import FAMILIES as FAMILY_DATA
from adaskip.engines.registry import Export
from adaskip.engines.shorter import shortened
from adaskip.models.loading import exportable_tokenizer, load_source, load_tokenizer
from adaskip.models.pretrained import from_pretrained
from adaskip.models.source import find_source
from adaskip.strategies import FixedPlan
from tests.checkpoints import write_family
from tests.exported import PLANS, export_of, tokens
from tests.families import random_model, random_prompts

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "granite", "gemma2"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Of each family a model and its checkpoint, made once."""
    made = {}

    def source(family: str):
        if family not in made:
            model = random_model(family)
            made[family] = (model, save_in_memory(model, None, tmp_path_factory.mktemp(family)))
        return made[family]

    return source


# Scales and shorter configurations differ between families; weights that are left out do not.
EXPORTS = [
    pytest.param(
        family, name, marks=[] if name in ("both", "whole layers") or family == "llama" else [pytest.mark.slow]
    )
    for family in FAMILIES
    for name in PLANS
]


@pytest.mark.parametrize(("family", "name"), EXPORTS)
def test_the_exported_model_gives_the_tokens_of_the_plan(family, name, sources, tmp_path):
    model, source = sources(family)
    strategy = FixedPlan(num_layers=4, plan=PLANS[name])
    report = export_to("hf", Export(strategy, source), tmp_path / "out", verify=name in ("both", "whole layers"))
    assert name not in ("both", "whole layers") or report["verified"]["distance"] <= report["verified"]["limit"]
    attention = model.config._attn_implementation
    exported = from_pretrained(tmp_path / "out", attn_implementation=attention)
    prompt = random_prompts([14])[0][None]
    with skipping(model, strategy):
        expected = tokens(model, prompt)
    assert tokens(exported, prompt) == expected
    assert isinstance(exported, type(model))


def test_exported_tokens_are_not_those_of_the_full_model(tmp_path):
    """Else the tests above could not fail."""
    model, prompt = random_model("llama"), random_prompts([14])[0][None]
    full = tokens(model, prompt)
    for plan in PLANS.values():
        with skipping(model, FixedPlan(num_layers=4, plan=plan)):
            assert tokens(model, prompt) != full


def test_whole_layers_make_a_plain_shorter_checkpoint(tmp_path):
    model = random_model("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2)
    export_to("hf", export_of(model, PLANS["whole layers"], tmp_path / "source"), tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.num_hidden_layers, config.max_window_layers) == (2, 1)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    shorter = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = random_prompts([20])[0][None]
    with skipping(model, FixedPlan(num_layers=4, plan=PLANS["whole layers"])):
        expected = tokens(model, prompt)
    assert tokens(shorter, prompt) == expected


def test_a_layer_that_is_set_up_otherwise_is_found(tmp_path, monkeypatch):
    """Here the windows are those of the first layers and not of the live ones."""
    model = random_model("gemma2")
    export = export_of(model, SkipPlan.of_layers([0]), tmp_path / "source")
    monkeypatch.setattr("adaskip.engines.hf_export.shortened", lambda config, live: shortened(config, [0, 1, 2]))
    with pytest.raises(ExportError, match="set up otherwise than in the source"):
        export_to("hf", export, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_stock_classes_refuse_what_they_would_fill_with_random_weights(tmp_path):
    export_to("hf", export_of(random_model("llama"), PLANS["attention"], tmp_path / "source"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"adaskip-llama|AdaSkipLlamaConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_skipped_sublayers_are_absent_and_stay_so(tmp_path):
    model = random_model("llama")
    export_to("hf", export_of(model, PLANS["both"], tmp_path / "source"), tmp_path / "out")
    exported = from_pretrained(tmp_path / "out")
    live = sum(
        p.numel() for n, p in model.named_parameters() if not re.search(r"2\.self_attn|2\.input_l|[12]\.(mlp|post)", n)
    )
    assert sum(p.numel() for p in exported.parameters()) == live
    cache = exported(random_prompts([6])[0][None], use_cache=True).past_key_values
    assert skipped_layers(cache) == {2}
    with pytest.raises(ExportError, match="copy the folder"):
        exported.save_pretrained(tmp_path / "again")


def test_internlm_is_exported_as_llama(tmp_path):
    source = find_source(checkpoint=write_family("internlm", tmp_path / "internlm"))
    loaded = load_source(source, device="cpu", dtype="float32").model
    weights = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    save_file(weights, tmp_path / "internlm" / "model.safetensors", metadata={"format": "pt"})
    plan = SkipPlan.of_sublayers({Sublayer("attention", 0): 1.2, Sublayer("ffn", 0): 0.9})
    strategy = FixedPlan(num_layers=2, plan=plan)
    checkpoint = Checkpoint(source.path, source.own_config)
    with pytest.raises(ExportError, match=r"the tokenizer of .*internlm needs remote code"):
        export_to("hf", Export(strategy, checkpoint), tmp_path / "out")
    export = Export(strategy, checkpoint, tokenizer=exportable_tokenizer(source.path))
    assert export_to("hf", export, tmp_path / "out")["verified"]
    text = "The quick brown fox. <eoh>\n"
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == load_tokenizer(source.path)(text).input_ids
    )
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    prompt = random_prompts([9])[0][None]
    with skipping(loaded, strategy):
        expected = tokens(loaded, prompt)
    assert tokens(from_pretrained(tmp_path / "out", dtype="float32"), prompt) == expected


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_stock_tokenizer_goes_along_and_is_loaded_afterwards(engine, tmp_path, monkeypatch):
    folder = write_family("llama", tmp_path / "s")
    source = find_source(checkpoint=folder)
    (folder / "tekken.json").write_text("{}")
    (folder / "tokenizer_code.py").write_text("")
    export = Export(FixedPlan(num_layers=2, plan=SkipPlan(ffn={1})), Checkpoint(folder, source.own_config))
    export_to(engine, export, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out", config=source.own_config)
    assert loaded("a").input_ids == load_tokenizer(folder)("a").input_ids
    assert (tmp_path / "out" / "tekken.json").is_file()
    assert not list((tmp_path / "out").glob("*.py"))
    monkeypatch.setattr("adaskip.engines.checkpoint.COMPANIONS", ("tokenizer_config.json",))
    with pytest.raises(ExportError, match="the tokenizer of the exported folder"):
        export_to(engine, export, tmp_path / "again")
    assert not (tmp_path / "again").exists()


REFUSED = {
    "phase decode": ({"phase": "decode"}, "changes its plan"),
    "zero scale": ({"plan": SkipPlan.of_sublayers({Sublayer("ffn", 1): 0.0})}, "cannot be folded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_write_nothing(name, tmp_path):
    options, message = REFUSED[name]
    export = export_of(
        random_model("llama"), options.get("plan", PLANS["both"]), tmp_path / "s", options.get("phase", "e2e")
    )
    with pytest.raises(ExportError, match=message) as error:
        export_to("hf", export, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_float64_weights_are_refused_before_writing_unless_none_is_divided(tmp_path, monkeypatch):
    export = export_of(random_model("llama").double(), PLANS["both"], tmp_path / "s")
    with monkeypatch.context() as patched:
        patched.setattr("adaskip.engines.hf_export.write", lambda *args: pytest.fail("was written"))
        with pytest.raises(ExportError, match=r"whose weights are torch\.float64; allowed: torch\.float32") as error:
            export_to("hf", export, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert export_to(
        "hf", export_of(random_model("llama").double(), PLANS["no scales"], tmp_path / "s"), tmp_path / "o"
    )


def test_quantised_checkpoints_and_unknown_engines_are_refused(tmp_path):
    export = export_of(random_model("llama"), PLANS["both"], tmp_path / "s")
    with pytest.raises(ValueError, match=r"unknown engine 'hff'\. Did you mean 'hf'\?"):
        export_to("hff", export, tmp_path / "out")
    config = tmp_path / "s" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ExportError, match="quantised weights"):
        export_to("hf", export, tmp_path / "out")


def test_an_output_that_is_not_empty_is_refused_and_kept(tmp_path):
    export = export_of(random_model("llama"), PLANS["both"], tmp_path / "s")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        export_to("hf", export, tmp_path / "out")
    with pytest.raises(ValueError, match="is a file"):
        export_to("hf", export, tmp_path / "out" / "mine")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_wrong_weights_are_found_after_writing_and_removed(tmp_path, monkeypatch):
    export = export_of(random_model("llama"), PLANS["both"], tmp_path / "s")
    monkeypatch.setattr("adaskip.engines.families.Edit.tensor", lambda self, name, tensor: tensor)
    with pytest.raises(ExportError, match=r"logits differ .* allowed: 0\.001"):
        export_to("hf", export, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert export_to("hf", export, tmp_path / "out", verify=False)["verified"] is None


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """The limit on the size of files ends writing as a full disk does."""
    export = export_of(random_model("llama"), PLANS["both"], tmp_path / "s")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors cannot be written: .*[Ff]ile too large") as error:
            export_to("hf", export, tmp_path / "out")
        with scratch_folder(tmp_path / "out") as folder, pytest.raises(OSError, match="cannot be written"):
            save_in_memory(random_model("llama"), None, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_signal_leaves_nothing_and_what_a_killed_export_left_is_removed(tmp_path, monkeypatch):
    export = export_of(random_model("llama"), PLANS["both"], tmp_path / "s")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("adaskip.engines.shards.save_file", stop)
        with pytest.raises(KeyboardInterrupt):
            export_to("hf", export, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    (tmp_path / ".out.abc_1234.tmp").mkdir()
    (tmp_path / ".out.abc_1234.tmp" / "model.safetensors").write_bytes(b"half")
    export_to("hf", export, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "s"]
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == 0o644


@pytest.mark.parametrize(("short", "long"), [("m", "m.gguf"), ("out", "out.v2")])
def test_an_export_leaves_a_running_one_of_a_longer_name_alone(short, long, tmp_path):
    with scratch_folder(tmp_path / long) as running, scratch_folder(tmp_path / short) as folder:
        assert running.is_dir()
        assert folder.is_dir()


@pytest.mark.parametrize("model_type", FAMILY_DATA)
def test_every_field_of_a_family_with_an_entry_per_layer_is_known(model_type):
    config = AutoConfig.for_model(model_type)
    live = list(range(1, config.num_hidden_layers))
    fields = shortened(config, live)
    shorter = type(config)(**{**config.to_dict(), **fields})
    assert shorter.num_hidden_layers == len(live)
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None) is not None:
            assert getattr(shorter, name) == getattr(config, name)[1:]


def test_an_unknown_list_with_an_entry_per_layer_is_refused():
    config = AutoConfig.for_model("llama", num_hidden_layers=3, odd=[1, 2, 3])
    with pytest.raises(ExportError, match="field odd of LlamaConfig"):
        shortened(config, [0, 1])
