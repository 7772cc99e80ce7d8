"""What vLLM answers from an exported folder is what `skipping` answers on the model that it was made of."""

from __future__ import annotations

import pytest
import torch

from adaskip.core.plan import SkipPlan
from tests.engines.exports import FAMILIES, LENGTHS, NUM_LAYERS, PLANS, export, save_family, tokens_of_skipping
from tests.engines.serving import engine, greedy, kv_tokens

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return save_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 512, (length,), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_greedy_tokens_are_those_of_skipping(family, plan, prompts, tmp_path):
    model, checkpoint = family
    expected = tokens_of_skipping(model, plan, prompts)
    assert expected != tokens_of_skipping(model, SkipPlan(), prompts)
    with engine(export(checkpoint, plan, tmp_path / "served")) as llm:
        assert greedy(llm, prompts) == expected


def test_kv_cache_has_room_for_more_tokens_by_all_layers_over_live_layers(tmp_path):
    _, checkpoint = save_family("llama", tmp_path / "full")
    with engine(tmp_path / "full") as llm:
        full = kv_tokens(llm)
    with engine(export(checkpoint, SkipPlan(attention=frozenset({0, 1, 3})), tmp_path / "served")) as llm:
        assert kv_tokens(llm) == pytest.approx(full * NUM_LAYERS, rel=0.001)
