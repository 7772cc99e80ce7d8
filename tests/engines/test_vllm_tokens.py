"""What vLLM answers from an exported folder is what `skipping` answers on the model that it was made of."""

from __future__ import annotations

from shutil import rmtree

import pytest
import torch
from vllm import EngineArgs

from adaskip.core.plan import SkipPlan
from tests.engines.exports import FAMILIES, LENGTHS, NUM_LAYERS, PLANS, export, save_family, tokens_of_skipping
from tests.engines.serving import engine, greedy, kv_tokens

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 512, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, prompts, tmp_path_factory):
    """A model, its checkpoint, and the full model's tokens."""
    model, checkpoint = save_family(request.param, tmp_path_factory.mktemp("full"))
    return model, checkpoint, tokens_of_skipping(model, SkipPlan(), prompts)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_greedy_tokens_are_those_of_skipping(family, plan, prompts, tmp_path):
    model, checkpoint, full = family
    expected = tokens_of_skipping(model, plan, prompts)
    assert expected != full
    with engine(export(checkpoint, plan, tmp_path / "served")) as llm:
        assert greedy(llm, prompts) == expected


@pytest.mark.parametrize(
    "parallel",
    [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, "enforce_eager": False}],
    ids=["tensors over two processes", "layers over two processes, compiled"],
)
def test_parallel_workers_answer_the_same(parallel, prompts, tmp_path):
    """On a CPU, vLLM runs pipelines only where it compiles."""
    model, checkpoint = save_family("qwen3", tmp_path / "full")
    folder = export(checkpoint, PLANS["both"], tmp_path / "served")
    with engine(folder, distributed_executor_backend="mp", **parallel) as llm:
        assert greedy(llm, prompts) == tokens_of_skipping(model, PLANS["both"], prompts)


def test_the_exported_model_drafts_for_the_full_one(prompts, tmp_path):
    model, checkpoint = save_family("llama", tmp_path / "full")
    draft = export(checkpoint, SkipPlan(attention=frozenset({3})), tmp_path / "draft")
    drafting = {"model": str(draft), "method": "draft_model", "num_speculative_tokens": 3}
    with engine(tmp_path / "full", speculative_config=drafting, disable_log_stats=False) as llm:
        assert greedy(llm, prompts) == tokens_of_skipping(model, SkipPlan(), prompts)
        counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    assert counts["vllm:spec_decode_num_accepted_tokens"] > 0


def test_kv_cache_has_room_for_more_tokens_by_all_layers_over_live_layers(tmp_path):
    _, checkpoint = save_family("llama", tmp_path / "full")
    with engine(tmp_path / "full") as llm:
        full = kv_tokens(llm)
    with engine(export(checkpoint, SkipPlan(attention=frozenset({0, 1, 3})), tmp_path / "served")) as llm:
        assert kv_tokens(llm) == pytest.approx(full * NUM_LAYERS, rel=0.001)


def test_lora_adapters_are_refused(tmp_path):
    _, checkpoint = save_family("llama", tmp_path / "full")
    folder = export(checkpoint, PLANS["ffn"], tmp_path / "served")
    with (
        pytest.raises(ValueError, match="AdaSkipLlamaForCausalLM takes no LoRA adapters"),
        engine(folder, enable_lora=True),
    ):
        pass


def test_compiled_graphs_are_kept_apart_by_plan(tmp_path):
    """vLLM keeps graphs on disk under a hash of the configuration."""
    _, checkpoint = save_family("llama", tmp_path / "full")
    hashes = set()
    for plan in (SkipPlan(attention=frozenset({1})), SkipPlan(attention=frozenset({2})), SkipPlan(ffn=frozenset({1}))):
        folder = export(checkpoint, plan, tmp_path / "served")
        hashes.add(EngineArgs(model=str(folder), skip_tokenizer_init=True).create_engine_config().compute_hash())
        rmtree(folder)
    assert len(hashes) == 3
