"""`generate` with compiled decode steps: equal to eager, a bounded number of graphs, none of them made twice."""

from __future__ import annotations

import gc
import shutil
import weakref

import pytest
import torch

from adaskip.core.compiled import compiled_steps
from adaskip.core.context import skipping
from adaskip.core.generate import generate
from adaskip.core.hf import has_unguarded_graphs
from adaskip.core.kv_cache import kv_bytes
from adaskip.core.patching import patches_of
from tests.compiled_runs import (
    CountedGraphs,
    ada_skip,
    affine_plan,
    assert_same,
    early_exit,
    fixed,
    run,
    scaled,
    skip_decode,
    unified,
)
from tests.families import random_model, random_prompts

CASES = [  # and how many sets the decode steps go through
    pytest.param(early_exit, "e2e", 1, marks=pytest.mark.slow),
    pytest.param(unified, "e2e", 1, marks=pytest.mark.slow),
    (skip_decode, "e2e", 2),
    pytest.param(skip_decode, "decode", 2, marks=pytest.mark.slow),
    pytest.param(ada_skip, "e2e", 2, marks=pytest.mark.slow),
    (ada_skip, "decode", 2),
    pytest.param(ada_skip, "prefill", 1, marks=pytest.mark.slow),
    (scaled, "decode", 1),
    (affine_plan, "e2e", 1),
]


