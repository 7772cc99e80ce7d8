"""The cache that writes in place, on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from adaskip import InPlaceCache
from tests.families import random_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logits_are_those_of_the_stock_cache(dtype):
    model = random_model("llama").to("cuda", dtype)
    ids = torch.arange(1, 41, device="cuda")[None]
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    stock, ours = (
        model.generate(
            ids, past_key_values=kind(config=model.config), output_logits=True, return_dict_in_generate=True, **options
        )
        for kind in (DynamicCache, InPlaceCache)
    )
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits))
