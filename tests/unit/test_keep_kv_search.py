"""Searches under kept K/V: sets that are skipped only while the prompt is read, measured where the answer is chosen."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from adaskip import skipping
from adaskip.calibration.divergence import OutputDivergence
from adaskip.calibration.measure import calibrate
from adaskip.calibration.select import most_forwards, select, sets_of_others
from adaskip.calibration.streams import Kept, KeptStreams
from adaskip.core.plan import EMPTY_PLAN, Budget, SkipPlan, Sublayer
from adaskip.profiles.fields import ProfileError
from adaskip.profiles.selection import SelectionProfile
from adaskip.strategies import FixedPlan, build
from tests.families import FAMILIES, random_model, random_prompts

pytestmark = pytest.mark.usefixtures("short_answers")
LAYERS = 4
ENDS = {"eos_token_ids": [2], "pad_token_id": 0}
ALL = [Sublayer(kind, layer) for layer in range(LAYERS) for kind in ("attention", "ffn")]
PLAN = SkipPlan.of_sublayers({Sublayer("attention", 1): 1.1, Sublayer("ffn", 1): 0.8, Sublayer("attention", 2): 0.9})


def random_plans(number: int) -> list[SkipPlan]:
    draw = random.Random(0)
    sets = [draw.sample(ALL, draw.randint(0, 5)) for _ in range(number)]
    return [SkipPlan.of_sublayers({s: draw.choice((1.0, 1.1, 0.9)) for s in chosen}) for chosen in sets]


@torch.no_grad()
def by_decoding(model, prompt, answer, plan: SkipPlan) -> float:
    """The divergence of a `skipping` context with keep_kv=True, in which the answer is given token by token."""
    full = model(torch.tensor([[*prompt.tolist(), *answer]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
    with skipping(model, FixedPlan(num_layers=LAYERS, phase="prefill", plan=plan, keep_kv=True)):
        output = model(prompt[None], use_cache=True)
        logits = [output.logits[0, -1]]
        for token in answer:
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values)
            logits.append(output.logits[0, -1])
    return float((full.exp() * (full - torch.stack(logits).log_softmax(-1))).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_divergence_is_that_of_answers_in_a_context_that_keeps_the_kv(family):
    model, prompts, answers = random_model(family, LAYERS), random_prompts([9, 14, 2]), [[5, 7, 3, 11], [4], []]
    divergence = OutputDivergence(model, prompts, "prefill", answers=answers, keep_kv=True, **ENDS)
    for plan in [PLAN, *random_plans(6), PLAN]:
        expected = [by_decoding(model, *pair, plan) for pair in zip(prompts, answers, strict=True)]
        assert divergence(plan) == pytest.approx(expected, abs=1e-5)
    assert min(divergence(PLAN)) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen3"])
def test_a_continued_measurement_has_the_bits_of_a_whole_one(family):
    divergence = OutputDivergence(
        random_model(family, LAYERS), random_prompts([9, 14]), "prefill", keep_kv=True, **ENDS
    )
    for plan in [EMPTY_PLAN, *random_plans(12), EMPTY_PLAN]:
        continued = divergence(plan)
        streams = lambda: KeptStreams(divergence._patches, Kept(1, LAYERS))  # noqa: E731
        used, divergence._streams = divergence._streams, [(streams(), streams()) for _ in range(2)]
        assert continued == divergence(plan)
        divergence._streams = used


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_last_layer_is_free(family):
    divergence = OutputDivergence(
        random_model(family, LAYERS), random_prompts([9, 14]), "prefill", keep_kv=True, **ENDS
    )
    for plan in (EMPTY_PLAN, SkipPlan(attention={3}), SkipPlan(ffn={3}), SkipPlan.of_layers([3], keeps_kv=True)):
        assert divergence(plan) == [0.0, 0.0]
    assert min(divergence(SkipPlan(ffn={2}))) > 0


def test_only_the_layers_from_the_lowest_difference_are_run_and_of_the_last_one_the_kv_alone(monkeypatch):
    model, calls = random_model("llama", LAYERS), []
    divergence = OutputDivergence(model, random_prompts([9]), "prefill", keep_kv=True, answers=[[5, 7]], **ENDS)
    for i, layer in enumerate(model.model.layers):
        forward = layer.mlp.forward
        run = lambda x, i=i, forward=forward: (calls.append((i, x.shape[1])), forward(x))[1]  # noqa: E731
        monkeypatch.setattr(layer.mlp, "forward", run)
    for plan, expected in (
        (EMPTY_PLAN, [(0, 8), (1, 8), (2, 8), (0, 3), (1, 3), (2, 3), (3, 3)]),
        (SkipPlan(ffn={1}), [(2, 8), (1, 3), (2, 3), (3, 3)]),
        (SkipPlan(ffn={1}, attention={2}), [(2, 8), (2, 3), (3, 3)]),
    ):
        calls.clear()
        divergence(plan)
        assert calls == expected


def test_a_forward_that_fails_in_the_answer_leaves_nothing_to_continue_from():
    model = random_model("llama", LAYERS)
    divergence = OutputDivergence(model, random_prompts([9]), "prefill", keep_kv=True, answers=[[5, 7]], **ENDS)
    plan = SkipPlan(ffn={2})
    expected = divergence(plan)
    broken = model.model.layers[3].mlp.register_forward_pre_hook(lambda *args: 1 / 0)  # runs in the answer alone
    with pytest.raises(ZeroDivisionError):
        divergence(SkipPlan(ffn={1}))
    broken.remove()
    assert divergence(plan) == expected


def test_an_attention_that_accelerate_offloads_is_refused_before_anything_is_measured():
    model = random_model("llama", LAYERS)
    hook = AlignDevicesHook(execution_device="cpu")
    add_hook_to_module(model.model.layers[0].self_attn, hook)
    hook.offload = True
    with pytest.raises(ValueError, match="layer 0 cannot keep the K/V of its skipped attention: accelerate's Align"):
        OutputDivergence(model, random_prompts([9]), "prefill", keep_kv=True, **ENDS)


@pytest.fixture(scope="module")
def model():
    """Six layers, of which the last changes the stream most, so that its similarities are the lowest."""
    model = random_model("llama", 6)
    with torch.no_grad():
        for projection in (model.model.layers[5].self_attn.o_proj, model.model.layers[5].mlp.down_proj):
            projection.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def prompts():
    return random_prompts([9, 14, 11])


@pytest.fixture(scope="module")
def selection(model, prompts):
    return select(model, prompts, "prefill", keep_kv=True, up_to=4, data_ids=("a", "b", "c"), **ENDS)


def test_the_search_takes_the_free_sublayers_first_although_they_are_little_similar(selection, model, prompts):
    least = calibrate(model, prompts).ranking()[6:]
    first, second = selection.selected[1], selection.selected[2]
    assert first.divergence == second.divergence == 0.0
    assert second.plan.attention == second.plan.ffn == {5}
    assert selection.keep_kv
    assert {Sublayer("attention", 5), Sublayer("ffn", 5)} <= {*least}


def test_no_set_diverges_more_on_the_calibration_prompts_than_that_of_another(selection, model, prompts):
    importance = calibrate(model, prompts)
    divergence = OutputDivergence(model, prompts, "prefill", keep_kv=True, **ENDS)
    others = sets_of_others(importance, 4, keep_kv=True)
    assert [*others] == ["adaskip", "pop", "skipdecode", "unified"]
    assert others["pop"][4] == {Sublayer(kind, layer) for kind in ("attention", "ffn") for layer in (4, 5)}
    for count, chosen in selection.selected.items():
        assert sum(divergence(chosen.plan)) / 3 == pytest.approx(chosen.divergence, rel=1e-4, abs=1e-7)
        for sets in others.values():
            if count in sets:
                plan = SkipPlan.of_sublayers({s: importance.scale_of(s) for s in sets[count]})
                assert chosen.divergence <= sum(divergence(plan)) / 3 + 1e-6


def test_the_search_measures_no_more_than_foretold(selection, model, prompts):
    answers = OutputDivergence(model, prompts, "prefill", keep_kv=True, **ENDS).passages
    answered = sum(passage.ids.shape[1] for passage in answers) - sum(map(len, prompts))
    searched = selection.cost.num_forwards - answered - 4 * len(prompts)
    assert 0 < searched <= most_forwards(6, len(prompts), 4)


def test_a_stopped_search_goes_on_and_takes_nothing_from_one_without_kept_kv(
    selection, model, prompts, tmp_path, monkeypatch
):
    path, measured = tmp_path / "partial.jsonl", []
    options = {"up_to": 4, "progress_path": path, **ENDS}
    select(model, prompts, "prefill", **options)
    assert select(model, prompts, "prefill", keep_kv=True, **options).selected == selection.selected
    monkeypatch.setattr(OutputDivergence, "__call__", lambda self, plan, which: measured.append(plan))
    assert select(model, prompts, "prefill", keep_kv=True, **options).selected == selection.selected
    assert not measured


def test_a_selection_says_that_it_is_for_kept_kv_and_older_ones_that_they_are_not(selection, model, tmp_path):
    path = selection.save(tmp_path / "selection.json")
    assert SelectionProfile.load(path, model) == selection
    record = json.loads(path.read_text())
    assert record.pop("keep_kv") is True
    path.write_text(json.dumps(record))
    assert SelectionProfile.load(path) == replace(selection, keep_kv=False)
    assert not SelectionProfile.load("smollm2-selection-prefill").keep_kv
    for changed, message in (
        ({"keep_kv": 1}, "keep_kv of a selection must be true or false; got 1"),
        ({"keep_kv": True, "phase": "e2e"}, "searched in phase prefill with method search; got phase 'e2e' and method"),
    ):
        path.write_text(json.dumps({**record, **changed}))
        with pytest.raises(ProfileError, match=message):
            SelectionProfile.load(path)


def test_a_selection_for_kept_kv_is_refused_without_and_one_without_is_accepted_with_it(selection):
    given = {"phase": "prefill", "budget": Budget(sublayers=3), "num_layers": 6}
    kept = build("calibrated", **given, profile=selection, keep_kv=True)
    assert kept.prefill_plan == replace(selection.selected[3].plan, keeps_kv=True)
    with pytest.raises(
        ValueError, match=r"skipped only while the prompt is read; use it with keep_kv=True \(--keep-kv"
    ):
        build("calibrated", **given, profile=selection)
    build("calibrated", **given, profile=replace(selection, keep_kv=False), keep_kv=True)


def test_kept_kv_is_searched_in_phase_prefill_and_by_our_search_alone(model, prompts):
    for phase, method in (("e2e", "search"), ("decode", "search"), ("prefill", "evopress"), ("prefill", "blockpruner")):
        with pytest.raises(ValueError, match=f"in phase prefill with method search; got phase '{phase}' and method '"):
            select(model, prompts, phase, keep_kv=True, method=method, up_to=2, **ENDS)
    with pytest.raises(ValueError, match="a plan that keeps the K/V is measured in phase 'prefill', not in 'e2e'"):
        OutputDivergence(model, prompts, "e2e", keep_kv=True, **ENDS)
