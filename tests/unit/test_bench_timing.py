"""What the benchmark times and counts, and the K/V bytes that it checks."""

from __future__ import annotations

import pytest
import torch

from adaskip.core import context, patching
from adaskip.core.plan import EMPTY_PLAN, SkipPlan
from adaskip.profiles.assumed import assumed_profile
from adaskip.strategies import FixedPlan
from adaskip.studies.bench.settings import (
    COMPILED,
    Cell,
    Workload,
)
from adaskip.studies.bench.subject import Subject
from adaskip.studies.bench.timing import StaticCaches, Stopwatch, check_kv, count_work, sublayer_times, timed_generation
from tests.tiny_bench import CPU, LAYERS, ids, tiny_model


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(tiny_model(), assumed_profile(LAYERS), "random")


def test_a_generation_has_the_time_of_every_token(subject):
    timed = timed_generation(subject.model, None, ids(8), 5, "wall")
    assert timed.ttft_s > 0
    assert len(timed.steps_s) == 4
    assert min(timed.steps_s) > 0


def test_the_breakdown_times_every_sublayer_of_every_forward_within_the_whole(subject):
    before = [dict(vars(layer)) for layer in subject.model.model.layers]
    timed, forwards = sublayer_times(subject.model, ids(8), 3, "wall")
    assert [len(forward) for forward in forwards] == [2 * LAYERS] * 3
    assert min(map(min, forwards)) > 0
    assert sum(map(sum, forwards)) < timed.ttft_s + sum(timed.steps_s)
    assert [dict(vars(layer)) for layer in subject.model.model.layers] == before


def test_counted_operations_are_the_stock_ones_with_nothing_to_skip_and_fewer_with_something(subject):
    stock = count_work(subject.model, None, ids(8))
    nothing = count_work(subject.model, FixedPlan(num_layers=LAYERS, plan=EMPTY_PLAN), ids(8))
    fewer = count_work(subject.model, FixedPlan(num_layers=LAYERS, plan=SkipPlan.of_layers([1])), ids(8))
    assert nothing["torch_operations"] == stock["torch_operations"]
    assert nothing["python_calls"]["decode_step"] > stock["python_calls"]["decode_step"]
    for phase in ("prefill", "decode_step"):
        assert fewer["torch_operations"][phase] < stock["torch_operations"][phase]


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_kv_bytes_are_exactly_those_of_the_live_layers(subject, phase):
    strategy = FixedPlan(num_layers=LAYERS, plan=SkipPlan(attention={0, 2}), phase=phase)
    check = check_kv(subject.model, strategy, ids(8), 3)
    per_layer = 2 * 2 * 8 * 4  # keys and values, heads, head size, bytes
    assert check["bytes_before_decode"] == check["expected_before_decode"] == 2 * per_layer * 8
    assert check["bytes_at_end"] == check["expected_at_end"] == 2 * per_layer * 10
    assert check["all_layers_at_end"] == 2 * check["expected_at_end"]
    assert check["kept_alive"] == []


def test_kv_that_somebody_keeps_is_seen(subject, monkeypatch):
    kept, stock = [], patching.release_skipped

    def keep_and_release(cache, *args):
        kept.extend(layer.keys for layer in cache.layers)
        stock(cache, *args)

    monkeypatch.setattr(patching, "release_skipped", keep_and_release)
    strategy = FixedPlan(num_layers=LAYERS, plan=SkipPlan(attention={2}), phase="decode")
    assert check_kv(subject.model, strategy, ids(8), 3)["kept_alive"] == [2]


def test_laps_lie_between_marks():
    stopwatch = Stopwatch(CPU, "process")
    for _ in range(3):
        stopwatch.mark()
    assert len(stopwatch.laps()) == 2
    assert min(stopwatch.laps()) >= 0


def test_a_cells_static_cache_is_used_again_as_if_new():
    """After a generation that skipped attention it holds stand-ins; emptied, it serves the stock model."""
    model, caches = tiny_model(), StaticCaches()
    cell, work = Cell("early_exit", "e2e", 2, COMPILED), Workload(6, 4)
    ids = torch.arange(6)[None]
    plan = FixedPlan(num_layers=LAYERS, plan=SkipPlan(attention={1}), phase="decode")
    cache = caches.emptied(cell, work, model)
    for _ in range(2):
        with context.skipping(model, plan):
            skipped = model.generate(
                ids, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, disable_compile=True
            )
        assert caches.emptied(cell, work, model) is cache
        assert int(cache.get_seq_length()) == 0
        stock = model.generate(ids, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, disable_compile=True)
        assert torch.equal(stock, model.generate(ids, max_new_tokens=4, min_new_tokens=4))
        assert caches.emptied(cell, work, model) is cache
        assert skipped.shape == stock.shape
    other = caches.emptied(cell, Workload(8, 4), model)
    assert list(caches.caches.values()) == [other]
