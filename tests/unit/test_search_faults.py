"""Searches with damaged progress, other models, and outputs that overflow."""

from __future__ import annotations

import json
import math

import pytest
import torch

from adaskip.calibration import progress
from adaskip.calibration.divergence import OutputDivergence
from adaskip.calibration.measure import calibrate
from adaskip.calibration.progress import Progress
from adaskip.calibration.search import search
from adaskip.calibration.select import select
from adaskip.core.fingerprint import weights_fingerprint
from adaskip.core.generate import generate
from adaskip.core.plan import SkipPlan, Sublayer
from adaskip.profiles.fields import ProfileError
from adaskip.profiles.importance import ImportanceProfile
from tests.families import random_model, random_prompts

pytestmark = pytest.mark.usefixtures("short_answers")

PROMPTS = random_prompts([9, 7, 8])
CANDIDATES = [Sublayer(kind, layer) for layer in range(3) for kind in ("attention", "ffn")]


def selected(model, **options):
    profile = select(model, PROMPTS, "prefill", up_to=2, eos_token_ids=[2], pad_token_id=0, **options)
    return {count: (chosen.plan, chosen.divergence) for count, chosen in profile.selected.items()}


DAMAGE = [
    {"divergence": "x"}, {"divergence": None}, {"divergence": math.nan}, {"divergence": -3}, {"seconds": "a"},
    {"seconds": math.nan}, {"seconds": -1}, {"prompt": [1]}, {"prompt": 99}, {"prompt": True}, {"prompt": -1},
    {"prompt": 1.0}, {"set": [["ffn", "1"]]}, {"set": [["norm", 1]]}, {"set": [["ffn", True]]}, {"divergence": 10**400},
]  # fmt: skip


def test_damaged_lines_are_measured_again(tmp_path):
    model, path = random_model("llama", 3), tmp_path / "search.jsonl"
    expected = selected(model, progress_path=path)
    head, *lines = path.read_text().splitlines()
    damaged = [json.dumps({**json.loads(line), **damage}) for line, damage in zip(lines, DAMAGE * 9, strict=False)]
    path.write_text("\n".join([head, *damaged, "[" * 100_000, ""]))
    assert selected(model, progress_path=path) == expected


def test_an_infinite_divergence_is_kept():
    """It is what an output that overflows is worth: measured, and no damage."""
    line = {"set": [["ffn", 1]], "prompt": 0, "divergence": math.inf, "seconds": 0.1}
    assert progress._measured(json.loads(json.dumps(line))) is not None


def test_one_file_serves_the_searches_of_several_models(tmp_path):
    """Also where all of them are given the same importance, which says nothing of the model that is searched."""
    model, other, path = random_model("llama", 3), random_model("llama", 3, seed=1), tmp_path / "search.jsonl"
    importance = calibrate(model, PROMPTS)
    first = selected(model, importance=importance, progress_path=path)
    fresh = selected(other, importance=importance, allow_other_weights=True)
    assert fresh != first
    assert selected(other, importance=importance, progress_path=path, allow_other_weights=True) == fresh
    other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 17.0}
    changed = type(other)(other.config).eval()
    changed.load_state_dict(other.state_dict())
    assert weights_fingerprint(changed) == weights_fingerprint(other)
    options = {"importance": importance, "allow_other_weights": True}
    assert selected(changed, progress_path=path, **options) == selected(changed, **options)


@pytest.mark.parametrize("layers", [2, 4])
def test_importance_of_another_depth_is_refused_before_anything_is_measured(layers, monkeypatch):
    importance = calibrate(random_model("llama", layers), PROMPTS)
    monkeypatch.setattr("adaskip.calibration.select.calibrate", lambda *args, **kwargs: pytest.fail("measured"))
    for allowed in (False, True):
        with pytest.raises(ProfileError, match="layers"):
            selected(random_model("llama", 3), importance=importance, allow_other_weights=allowed)


def test_importance_of_other_weights_is_refused():
    importance = calibrate(random_model("llama", 3, seed=1), PROMPTS)
    with pytest.raises(ProfileError, match="weights"):
        selected(random_model("llama", 3), importance=importance)


def test_a_probability_of_0_where_the_full_model_has_none_is_infinitely_divergent():
    model = random_model("llama")
    divergence = OutputDivergence(
        model, random_prompts([9]), "prefill", answers=[[5, 7]], eos_token_ids=[2], pad_token_id=0
    )
    model.lm_head.register_forward_hook(lambda *call: call[-1].index_fill(-1, torch.tensor([7]), -torch.inf))
    assert divergence(SkipPlan(ffn={1})) == [math.inf]


def test_a_search_ends_where_the_usual_set_overflows():
    usual = frozenset(CANDIDATES[:1])

    def measure(chosen, which):
        return [math.inf if chosen == usual else float(len(chosen)) for _ in which]

    choices = search(measure, CANDIDATES, num_layers=3, num_prompts=3, up_to=1, starts={"adaskip": {1: usual}},
                     default="adaskip")  # fmt: skip
    assert choices[1].sublayers != usual
    assert math.isfinite(choices[1].divergence)


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), True, "1"])
def test_numbers_that_no_float_can_be_are_refused_in_one_line(value, tmp_path):
    with pytest.raises(ValueError, match="finite number"):
        SkipPlan(ffn={1}, scales={Sublayer("ffn", 1): value})
    path = calibrate(random_model("llama", 3), PROMPTS).save(tmp_path / "profile.json")
    record = json.loads(path.read_text())
    record["ffn"]["scale"][1] = value
    path.write_text(json.dumps(record))
    with pytest.raises(ProfileError):
        ImportanceProfile.load(path)


def test_a_number_of_more_digits_than_python_reads_names_the_file(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text('{"tokens": ' + "1" * 5000 + "}")
    with pytest.raises(ProfileError, match=r"profile\.json is not JSON"):
        ImportanceProfile.load(path)


def test_answers_of_a_model_in_training_mode_are_refused():
    with pytest.raises(ValueError, match="training mode"):
        generate(random_model("llama").train(), None, PROMPTS, max_new_tokens=2, eos_token_ids=[2], pad_token_id=0)


def test_progress_is_only_of_the_prompts_there_are(tmp_path):
    path = tmp_path / "search.jsonl"
    Progress(lambda chosen, prompt: 0.5, path, {"of": "this"})(frozenset(CANDIDATES[:1]), [0, 7])
    assert len(Progress(lambda chosen, prompt: 0.5, path, {"of": "this"}, num_prompts=3).known) == 1
