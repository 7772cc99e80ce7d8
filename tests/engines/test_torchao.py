"""Models quantised by torchao: calibrated, and their profiles loaded.

They run in the environment of the engines: transformers imports torchao wherever it is installed, and its messages
would precede the output of every command.
"""

from __future__ import annotations

import pytest

from adaskip.calibration.measure import calibrate
from adaskip.core.fingerprint import weights_fingerprint
from adaskip.profiles.importance import ImportanceProfile
from tests.families import random_model, random_prompts

torchao = pytest.importorskip("torchao.quantization")
pytestmark = pytest.mark.engines

WIDE = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_a_torchao_model_is_calibrated_and_its_profile_loaded(name, tmp_path):
    def fresh(seed=0):
        model = random_model("llama", seed=seed, **WIDE).bfloat16()
        torchao.quantize_(model, getattr(torchao, name)())
        return model

    profile = calibrate(fresh(), random_prompts([9, 5]), phase="decode", max_new_tokens=4)
    ImportanceProfile.load(profile.save(tmp_path / "p.json"), fresh())
    assert weights_fingerprint(fresh(seed=1)) != profile.weights_fingerprint
