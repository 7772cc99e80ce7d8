"""Compiled decode and the per-token path on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig, StaticCache

from adaskip.core.context import skipping
from adaskip.core.generate import generate
from adaskip.core.kv_cache import kv_bytes
from tests.compiled_runs import ada_skip, affine_plan, early_exit, run, scaled, skip_decode, unified
from tests.families import random_model, random_prompts

pytestmark = pytest.mark.gpu
STRATEGIES = [early_exit, unified, skip_decode, ada_skip, scaled, affine_plan]


@pytest.fixture(scope="module", autouse=True)
def exact_matmuls():
    """Compiled and eager kernels must not differ by TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("phase", ["decode", "e2e"])
@pytest.mark.parametrize("make", STRATEGIES)
def test_captured_graphs_agree_with_eager(make, phase):
    model = random_model("llama").cuda()
    prompts = [prompt.cuda() for prompt in random_prompts([9, 4, 7])]
    for factor in (1.05, 1.06):  # the second time the graphs exist and must read the new scales
        with skipping(model, make(phase, factor)) as session:
            expected = run(model, prompts)
            learnt = session.last_request.online_ffns
            ours = run(model, prompts, compile_config=CompileConfig())  # CUDA graphs, by default
            assert session.last_request.online_ffns == learnt
        assert torch.equal(ours.sequences, expected.sequences)
        assert (torch.stack(ours.logits) - torch.stack(expected.logits)).abs().max() < 1e-3
        assert kv_bytes(ours.past_key_values) == kv_bytes(expected.past_key_values)


@pytest.mark.parametrize("make", [scaled, ada_skip])
def test_sets_beyond_the_bound_agree_with_eager(make):
    model = random_model("llama").cuda()
    prompts = [prompt.cuda() for prompt in random_prompts([9, 4])]
    with skipping(model, make("e2e", 1.05), max_step_graphs=0):
        expected = run(model, prompts)
        ours = run(model, prompts, compile_config=CompileConfig())
    assert (torch.stack(ours.logits) - torch.stack(expected.logits)).abs().max() < 1e-3


@pytest.mark.parametrize("make", STRATEGIES)
def test_a_second_generation_makes_no_graph_more(make):
    model = random_model("llama").cuda()
    prompts = [prompt.cuda() for prompt in random_prompts([9])]

    def answers(factor):
        return generate(model, make("e2e", factor), prompts, max_new_tokens=12, eos_token_ids=[], pad_token_id=0,
                        cache_implementation="static", compile=True)  # fmt: skip

    answers(1.05)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    answers(1.06)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("make", STRATEGIES)
def test_decode_steps_never_wait_for_the_device(make, static):
    """Also not inside a learning window; when it closes, the request waits once."""
    model, ids = random_model("llama").cuda(), random_prompts([9])[0][None].cuda()
    cache = StaticCache(model.config, max_cache_len=32) if static else None
    with skipping(model, make("e2e", 1.05)), torch.no_grad():
        cache = model(ids, past_key_values=cache, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)  # lets go of K/V and begins the window
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):  # the window of `ada_skip` is 3
                model(ids[:, :1], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_stock_decode_steps_do_not_wait_either():
    """Otherwise the test above would blame skipping for what the model does."""
    model, ids = random_model("llama").cuda(), random_prompts([9])[0][None].cuda()
    cache = StaticCache(model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(ids[:, :1], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
