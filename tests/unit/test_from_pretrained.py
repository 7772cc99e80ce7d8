"""`from_pretrained` loads exports and plans as models that skip for good; any other folder is one line."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from safetensors.torch import load_file, save_file

from adaskip.calibration.measure import calibrate
from adaskip.core.context import skipping
from adaskip.core.model_plan import make_plan
from adaskip.core.plan import EMPTY_PLAN, SkipPlan
from adaskip.engines.errors import ExportError
from adaskip.engines.export import export_to
from adaskip.models.loading import load_weights
from adaskip.models.pretrained import from_pretrained
from adaskip.models.rope import fix_dynamic_rope
from adaskip.models.source import find_source
from adaskip.speculative import lossless
from adaskip.strategies import FixedPlan
from tests.checkpoints import write_family
from tests.exported import PLANS, export_of, tokens
from tests.families import random_model, random_prompts


@pytest.mark.parametrize("kind", ["plan", "export"])
def test_a_model_that_skips_for_good_says_so(kind, tmp_path):
    model = random_model("llama")
    plan = make_plan(model, FixedPlan(num_layers=4, plan=PLANS["both"]), base_model=str(tmp_path / "source"))
    export = export_of(model, plan, tmp_path / "source")
    if kind == "export":
        export_to("hf", export, tmp_path / "out", verify=False)
    loaded = from_pretrained(plan.save_pretrained(tmp_path / "plan") if kind == "plan" else tmp_path / "out")
    prompt = random_prompts([6])[0]
    expected = tokens(loaded, prompt[None])
    uses = {
        "skipping": lambda: skipping(loaded, plan).__enter__(),
        "lossless": lambda: lossless(loaded, plan),
        "calibrate": lambda: calibrate(loaded, [prompt]),
        "copy": lambda: copy.deepcopy(loaded),
        "pickle": lambda: pickle.dumps(loaded),
    }
    for use in uses.values():
        with pytest.raises(
            ValueError, match=r"loaded by adaskip\.from_pretrained and skips for good.* stock model"
        ) as error:
            use()
        assert "\n" not in str(error.value)
    assert tokens(loaded, prompt[None]) == expected


def test_a_plan_folder_is_loaded_as_a_model_that_skips(tmp_path):
    model = random_model("llama")
    model.save_pretrained(tmp_path / "base")
    plan = make_plan(model, FixedPlan(num_layers=4, plan=PLANS["both"]), base_model=str(tmp_path / "base"))
    prompt = random_prompts([14])[0][None]
    with skipping(model, plan):
        expected = tokens(model, prompt)
    assert tokens(from_pretrained(plan.save_pretrained(tmp_path / "plan")), prompt) == expected


def test_a_plain_checkpoint_is_refused(tmp_path):
    random_model("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ExportError, match=r"plain has no adaskip_plan\.json and no adaskip_export\.json") as error:
        from_pretrained(tmp_path / "plain")
    assert "\n" not in str(error.value)


def test_a_plan_beside_the_weights_of_its_model_is_applied(tmp_path):
    model = random_model("llama")
    model.save_pretrained(tmp_path)
    plan = make_plan(model, FixedPlan(num_layers=4, plan=PLANS["both"]), base_model="org/elsewhere")
    plan.save_pretrained(tmp_path)
    prompt = random_prompts([14])[0][None]
    with skipping(model, plan):
        expected = tokens(model, prompt)
    assert tokens(from_pretrained(tmp_path), prompt) == expected != tokens(model, prompt)
    random_model("llama", seed=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this model's weights are"):
        from_pretrained(tmp_path)


def test_a_plan_of_weights_in_a_package_is_loaded(tmp_path, monkeypatch):
    whole = export_of(random_model("llama", hidden_size=32, intermediate_size=64), EMPTY_PLAN, tmp_path / "source")
    export_to("gguf", whole, tmp_path / "package" / "weights.gguf")
    metadata = tmp_path / "package" / "small_weights-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: small-weights\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(tmp_path / "package")
    name = "package:small-weights/weights.gguf"
    source = find_source(checkpoint=name)
    model = load_weights(source.path, source.own_config, {})
    plan = make_plan(model, FixedPlan(num_layers=4, plan=PLANS["both"]), base_model=name)
    prompt = random_prompts([14])[0][None]
    with skipping(model, plan):
        expected = tokens(model, prompt)
    assert plan.origin.model == name
    assert tokens(from_pretrained(plan.save_pretrained(tmp_path / "plan")), prompt) == expected


def test_a_plan_of_internlm_is_loaded_without_remote_code(tmp_path):
    source = find_source(checkpoint=write_family("internlm", tmp_path / "internlm"))
    model = load_weights(source.path, source.own_config, {"dtype": "float32"})
    plan = make_plan(model, FixedPlan(num_layers=2, plan=SkipPlan(ffn={1})), base_model=source.checkpoint)
    loaded = from_pretrained(plan.save_pretrained(tmp_path / "plan"), dtype="float32")
    prompt = random_prompts([9])[0][None]
    with skipping(model, plan):
        assert tokens(loaded, prompt) == tokens(model, prompt)


def test_folders_of_other_programs_and_incomplete_ones_are_one_line(tmp_path):
    export_to("hf", export_of(random_model("llama"), PLANS["both"], tmp_path / "s"), tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"lacks 1 weights of LlamaForCausalLM, first model\.layers\.0\.mlp\.up"):
        from_pretrained(tmp_path / "out")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ExportError, match=r"model\.safetensors is truncated or no safetensors file"):
        from_pretrained(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no adaskip_plan\.json"):
        from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="neither a folder here nor org/name"):
        from_pretrained("nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adaskip": None}, "is no folder of `adaskip export --to hf` with skipped sublayers"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"intermediate_size": 8}, r"has other sizes of 6 weights of LlamaForCausalLM, first model\.layers\.1\.mlp"),
    ],
    ids=["no plan", "no such model", "another size"],
)
def test_a_damaged_configuration_is_one_line(changes, message, tmp_path):
    export_to("hf", export_of(random_model("llama"), PLANS["ffn"], tmp_path / "s"), tmp_path / "out", verify=False)
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(ExportError, match=message) as error:
        from_pretrained(tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ('"adaskip"', "holds no JSON object")])
def test_a_configuration_that_is_no_record_is_one_line(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ExportError, match=rf"config\.json {message}"):
        from_pretrained(tmp_path)


def test_a_plan_whose_model_was_moved_is_one_line(tmp_path):
    model = random_model("llama")
    plan = make_plan(model, FixedPlan(num_layers=4, plan=PLANS["both"]), base_model=str(tmp_path / "moved"))
    with pytest.raises(
        ExportError, match=r"the model of the plan in .*plan cannot be loaded: .*moved' does not"
    ) as error:
        from_pretrained(plan.save_pretrained(tmp_path / "plan"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["both", "whole layers"])
def test_an_export_of_a_model_with_dynamic_rope_gives_the_tokens_of_skipping_beyond_the_limit(name, tmp_path, caplog):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = random_model("llama", rope_parameters=rope, max_position_embeddings=24)
    export_to("hf", export_of(model, PLANS[name], tmp_path / "source"), tmp_path / "out", verify=False)
    assert ("stock classes raise the base of dynamic NTK rope" in caplog.text) == (name == "whole layers")
    assert fix_dynamic_rope(model)
    loaded = from_pretrained(tmp_path / "out")
    for length in (12, 40, 60, 30):
        prompt = random_prompts([length])[0][None]
        with skipping(model, PLANS[name]):
            expected = tokens(model, prompt)
        assert tokens(loaded, prompt) == expected