@pytest.mark.parametrize(("make", "phase", "num_sets"), CASES)
def test_compiled_decode_is_eager_decode_with_a_graph_for_each_set(make, phase, num_sets):
    """Neither the graphs nor the scales keep the model alive afterwards."""
    model, graphs = random_model("llama"), CountedGraphs()
    prompts, config = random_prompts([9, 4, 7]), graphs.config()
    for factor in (1.05, 1.06):  # the second context brings other scales and finds the graphs of the first
        with skipping(model, make(phase, factor)):
            expected = run(model, prompts)
        with skipping(model, make(phase, factor)) as session:
            ours = run(model, prompts, compile_config=config)
            assert bool(session.last_request.online_ffns) == (make is ada_skip and phase != "prefill")
        assert_same(ours, expected)
        assert kv_bytes(ours.past_key_values) == kv_bytes(expected.past_key_values)
        assert len(graphs) == num_sets
    gone = weakref.ref(model)
    del model, session
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("family", ["mistral", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_sliding_windows_compile_too(family):
    model, graphs = random_model(family), CountedGraphs()
    prompts, config = random_prompts([9, 4, 7]), graphs.config()
    strategy = scaled("e2e", 1.1)
    with skipping(model, strategy):
        expected = run(model, prompts)
        assert_same(run(model, prompts, compile_config=config), expected)
        made = len(graphs)
        assert_same(run(model, prompts, compile_config=config), expected)
    assert len(graphs) == made


@pytest.mark.slow
def test_chunks_of_a_prompt_are_compiled_apart():
    model, graphs = random_model("llama"), CountedGraphs()
    prompts, config = random_prompts([12]), graphs.config()
    with skipping(model, scaled("decode", 1.1)):
        expected = run(model, prompts, prefill_chunk_size=4)
        for _ in range(2):
            assert_same(run(model, prompts, prefill_chunk_size=4, compile_config=config), expected)
            made = len(graphs)
    assert len(graphs) == made
    kinds = [kind for kind, _ in compiled_steps(patches_of(model), config).steps]
    assert sorted(kinds) == ["decode", "prefill"]


def test_steps_alternate_between_scales_without_a_graph_more():
    """The scales of two interleaved requests share their storage, so each step must write its own."""
    model, graphs = random_model("llama"), CountedGraphs()
    config, prompts = graphs.config(), random_prompts([8])
    runs = []
    for factor in (1.2, 0.8, 1.2):
        with skipping(model, scaled("e2e", factor)):
            runs.append(run(model, prompts, compile_config=config))
    assert len(graphs) == 1
    assert not torch.equal(torch.stack(runs[0].logits), torch.stack(runs[1].logits))
    assert torch.equal(torch.stack(runs[0].logits), torch.stack(runs[2].logits))


@pytest.mark.slow
def test_sets_beyond_the_bound_run_from_graphs_of_layers():
    model, graphs = random_model("llama"), CountedGraphs()
    config, prompts = graphs.config(), random_prompts([9, 5])
    sets = [{0}, {1}, {0, 1}, {3}, {2, 3}, {0, 3}]
    counts = []
    for scale in (1.1, 1.2):
        for ffns in sets:
            sublayers = [("attention", 1), *(("ffn", i) for i in ffns)]
            with skipping(model, fixed(*sublayers, phase="e2e", scale=scale), max_step_graphs=2):
                expected = run(model, prompts)
                assert_same(run(model, prompts, compile_config=config), expected)
        counts.append(len(graphs))
    assert len(compiled_steps(patches_of(model), config).steps) == 2
    assert counts[0] == counts[1] <= 2 + 4 * 2  # each of four layers with and without its FFN


@pytest.mark.slow
def test_online_sets_beyond_the_bound_still_measure_and_learn():
    model, graphs = random_model("llama"), CountedGraphs()
    config, prompts = graphs.config(), random_prompts([9, 4, 7])
    with skipping(model, ada_skip("e2e", 1.05), max_step_graphs=0) as session:
        expected = run(model, prompts)
        learnt = session.last_request
    for _ in range(2):
        with skipping(model, ada_skip("e2e", 1.05), max_step_graphs=0) as session:
            assert_same(run(model, prompts, compile_config=config), expected)
            assert session.last_request.online_ffns == learnt.online_ffns
        made = len(graphs)
    assert len(graphs) == made <= 4 * 3


def test_the_stock_model_compiles_the_same_before_and_after():
    model, graphs = random_model("llama"), CountedGraphs()
    config, prompts = graphs.config(), random_prompts([9])
    stock = run(model, prompts, compile_config=config)
    with skipping(model, scaled("e2e", 1.3)):
        skipped = run(model, prompts, compile_config=config)
    again = run(model, prompts, compile_config=config)
    assert torch.equal(torch.stack(stock.logits), torch.stack(again.logits))
    assert not torch.equal(torch.stack(stock.logits), torch.stack(skipped.logits))
    assert len(graphs) == 2


@pytest.mark.parametrize(
    ("compiled_before", "fullgraph"),
    [
        (False, False),
        (True, True),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((False, True), (True, False))),
    ],
)
def test_a_direct_call_of_a_compiled_model_is_refused(compiled_before, fullgraph, caplog):
    torch.compiler.reset()  # the compiler remembers, for the whole process, a function in which an error came up
    model, ids = random_model("llama"), random_prompts([6])[0][None]
    stock = model(ids).logits
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    with torch.no_grad():
        if compiled_before:
            compiled(ids)
        if has_unguarded_graphs():  # Python 3.13.0, which does not refuse but warns
            with skipping(model, scaled("e2e", 2)):
                assert "compiled model that was called before skipping(...)" in caplog.text
            return
        with (
            pytest.raises(Exception, match=r"called directly|refuse_compiled_call"),
            skipping(model, scaled("e2e", 2)),
        ):
            compiled(ids)
        assert torch.equal(compiled(ids).logits, stock)


def test_scales_written_in_inference_mode_can_be_written_again():
    model, ids = random_model("llama"), random_prompts([6])[0][None]
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        for factor in (1.1, 1.2):
            with context(), skipping(model, affine_plan("e2e", factor)):
                model(ids)


def test_scales_follow_a_model_to_another_dtype():
    model, ids = random_model("llama"), random_prompts([6])[0][None]
    with skipping(model, scaled("e2e", 1.1)):
        model(ids)
    model.double()
    with skipping(model, scaled("e2e", 1.1)):
        assert model(ids).logits.dtype == torch.float64


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_agrees_with_eager():
    model, prompts = random_model("llama"), random_prompts([9, 4])
    config = CountedGraphs().config(backend="inductor")
    with skipping(model, affine_plan("e2e", 1.05)):
        expected = run(model, prompts)
        assert_same(run(model, prompts, compile_config=config), expected)


def answers(model, strategy, **options):
    prompts = random_prompts([9, 4])
    return generate(model, strategy, prompts, max_new_tokens=6, eos_token_ids=[2], pad_token_id=0, **options)


@pytest.mark.parametrize("make", [pytest.param(None, marks=pytest.mark.slow), scaled])
def test_timed_generation_on_a_static_cache_compiles_on_demand(make):
    model, graphs = random_model("llama"), CountedGraphs()
    strategy = make and make("e2e", 1.1)
    dynamic = answers(model, strategy)
    static = answers(model, strategy, cache_implementation="static")
    assert not graphs
    compiled = answers(model, strategy, cache_implementation="static", compile=graphs.config())
    assert len(graphs) == 1
    tokens = [[answer.token_ids for answer in some] for some in (dynamic, static, compiled)]
    assert tokens[0] == tokens[1] == tokens[2]
    assert static[0].kv_bytes == compiled[0].kv_bytes


def test_timed_generation_names_what_cannot_be_compiled():
    with pytest.raises(ValueError, match="compile needs cache_implementation='static'; got 'dynamic'"):
        answers(random_model("llama"), None, compile=True)
    with pytest.raises(ValueError, match="unknown cache_implementation 'statc'; allowed: dynamic, static"):
        answers(random_model("llama"), None, cache_implementation="statc")
