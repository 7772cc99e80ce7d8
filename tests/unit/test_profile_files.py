"""No profile holds what cannot have been measured, and a damaged file is one clear line."""

from __future__ import annotations

import copy
import json
import logging
import math

import pytest
import torch
from torch import nn

from adaskip.calibration.divergence import OutputDivergence
from adaskip.calibration.measure import calibrate
from adaskip.core.adapters import active_adapters
from adaskip.core.plan import SkipPlan
from adaskip.profiles.fields import ProfileError
from adaskip.profiles.importance import ImportanceProfile, SublayerMeans
from adaskip.profiles.selection import Selected, SelectionProfile
from tests.families import random_model, random_prompts
from tests.profiles import profile_of, selection_of

NOT_NUMBERS = ["0.5", None, True, [0.5], {}]
NAN, INFINITY = math.nan, math.inf


@pytest.mark.parametrize("similarity", [1.1, -1.1, 5.0, NAN, INFINITY, -INFINITY, *NOT_NUMBERS])
def test_a_similarity_is_a_cosine(similarity):
    with pytest.raises(ProfileError, match="a similarity must be a number from -1 to 1"):
        SublayerMeans((0.5, similarity), (1.0, 1.0))


@pytest.mark.parametrize("scale", [-0.1, NAN, INFINITY, *NOT_NUMBERS])
def test_a_scale_is_a_ratio_of_norms(scale):
    with pytest.raises(ProfileError, match="a scale must be"):
        SublayerMeans((0.5, 0.5), (1.0, scale))


def test_rounding_may_bring_a_mean_of_cosines_a_little_above_1():
    assert SublayerMeans((1.0 + 5e-7,), (0.0,)).similarity == (1.0 + 5e-7,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"divergence": value}, "a divergence must be") for value in (-0.1, NAN, INFINITY, *NOT_NUMBERS)]
    + [({"ffn": {1: value}}, "the scale of ffn 1 must be") for value in (0.0, -1.0, NAN, INFINITY, *NOT_NUMBERS)]
    + [({"ffn": {key: 1.0}}, "a layer must be a whole number") for key in (-1, "-1", "x", "01", " 1", 1.0, True, None)]
    + [({"attention": [1]}, "attention must map layers to scales"), ({"found_by": 3}, "found_by must be a string")],
)
def test_a_chosen_set_has_scales_above_0_and_a_divergence(fields, message):
    good = {"attention": {}, "ffn": {1: 1.0}, "divergence": 0.1, "found_by": "search"}
    assert Selected(**good).plan == SkipPlan(ffn={1}, scales={("ffn", 1): 1.0})
    with pytest.raises(ProfileError, match=message):
        Selected(**{**good, **fields})


def test_no_divergence_is_below_zero():
    """A sum of float32 terms may be, for a set that changes next to nothing."""
    model, prompts = random_model("llama"), random_prompts([9, 7, 30])
    ends = {"eos_token_ids": [2], "pad_token_id": 0}
    for phase in ("prefill", "decode", "e2e"):
        divergence = OutputDivergence(model, prompts, phase, **ends)
        with torch.no_grad():
            for passage in divergence.passages:
                passage.reference.add_(-1e-6)  # a little less than a distribution: its divergence from itself is < 0
        assert divergence(SkipPlan()) == [0.0] * len(divergence)


def changed(record, *path_and_value):
    """The record with the value at a path replaced."""
    *path, last, value = path_and_value
    record = copy.deepcopy(record)
    part = record
    for name in path:
        part = part[name]
    part[last] = value
    return record


