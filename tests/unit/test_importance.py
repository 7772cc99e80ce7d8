"""IO similarity against its naive twin, and the profile's file."""

from __future__ import annotations

import json
import math

import pytest
import torch

from adaskip.calibration import measure
from adaskip.core import similarity
from adaskip.core.plan import Sublayer
from adaskip.core.similarity import cosine_and_ratio
from adaskip.profiles.fields import ProfileError
from adaskip.profiles.importance import ImportanceProfile
from tests.families import random_model, random_prompts
from tests.profiles import profile_of


def naive(a, b):
    """Equation 1 and the summand of equation 3, one token at a time in Python floats."""
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norm_a, norm_b = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
    return dot / (norm_a * norm_b), norm_b / norm_a


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_the_naive_twin(dtype):
    torch.manual_seed(0)
    a = torch.randn(2, 150, 24).to(dtype)
    b = (a + 0.2 * torch.randn(2, 150, 24)).to(dtype)
    cosine, ratio = cosine_and_ratio(a, b)
    for row in range(2):
        for token in range(0, 150, 7):
            expected = naive(a[row, token].double().tolist(), b[row, token].double().tolist())
            assert cosine[row, token] == pytest.approx(expected[0], abs=1e-5)
            assert ratio[row, token] == pytest.approx(expected[1], rel=1e-5)
    assert cosine.dtype == ratio.dtype == torch.float32


def test_three_norms_give_the_same_as_products(monkeypatch):
    """The CUDA path, on the CPU."""
    torch.manual_seed(0)
    a, change = torch.randn(300, 64), 0.1 * torch.randn(300, 64)
    expected = cosine_and_ratio(a, a + change)

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for got, want in zip(cosine_and_ratio(a, a + change, change), expected, strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_a_measuring_prefill_reads_each_tensor_of_the_residual_stream_once(monkeypatch):
    """On CUDA, whose path is taken here: 2 M + 1 for M layers, 2 M changes of sublayers and M of whole layers."""
    read = []
    plain = similarity.norm
    monkeypatch.setattr(similarity, "norm", lambda x: read.append(x) or plain(x))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    model, prompts = random_model("llama"), random_prompts([9])
    (measured,) = measure.measure(model, prompts)
    assert len(read) == (2 * 4 + 1) + 2 * 4 + 4
    monkeypatch.undo()
    (expected,) = measure.measure(model, prompts)
    torch.testing.assert_close(measured.sums, expected.sums, rtol=1e-4, atol=1e-4)


def test_a_token_of_zeros_counts_as_nothing_known():
    cosine, ratio = cosine_and_ratio(torch.zeros(1, 4), torch.ones(1, 4))
    assert cosine.item() == 0.0
    assert ratio.item() == 0.0


def test_ranking_is_by_similarity_and_stable():
    profile = profile_of(attention=[0.5, 0.9], ffn=[0.5, 0.7])
    assert profile.ranking() == [
        Sublayer("attention", 1),
        Sublayer("ffn", 1),
        Sublayer("attention", 0),
        Sublayer("ffn", 0),
    ]


def test_profile_survives_its_file(tmp_path):
    profile = profile_of([0.1, 1 / 3], [0.2, 2 / 3], versions={"torch": "x"})
    path = profile.save(tmp_path / "sub" / "profile.json")
    assert ImportanceProfile.load(path) == profile
    assert '"similarity"' in path.read_text()


def test_profile_of_another_model_is_refused(tmp_path):
    model = random_model("llama", num_layers=2)
    with pytest.raises(ProfileError, match="has 3 layers, but the model has 2"):
        ImportanceProfile.load(profile_of([0.1] * 3, [0.1] * 3).save(tmp_path / "p.json"), model)
    with pytest.raises(ProfileError, match="calibrate this model"):
        ImportanceProfile.load(profile_of([0.1] * 2, [0.1] * 2).save(tmp_path / "p.json"), model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a saved importance profile"),
        ('{"format": "other"}', "format is 'other'"),
        ('{"format": "adaskip-importance-profile/1"}', "not a valid importance profile"),
    ],
)
def test_broken_file_is_one_clear_error(tmp_path, text, message):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message) as error:
        ImportanceProfile.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_truncated_and_inconsistent_profiles_are_refused(tmp_path):
    path = profile_of([0.1, 0.2], [0.1, 0.2]).save(tmp_path / "p.json")
    record = json.loads(path.read_text())
    for change in ({"tokens": 0}, {"phase": "e2e"}, {"layer": {"similarity": [0.1], "scale": [1.0]}}):
        path.write_text(json.dumps({**record, **change}))
        with pytest.raises(ProfileError):
            ImportanceProfile.load(path)
