"""A saved plan says which model it is for, is that model's alone, and skips what its strategy skips."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import replace

import pytest
import torch

from adaskip.common import named_files
from adaskip.common.folders import new_folder
from adaskip.core.context import skipping
from adaskip.core.fingerprint import portable_fingerprint
from adaskip.core.model_plan import make_plan
from adaskip.core.plan import PLAN_FILE, Budget, SkipPlan, Sublayer
from adaskip.core.plan_card import plan_map
from adaskip.core.strategy import FixedPlan
from adaskip.models.loading import load_source
from adaskip.models.source import find_source
from adaskip.profiles.fields import ProfileError
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from adaskip.speculative import lossless
from adaskip.strategies import AdaSkip, EarlyExit, SkipDecode
from tests.checkpoints import write_family
from tests.families import random_model, random_prompts
from tests.profiles import profile_of, selection_of

SCALED = SkipPlan.of_sublayers({Sublayer("attention", 1): 1.25, Sublayer("ffn", 2): 0.75})
PROMPT = random_prompts([8])[0][None]


@pytest.fixture(scope="module")
def model():
    return random_model("llama")


def fixed(phase="e2e", plan=SCALED):
    return FixedPlan(num_layers=4, plan=plan, phase=phase)


def tokens(model, strategy, **options):
    with skipping(model, strategy, **options):
        return model.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0).tolist()


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_a_plan_from_its_folder_skips_what_its_strategy_skips(phase, model, tmp_path):
    plan = make_plan(model, fixed(phase), base_model="org/tiny")
    read = SkipPlan.from_pretrained(plan.save_pretrained(tmp_path / "plan"))
    assert (read, read.origin) == (plan, plan.origin)
    assert tokens(model, read) == tokens(model, fixed(phase))
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["README.md", PLAN_FILE]


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    with new_folder(tmp_path / "link") as folder:
        (folder / "file").write_text("text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "place" / "file").read_text() == "text"


def test_phases_of_a_plan_differ(model):
    """Else the test above could not tell them apart."""
    assert tokens(model, make_plan(model, fixed("decode"))) != tokens(model, make_plan(model, fixed("e2e")))


def test_the_card_names_base_model_map_and_choice(model, tmp_path):
    profile = profile_of([0.5] * 4, [0.9] * 4, weights_fingerprint="other", dataset="qasper")
    strategy = AdaSkip(num_layers=4, budget=Budget(sublayers=2), profile=profile, learning_window=0)
    with pytest.raises(ProfileError, match="allow_other_weights"):
        make_plan(model, strategy)
    plan = make_plan(model, strategy, base_model="org/tiny", allow_other_weights=True)
    card = (plan.save_pretrained(tmp_path) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: adaskip\nbase_model: org/tiny\n")
    assert "ffn        ##..\n" in card
    assert "| budget | sublayers 2 |" in card
    assert "dataset qasper, data_ids a b, tokens 100" in card
    origin = json.loads((tmp_path / PLAN_FILE).read_text())["origin"]
    assert origin["options"] == {"learning_window": 0, "beta_quantile": None}
    assert origin["profile"]["weights_fingerprint"] == "other"


CARDS = {
    "nothing": "",
    "a checkpoint's card": "---\nlibrary_name: transformers\n---\n# Mine\n",
    "a quotation": "---\nlicense: mit\n---\nlibrary_name: adaskip\n",
}


@pytest.mark.parametrize("name", CARDS)
def test_a_readme_of_somebody_else_is_kept(name, model, tmp_path):
    (tmp_path / "README.md").write_text(CARDS[name])
    with pytest.raises(ValueError, match=r"README\.md was not written by adaskip") as error:
        make_plan(model, fixed()).save_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == CARDS[name]


def test_a_card_of_an_earlier_plan_is_replaced_also_where_the_hub_has_changed_it(model, tmp_path):
    plan = make_plan(model, fixed(), base_model="org/tiny")
    card = plan.save_pretrained(tmp_path) / "README.md"
    card.write_text("---\nlicense: mit\n" + card.read_text().removeprefix("---\n"))
    make_plan(model, fixed("prefill"), base_model="org/tiny").save_pretrained(tmp_path)
    assert "| phase | prefill |" in card.read_text()


def test_a_folder_is_recorded_by_its_absolute_path_and_is_no_hub_id(model, tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    plan = make_plan(model, fixed(), base_model="models/tiny")
    assert plan.origin.model == str(tmp_path / "models" / "tiny")
    card = (plan.save_pretrained("plan") / "README.md").read_text()
    assert "base_model" not in card
    assert f'load_model(checkpoint="{tmp_path}/models/tiny")' in card


@pytest.mark.parametrize("name", ["package:small-weights/w.gguf", "~/tiny", "../tiny", "LlamaForCausalLM"])
def test_what_is_not_on_the_hub_is_no_base_model_of_a_card(name, model, tmp_path):
    assert (
        "base_model"
        not in (make_plan(model, fixed(), base_model=name).save_pretrained(tmp_path) / "README.md").read_text()
    )


def test_the_code_of_a_card_runs(tmp_path, monkeypatch, capsys):
    source = find_source(checkpoint=write_family("llama", tmp_path / "tiny"))
    small = load_source(source, device="cpu").model
    plan = make_plan(small, FixedPlan(num_layers=2, plan=SkipPlan(ffn={1})), base_model=str(tmp_path / "tiny"))
    card = (plan.save_pretrained(tmp_path / "plan") / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "plan")
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    assert "The capital of France is" in capsys.readouterr().out


def test_maps_of_deep_models_are_cut_into_lines_of_a_hundred_layers():
    lines = plan_map(SkipPlan(frozenset({0, 101}), frozenset({99})), 120).splitlines()
    assert lines[1] == f"attention  #{'.' * 99}"
    assert lines[2] == f"ffn        {'.' * 99}#"
    assert lines[4] == f"attention  .#{'.' * 18}"


def test_a_plan_is_refused_for_other_weights_unless_they_are_allowed(model, caplog):
    plan = make_plan(model, fixed())
    other = random_model("llama", seed=1)
    with pytest.raises(ValueError, match=r"plan was made for .* with weights .*allow_other_weights=True") as error:
        tokens(other, plan)
    assert "\n" not in str(error.value)
    assert tokens(other, plan, allow_other_weights=True) == tokens(other, fixed())
    assert "it is used anyway" in caplog.text


def test_a_plan_is_refused_for_another_depth_or_width_or_configuration(model):
    plan = make_plan(model, fixed())
    with pytest.raises(ValueError, match="plan of LlamaForCausalLM has 4 layers, but the model has 5"):
        tokens(random_model("llama", num_layers=5), plan, allow_other_weights=True)
    with pytest.raises(ValueError, match="has hidden size 16, but the model has 32"):
        tokens(random_model("llama", hidden_size=32), plan, allow_other_weights=True)
    changed = copy.deepcopy(model)
    changed.config.rms_norm_eps = 0.5
    with pytest.raises(ValueError, match="another configuration"):
        tokens(changed, plan)


def test_the_same_weights_in_another_float_dtype_are_the_same_model(model):
    rounded = copy.deepcopy(model).bfloat16()
    widened = copy.deepcopy(rounded).float()
    assert portable_fingerprint(rounded) == portable_fingerprint(widened) == portable_fingerprint(model)
    assert portable_fingerprint(random_model("llama", seed=1)) != portable_fingerprint(model)
    assert len(tokens(rounded, make_plan(model, fixed()))[0]) == 20


def test_a_plan_without_a_model_skips_end_to_end_and_is_not_saved(model, tmp_path):
    assert tokens(model, SCALED) == tokens(model, fixed())
    with pytest.raises(ValueError, match="does not say which model"):
        SCALED.save_pretrained(tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


def test_a_plan_with_an_origin_is_not_saved_with_keeps_kv(model, tmp_path):
    kept = replace(make_plan(model, fixed()), keeps_kv=True)
    for save in (kept.save_pretrained, kept.save):
        with pytest.raises(ValueError, match="a plan with an origin is saved without keeps_kv"):
            save(tmp_path / "plan")
    assert not (tmp_path / "plan").exists()
    again = FixedPlan(num_layers=4, phase="prefill", plan=make_plan(model, fixed()), keep_kv=True)
    assert again.prefill_plan == kept


def test_a_plan_drafts_losslessly(model):
    plain = model.generate(PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=0)
    drafted = model.generate(
        PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=0, custom_generate=lossless(model, SCALED)
    )
    assert torch.equal(drafted, plain)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (SkipDecode(num_layers=4, budget=Budget(layers=2)), "changes its set during an answer"),
        (
            AdaSkip(num_layers=4, budget=Budget(sublayers=1), profile=profile_of([0.5] * 4, [0.6] * 4)),
            "allowed: .*learning_window=0",
        ),
        (EarlyExit(num_layers=5, budget=Budget(layers=1)), "made for 5 layers, the model has 4"),
    ],
    ids=["schedule", "online learning", "depth"],
)
def test_strategies_that_no_plan_can_hold_are_refused(strategy, message, model):
    with pytest.raises(ValueError, match=message):
        make_plan(model, strategy)


def test_a_plan_with_its_origin_survives_copies_and_pickles(model):
    plan = make_plan(model, fixed())
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert (twin, twin.origin) == (plan, plan.origin)
    assert replace(plan, origin=None) == plan


CORRUPT = [
    ({"origin": None}, "must be an object"),
    ({"origin": {}}, "lacks model, num_layers"),
    ({"origin.extra": 1}, "unknown fields extra"),
    ({"origin.phase": "both"}, "unknown phase 'both'"),
    ({"origin.num_layers": 2}, "layers 0..1"),
    ({"origin.num_layers": True}, "num_layers of a plan must be a whole number"),
    ({"origin.model": None}, "model of a plan must be a string"),
    ({"origin.budget": 3}, "budget of a plan must be an object"),
    ({"attention": None}, "must be a list of layers"),
    ({"format": "other"}, "is not a skip plan"),
]


@pytest.mark.parametrize(("change", "message"), CORRUPT, ids=str)
def test_a_corrupt_plan_is_one_clear_line(change, message, model, tmp_path):
    path = make_plan(model, fixed()).save_pretrained(tmp_path) / PLAN_FILE
    record = json.loads(path.read_text())
    for name, value in change.items():
        owner = record["origin"] if name.startswith("origin.") else record
        owner[name.removeprefix("origin.")] = value
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as error:
        SkipPlan.from_pretrained(tmp_path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_published_names_stand_for_plans_and_profiles(model, tmp_path, monkeypatch):
    monkeypatch.setattr(named_files, "PUBLISHED", tmp_path)
    plan = make_plan(model, fixed())
    plan.save(tmp_path / "tiny-plan.json")
    profile_of([0.5] * 4, [0.6] * 4).save(tmp_path / "tiny.json")
    selection_of(4, "decode").save(tmp_path / "tiny-selection.json")
    assert SkipPlan.from_pretrained("tiny-plan") == plan
    assert ImportanceProfile.load("tiny") == profile_of([0.5] * 4, [0.6] * 4)
    assert SelectionProfile.load("tiny-selection") == selection_of(4, "decode")
    with pytest.raises(FileNotFoundError, match=r"did you mean 'tiny-plan'\? \(published: tiny, tiny-plan, tiny-sel"):
        SkipPlan.from_pretrained("tiny-plam")
    with pytest.raises(ValueError, match="is not a skip plan: format is 'adaskip-importance-profile/1'"):
        SkipPlan.from_pretrained("tiny")
    with pytest.raises(ValueError, match=f"has no {PLAN_FILE}"):
        SkipPlan.from_pretrained(tmp_path)


def test_profiles_are_read_from_folders(tmp_path):
    profile_of([0.5] * 4, [0.6] * 4).save(tmp_path / ImportanceProfile.FILE)
    assert ImportanceProfile.load(tmp_path).num_layers == 4


def test_what_is_published_can_be_read_and_says_of_what_it_was_made():
    kinds = {kind.FORMAT: kind for kind in (ImportanceProfile, SelectionProfile)}
    for name, path in named_files.published().items():
        found = kinds.get(str(named_files.read_format(path)), SkipPlan).load(path)
        about = found.origin if isinstance(found, SkipPlan) else found
        assert about is not None, name
        assert all((about.model, about.weights_fingerprint, about.config_fingerprint)), name