IMPORTANCE_CHANGES = [
    *[("ffn", "similarity", 1, value) for value in (None, "0.5", 2, True, [], NAN)],
    *[("ffn", "scale", 1, value) for value in (None, "1", -1, True, INFINITY)],
    *[("layer", value) for value in (None, [], 3, "x", {}, {"similarity": [0.1, 0.2]})],
    *[("layer", "similarity", value) for value in (None, "12", 3, {"0": 1, "1": 1}, [0.1], [0.1, 0.2, 0.3])],
    ("layer", "more", [1.0, 1.0]),
    *[("tokens", value) for value in (0, -5, 1.5, "9", None, True)],
    *[("phase", value) for value in ("e2e", None, 3, [])],
    *[("model", value) for value in (None, 3, [])],
    *[("data_ids", value) for value in (None, "ab", 3, [None], [[]], {"a": {}})],
    *[("versions", value) for value in (None, [], "x", {"torch": 2})],
    *[("hidden_size", value) for value in (0, "16", True)],
    *[("adapter", value) for value in (0, [], False)],
    *[("prompts_begin_with_bos", value) for value in (0, 1, "true", [])],
    ("something_new", 1),
]
SELECTION_CHANGES = [
    *[("selected", value) for value in (None, [], {}, 3, {"1": None}, {"1": []}, {"1": {}}, {"x": {}})],
    *[("selected", "2", "divergence", value) for value in (None, "1", -1, True, NAN)],
    *[("selected", "2", "ffn", value) for value in (None, [], {"1": None}, {"1": -1.0}, {"x": 1.0}, {"9": 1, "1": 1})],
    ("selected", "2", "more", 1),
    *[("cost", value) for value in (None, [], {"seconds": 1})],
    *[("cost", "seconds", value) for value in (None, "1", -1, NAN)],
    *[("cost", "num_forwards", value) for value in (None, 1.5, -1, True)],
    *[("num_layers", value) for value in (None, 0, "2", 1.5)],
    *[("phase", value) for value in ("all", None, [])],
    ("weights_fingerprint", None),
]


@pytest.mark.parametrize("change", IMPORTANCE_CHANGES, ids=str)
def test_a_malformed_importance_profile_is_one_clear_line(change, tmp_path):
    refused_in_one_line(profile_of([0.1, 0.2], [0.3, 0.4]), change, tmp_path / "p.json")


@pytest.mark.parametrize("change", SELECTION_CHANGES, ids=str)
def test_a_malformed_selection_is_one_clear_line(change, tmp_path):
    refused_in_one_line(selection_of(2, "decode"), change, tmp_path / "s.json")


def refused_in_one_line(profile, change, path):
    profile.save(path)
    assert type(profile).load(path) == profile
    path.write_text(json.dumps(changed(json.loads(path.read_text()), *change)))
    with pytest.raises(ProfileError) as error:
        type(profile).load(path)
    assert str(error.value).startswith(f"{path} is not a valid ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{", b"nothing", b"3", b"null", b"[" * 100_000])
