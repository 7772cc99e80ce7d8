"""AdaSkip on a real small Llama, stories260K, where it is at hand (ADASKIP_REAL, by default ../shared/real)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from adaskip.calibration.measure import calibrate
from adaskip.core.generate import generate
from adaskip.core.plan import Budget
from adaskip.models.loading import load_model
from adaskip.strategies import AdaSkip

ROOT = Path(__file__).resolve().parents[2]
STORIES = Path(os.environ.get("ADASKIP_REAL", ROOT.parent / "shared" / "real")) / "stories260K"
BEGINNINGS = (
    "Once upon a time, there was a little girl named",
    "One day, a big dog",
    "Tom and his mom went to the park. They",
    "Lily liked to play with her",
)

pytestmark = pytest.mark.skipif(
    not STORIES.is_dir(), reason="stories260K is not at hand; ADASKIP_REAL names its folder"
)


@pytest.fixture(scope="module")
def stories():
    loaded = load_model(None, checkpoint=str(STORIES), device="cpu", dtype="float32")
    return loaded.model, [torch.tensor(loaded.tokenizer(text).input_ids) for text in BEGINNINGS]


def test_the_online_window_adds_ffns_in_real_requests(stories):
    """Defect of the artifact: 0 of 20 requests."""
    model, prompts = stories
    options = {"max_new_tokens": 150, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(0)
    told = [model.generate(prompt[None], **options)[0] for prompt in prompts]
    strategy = AdaSkip(num_layers=5, budget=Budget(sublayers=5), profile=calibrate(model, told), phase="decode")
    assert strategy.skipped.ffn, "the threshold is an FFN's similarity"
    learnt = []
    for prompt in prompts:
        (answer,) = generate(model, strategy, [prompt], max_new_tokens=60, eos_token_ids=[], pad_token_id=0)
        learnt.append(set(answer.online_ffns))
        assert set(answer.plan["decode"]["ffn"]) == strategy.skipped.ffn | learnt[-1]
        assert answer.plan["prefill"] == {"attention": [], "ffn": []}
    assert any(learnt)
