"""Forwards that continue from the hidden states of forwards before them."""

from __future__ import annotations

import random
from weakref import ref

import pytest
import torch

from adaskip.calibration import streams
from adaskip.calibration.divergence import OutputDivergence
from adaskip.calibration.streams import Kept, KeptStreams
from adaskip.core.blocks import decoder_layers
from adaskip.core.patching import patches_of
from adaskip.core.plan import EMPTY_PLAN, SkipPlan, Sublayer
from tests.families import random_model, random_prompts

LAYERS = 6
pytestmark = pytest.mark.usefixtures("short_answers")
ENDS = {"eos_token_ids": [2], "pad_token_id": 0}
ALL = [Sublayer(kind, layer) for layer in range(4) for kind in ("attention", "ffn")]


def random_plans(number: int) -> list[SkipPlan]:
    draw = random.Random(0)
    scale = lambda: draw.choice((1.0, 1.1, 0.9))  # noqa: E731
    return [SkipPlan.of_sublayers({s: scale() for s in draw.sample(ALL, draw.randint(0, 5))}) for _ in range(number)]


def fresh(divergence: OutputDivergence, kept: Kept) -> list[tuple[KeptStreams, ...]]:
    return [(KeptStreams(divergence._patches, kept),) for _ in range(2)]


@pytest.mark.parametrize("kept", [Kept(1, 100), Kept(1, 9), Kept(2, 7), Kept(3, 2)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_a_continued_measurement_has_the_bits_of_a_whole_one(family, phase, kept):
    model = random_model(family, 4)
    divergence = OutputDivergence(model, random_prompts([9, 14]), phase, **ENDS)
    divergence._streams = fresh(divergence, kept)
    for plan in [EMPTY_PLAN, *random_plans(24), EMPTY_PLAN]:
        continued = divergence(plan)
        used, divergence._streams = divergence._streams, fresh(divergence, Kept(1, 4))
        assert continued == divergence(plan)
        divergence._streams = used


def layers_run(monkeypatch, kept: Kept, *plans: SkipPlan) -> list[int]:
    """The layers that run under the last of these plans, one forward each."""
    model = random_model("llama", LAYERS)
    patches, (prompt,) = patches_of(model), random_prompts([9])
    stream, calls = KeptStreams(patches, kept), []
    for i, layer in enumerate(model.model.layers):
        monkeypatch.setattr(layer.mlp, "forward", lambda x, i=i, mlp=layer.mlp.forward: (calls.append(i), mlp(x))[1])
    with patches.install(), torch.no_grad():
        for plan in plans:
            calls.clear()
            with stream.running(plan):
                model(input_ids=prompt[None], use_cache=False)
    return calls


@pytest.mark.parametrize(("interval", "first"), [(1, 4), (2, 4), (3, 3), (5, 0)])
def test_only_the_layers_from_the_lowest_difference_are_run(interval, first, monkeypatch):
    base = SkipPlan(attention=frozenset({1}))
    plans = base, base.union(SkipPlan(attention=frozenset({4})))
    assert layers_run(monkeypatch, Kept(interval, LAYERS), *plans) == list(range(first, LAYERS))


@pytest.mark.parametrize(("states", "first"), [(6, 1), (9, 1), (10, 3), (11, 3), (12, 4)])
def test_the_most_alike_of_the_latest_forwards_is_continued(states, first, monkeypatch):
    """The first forward has 6 states; the second shares 4 and adds 2, the third shares 2 and adds 4."""
    base = SkipPlan(attention=frozenset({1}))
    others = base.union(SkipPlan(ffn=frozenset({3}))), SkipPlan(ffn=frozenset({1}))
    last = base.union(SkipPlan(attention=frozenset({4})))
    assert layers_run(monkeypatch, Kept(1, states), base, *others, last) == list(range(first, LAYERS))


def test_no_more_states_live_than_allowed():
    model, (prompt,), states = random_model("llama", LAYERS), random_prompts([9]), 15
    patches = patches_of(model)
    stream, entered, live = KeptStreams(patches, Kept(1, states)), [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: entered.append(ref(args[0])))
    with patches.install(), torch.no_grad():
        for plan in random_plans(40):
            with stream.running(plan):
                model(input_ids=prompt[None], use_cache=False)
                live.append(len({id(state) for each in entered if (state := each()) is not None}))
    assert max(live) == states


def test_a_forward_that_fails_is_not_continued():
    model = random_model("llama", LAYERS)
    divergence = OutputDivergence(model, random_prompts([9]), "prefill", **ENDS)
    plan, hooks = SkipPlan(ffn=frozenset({4})), [layer._forward_pre_hooks for layer in decoder_layers(model)]
    expected = divergence(plan)
    broken = model.model.layers[5].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        divergence(SkipPlan(ffn=frozenset({3})))
    broken.remove()
    ((stream,),) = divergence._streams
    assert [kept for kept, _ in stream.latest] == [plan]
    assert divergence(plan) == expected
    assert not any(hooks)


def test_kept_bytes_are_bounded(monkeypatch):
    patches = patches_of(random_model("llama", LAYERS))
    layer = 100 * patches.patches[0].width * patches.patches[0].dtype.itemsize
    for states, interval in ((50, 1), (LAYERS, 1), (LAYERS - 1, 2), (3, 2), (2, 3), (1, LAYERS)):
        monkeypatch.setattr(streams, "KEPT_BYTES_CPU", states * layer + 1)
        assert Kept.of(patches, 100) == Kept(interval, states)