def test_what_is_no_profile_at_all_is_one_clear_line(content, tmp_path):
    path = tmp_path / "p.json"
    path.write_bytes(content)
    for kind in (ImportanceProfile, SelectionProfile):
        with pytest.raises(ProfileError) as error:
            kind.load(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("profile", [profile_of([0.1, 0.2], [0.3, 0.4]), selection_of(2, "e2e")], ids=["i", "s"])
def test_files_from_before_the_newer_fields_are_read(profile, tmp_path):
    path = profile.save(tmp_path / "p.json")
    record = json.loads(path.read_text())
    for name in ("hidden_size", "adapter", "prompts_begin_with_bos"):
        assert record.pop(name) is None
    path.write_text(json.dumps(record))
    assert type(profile).load(path) == profile


@pytest.fixture(scope="module")
def measured():
    return calibrate(random_model("llama"), random_prompts([9, 5]))


def test_a_profile_of_other_weights_can_be_used_knowingly(measured, tmp_path, caplog):
    path, other = measured.save(tmp_path / "p.json"), random_model("llama", seed=1)
    with pytest.raises(ProfileError, match=r"allow_other_weights=True \(command line: --allow-other-weights\)"):
        ImportanceProfile.load(path, other)
    with caplog.at_level(logging.WARNING):
        assert ImportanceProfile.load(path, other, allow_other_weights=True) == measured
    (warning,) = caplog.messages
    assert measured.model in warning
    assert measured.weights_fingerprint in warning
    assert calibrate(other, random_prompts([4])).weights_fingerprint in warning


def test_nothing_is_said_where_the_weights_are_the_same(measured, tmp_path, caplog):
    path = measured.save(tmp_path / "p.json")
    with caplog.at_level(logging.WARNING):
        ImportanceProfile.load(path, random_model("llama"), allow_other_weights=True)
    assert not caplog.messages


def test_a_selection_of_other_weights_can_be_used_knowingly(tmp_path, caplog):
    path = selection_of(4, "decode").save(tmp_path / "s.json")
    with pytest.raises(ProfileError, match="select for this model, or accept the difference"):
        SelectionProfile.load(path, random_model("llama"))
    with caplog.at_level(logging.WARNING):
        SelectionProfile.load(path, random_model("llama"), allow_other_weights=True)
    assert len(caplog.messages) == 1


def test_depth_and_width_must_agree_even_then(measured, tmp_path):
    path = measured.save(tmp_path / "p.json")
    with pytest.raises(ProfileError, match="has 4 layers, but the model has 2"):
        ImportanceProfile.load(path, random_model("llama", num_layers=2), allow_other_weights=True)
    with pytest.raises(ProfileError, match="has hidden size 16, but the model has 32"):
        ImportanceProfile.load(path, random_model("llama", hidden_size=32), allow_other_weights=True)
    selection = selection_of(2, "decode").save(tmp_path / "s.json")
    with pytest.raises(ProfileError, match="has 2 layers, but the model has 4"):
        SelectionProfile.load(selection, random_model("llama"), allow_other_weights=True)


class Adapted(nn.Module):
    """A linear layer with adapters, with the attributes by which PEFT's layers are known."""

    adapter_layer_names = ("lora_A",)

    def __init__(self, base, names):
        super().__init__()
        self.base_layer, self.scaling = base, dict.fromkeys(names, 2.0)
        self.lora_A = nn.ModuleDict({name: nn.Linear(base.in_features, base.out_features) for name in names})
        self.active_adapters, self.disable_adapters, self.merged = list(names), False, False

    def forward(self, x):
        extra = (0.1 * self.scaling[n] * self.lora_A[n](x) for n in self.active_adapters if not self.disable_adapters)
        return sum(extra, self.base_layer(x))


def test_a_profile_says_which_adapter_was_active_and_is_refused_under_another(tmp_path):
    model = random_model("llama")
    assert calibrate(model, random_prompts([4])).adapter == ""
    layer = Adapted(model.model.layers[0].self_attn.q_proj, ["one", "two"])
    model.model.layers[0].self_attn.q_proj = layer
    assert active_adapters(model) == "one x2, two x2"
    layer.active_adapters = ["two"]
    profile = calibrate(model, random_prompts([4]))
    assert profile.adapter == "two x2"
    path = profile.save(tmp_path / "p.json")
    assert ImportanceProfile.load(path, model) == profile
    layer.disable_adapters = True
    with pytest.raises(ProfileError, match="with active adapter 'two x2', but this model has 'none'"):
        ImportanceProfile.load(path, model)
    ImportanceProfile.load(path, model, allow_other_weights=True)
    layer.disable_adapters, layer.merged = False, True
    assert active_adapters(model) == ""


def test_a_peft_model_is_measured_with_its_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    model, prompts = peft.get_peft_model(random_model("llama"), config).eval(), random_prompts([9, 5])
    merged = copy.deepcopy(model).merge_and_unload()
    for phase in ("prefill", "decode"):
        profile = calibrate(model, prompts, phase=phase, max_new_tokens=5)
        assert profile.adapter == "default x2"
        expected = calibrate(merged, prompts, phase=phase, max_new_tokens=5)
        assert expected.adapter == ""
        assert profile.attention.similarity == pytest.approx(expected.attention.similarity, abs=1e-5)
    path = profile.save(tmp_path / "p.json")
    assert ImportanceProfile.load(path, model.get_base_model()) == profile
    with model.disable_adapter(), pytest.raises(ProfileError, match="with active adapter 'default x2'"):
        ImportanceProfile.load(path, model)
