"""`--allow-other-weights`: a profile of other weights serves a run only where the user says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adaskip import testbed
from adaskip.core.plan import PHASES
from adaskip.models.loading import LoadedModel, load_model
from adaskip.profiles.fields import ProfileError
from adaskip.runs.config import RunConfig
from adaskip.runs.job import resolve
from adaskip.runs.profiles import profile_for
from adaskip.studies.bench.settings import BenchConfig
from adaskip.studies.bench.subject import find_importance, find_selections
from tests.profiles import profile_of, selection_of

CELL = {"testbed": True, "model": "llama", "phase": "decode", "budget": 2}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("llama", testbed.checkpoint_dir("llama"), device="cpu", dtype="float32")


@pytest.fixture
def profiles(loaded, tmp_path):
    """Profiles of another model of that depth, by strategy."""
    depth = loaded.model.config.num_hidden_layers
    made = {"adaskip": profile_of([0.5] * depth, [0.6] * depth), "calibrated": selection_of(depth, "decode")}
    return {strategy: (profile, profile.save(tmp_path / f"{strategy}.json")) for strategy, profile in made.items()}


@pytest.mark.parametrize("strategy", ["adaskip", "calibrated"])
def test_a_run_takes_a_profile_of_other_weights_only_if_told_to(strategy, loaded, profiles):
    profile, path = profiles[strategy]
    config = RunConfig(**CELL, strategy=strategy, profile=str(path))
    with pytest.raises(ProfileError, match="--allow-other-weights"):
        profile_for(resolve(config), loaded)
    assert profile_for(resolve(replace(config, allow_other_weights=True)), loaded) == (profile, path)


def test_a_benchmark_takes_profiles_of_other_weights_only_if_told_to(loaded, profiles):
    files = {"profile": str(profiles["adaskip"][1]), "selection": (str(profiles["calibrated"][1]),)}
    config = BenchConfig(testbed=True, phases=PHASES, strategies=("adaskip", "calibrated"), **files)
    for read in (find_importance, find_selections):
        with pytest.raises(ProfileError, match="--allow-other-weights"):
            read(config, loaded.model)
    allowed = replace(config, allow_other_weights=True)
    assert find_importance(allowed, loaded.model) == profiles["adaskip"][0]
    assert find_selections(allowed, loaded.model) == {
        ("calibrated", "prefill"): None,
        ("calibrated", "decode"): profiles["calibrated"][0],
        ("calibrated", "e2e"): None,
    }
    assert allowed.identity == config.identity


def test_the_option_without_a_profile_is_refused():
    with pytest.raises(ValueError, match="--allow-other-weights needs --profile"):
        RunConfig(**CELL, strategy="adaskip", allow_other_weights=True)
    with pytest.raises(ValueError, match="--allow-other-weights needs --profile or --selection"):
        BenchConfig(testbed=True, allow_other_weights=True)
