"""Methods of other papers that choose sets: each against a plain computation of what its paper says."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from adaskip.calibration import blockpruner
from adaskip.calibration.blockpruner import TextLoss
from adaskip.calibration.cosine_window import layer_angles, windows
from adaskip.calibration.divergence import OutputDivergence, greedy_answers
from adaskip.calibration.measure import calibrate
from adaskip.calibration.peers import PEERS
from adaskip.calibration.select import select
from adaskip.core.plan import Budget, SkipPlan, Sublayer
from adaskip.profiles.fields import ProfileError
from adaskip.profiles.selection import METHODS, SelectionProfile
from adaskip.strategies import build, selection_method
from tests.families import random_model, random_prompts
from tests.reference import ReferenceDecoder

LAYERS = 6
pytestmark = pytest.mark.usefixtures("short_answers")
ENDS = {"eos_token_ids": [2], "pad_token_id": 0}
ALL = [Sublayer(kind, layer) for layer in range(LAYERS) for kind in ("attention", "ffn")]


@pytest.fixture(scope="module")
def model():
    return random_model("llama", LAYERS)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts([9, 14, 11])


@pytest.fixture(scope="module")
def made(model, prompts) -> dict[str, SelectionProfile]:
    options = {"up_to": 4, "dataset": "made up", **ENDS}
    return {method: select(model, prompts, "e2e", method=method, **options) for method in PEERS}


# Cosine window


@torch.no_grad()
def plain_angles(model, prompts, size: int) -> list[float]:
    """Of each window of `size` layers the angle at the last token, from stock hidden states before the final norm."""
    found = []
    for prompt in prompts:
        states = model(prompt[None], output_hidden_states=True).hidden_states
        stream = [state[0, -1].double() for state in (*states[:-1], _before_the_norm(model, prompt))]
        pairs = zip(stream, stream[size:], strict=False)
        found.append([math.acos(float(cosine_similarity(a, b, dim=0))) / math.pi for a, b in pairs])
    return [sum(of_window) / len(prompts) for of_window in zip(*found, strict=True)]


def _before_the_norm(model, prompt) -> torch.Tensor:
    """The output of the last layer, [1, T, D]."""
    outputs = []
    hook = model.model.layers[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    model(prompt[None])
    hook.remove()
    return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_windows_are_those_of_least_angle_in_stock_hidden_states(family, prompts):
    model = random_model(family, 4)
    chosen = windows(layer_angles(model, prompts), [2, 4, 6], "cosine_window")
    for count, choice in chosen.items():
        expected = plain_angles(model, prompts, count // 2)
        assert choice.divergence == pytest.approx(min(expected), abs=1e-6)
        start = expected.index(min(expected))
        layers = set(range(start, start + count // 2))
        assert choice.sublayers == {Sublayer(kind, layer) for kind in ("attention", "ffn") for layer in layers}


def test_of_equal_windows_the_first_is_chosen_and_an_overflow_is_refused():
    assert min(windows(torch.full((5, 5), 0.25), [4], "cosine_window")[4].sublayers).layer == 0
    with pytest.raises(ValueError, match="cosine_window needs finite hidden states"):
        windows(torch.full((5, 5), torch.nan), [4], "cosine_window")


def test_the_cost_of_cosine_window_is_one_forward_per_prompt(made, prompts):
    cost = made["cosine_window"].cost
    assert (cost.num_forwards, cost.num_tokens) == (len(prompts), sum(map(len, prompts)))


# BlockPruner


def plain_loss(model, prompts, plan: SkipPlan) -> float:
    """Nats per predicted token over all prompts, on a decoder without the skipped sublayers."""
    total, tokens = 0.0, 0
    for prompt in prompts:
        decoder = ReferenceDecoder(model)
        logits = decoder.run(prompt.tolist(), plan)
        total += float(cross_entropy(logits[:-1], prompt[1:], reduction="sum"))
        tokens += len(prompt) - 1
    return total / tokens


def without(*sublayers: Sublayer) -> SkipPlan:
    return SkipPlan.of_sublayers(dict.fromkeys(sublayers, 1.0))


def test_a_text_loss_is_that_of_a_decoder_without_the_sublayers_whatever_was_measured_before(model, prompts):
    loss, draw = TextLoss(model, prompts), random.Random(0)
    for _ in range(8):
        plan = without(*draw.sample(ALL, draw.randint(0, 4)))
        expected = [plain_loss(model, [prompt], plan) for prompt in prompts]
        assert [loss(plan, i) for i in range(len(prompts))] == pytest.approx(expected, rel=1e-4)


def test_blockpruner_removes_what_raises_the_loss_least_in_each_step(made, model, prompts):
    removed: tuple[Sublayer, ...] = ()
    for count in (1, 2):
        chosen = made["blockpruner"].selected[count]
        losses = {s: plain_loss(model, prompts, without(*removed, s)) for s in ALL if s not in removed}
        best = min(losses, key=losses.__getitem__)
        removed = (*removed, best)
        assert len(removed) == count
        assert chosen.plan == without(*removed)
        assert chosen.divergence == pytest.approx(losses[best], rel=1e-4)


def test_blockpruner_weights_prompts_by_their_tokens_and_keeps_one_attention():
    costs = {s: 1.0 + s.layer * (s.kind == "ffn") for s in ALL}

    def measure(chosen, which):
        return [sum(costs[s] for s in chosen) if prompt else 100.0 * (ALL[0] in chosen) for prompt in which]

    options = {"num_layers": LAYERS, "up_to": 2 * LAYERS - 1, "found_by": "blockpruner"}
    found = blockpruner.prune(measure, [1, 9], **options)
    assert found[1].sublayers == {ALL[1]}  # ALL[0] costs nine tenths as little, but a hundred on the short prompt
    assert found[1].divergence == pytest.approx(0.9)
    largest = found[2 * LAYERS - 1].sublayers
    assert sum(s.kind == "attention" for s in largest) == LAYERS - 1
    with pytest.raises(ValueError, match="no set of 1 sublayers leaves the loss finite"):
        blockpruner.prune(lambda chosen, which: [math.inf for _ in which], [1, 9], **options)


def test_a_text_of_one_token_is_refused(model):
    with pytest.raises(ValueError, match="at least 2 tokens for a perplexity; prompt 1 has fewer"):
        TextLoss(model, random_prompts([5, 1]))


def test_blockpruner_and_cosine_window_are_the_same_in_every_phase(made, model, prompts):
    for method in ("blockpruner", "cosine_window"):
        assert not METHODS[method].by_phase
        other = select(model, prompts, "decode", method=method, up_to=4, **ENDS)
        assert other.selected == made[method].selected
        for phase in ("prefill", "decode", "e2e"):
            strategy = build(method, phase=phase, budget=Budget(sublayers=4), num_layers=LAYERS, profile=other)
            assert strategy is not None
            assert strategy.skipped == made[method].selected[4].plan


# EvoPress, whose search is in test_evopress.py


def test_evopress_measures_the_divergence_of_the_phase(made, model, prompts):
    divergence = OutputDivergence(model, prompts, "e2e", **ENDS)
    for chosen in made["evopress"].selected.values():
        assert set(chosen.attention.values()) | set(chosen.ffn.values()) == {1.0}
        assert sum(divergence(chosen.plan)) / len(prompts) == pytest.approx(chosen.divergence, rel=1e-4)


# All of them


@pytest.mark.parametrize("method", PEERS)
def test_a_selection_says_its_method_and_is_taken_by_its_strategy_alone(made, model, method, tmp_path):
    selection = made[method]
    assert (selection.method, selection_method(method)) == (method, method)
    assert list(selection.selected) == ([1, 2, 3, 4] if method == "blockpruner" else [2, 4])
    assert SelectionProfile.load(selection.save(tmp_path / "s.json"), model) == selection
    options = {"phase": "e2e", "budget": Budget(sublayers=2), "num_layers": LAYERS, "profile": selection}
    strategy = build(method, **options)
    assert strategy is not None
    assert strategy.skipped == selection.selected[2].plan
    for other in {"calibrated", *PEERS} - {method}:
        with pytest.raises(ValueError, match=f"made with method .*, this one was made with {method}"):
            build(other, **options)
    if method != "blockpruner":
        with pytest.raises(ValueError, match=r"no set for budget sublayers=3, of 3 sublayers; it has sets of: 2, 4"):
            build(method, **{**options, "budget": Budget(sublayers=3)})
    with pytest.raises(
        ValueError, match=f"up to 4 sublayers, .* needs 6; .* --method {method} --.* N makes larger sets"
    ):
        build(method, **{**options, "budget": Budget(sublayers=6)})


@pytest.mark.parametrize("method", PEERS)
def test_no_more_is_measured_than_foretold(made, model, prompts, method):
    counts = list(made[method].selected)
    answers = sum(len(answer) for batch in greedy_answers(model, prompts, **ENDS) for answer in batch.values())
    setup = 2 * len(prompts) + answers if method == "evopress" else 0  # the full model's answers and distributions
    assert setup < made[method].cost.num_forwards
    assert made[method].cost.num_forwards - setup <= PEERS[method].most_forwards(LAYERS, len(prompts), counts)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", ["blockpruner", "evopress"])
def test_a_stopped_method_continues_to_the_same_sets(made, model, prompts, method, tmp_path, monkeypatch):
    measured, calls, stop_at = (OutputDivergence if method == "evopress" else TextLoss).__call__, [], 30
    owner = OutputDivergence if method == "evopress" else TextLoss

    def stopping(self, plan, which):
        calls.append((plan, str(which)))
        if len(calls) == stop_at:
            raise Stopped
        return measured(self, plan, which)

    monkeypatch.setattr(owner, "__call__", stopping)
    options = {"method": method, "up_to": 4, "progress_path": tmp_path / "partial.jsonl", **ENDS}
    with pytest.raises(Stopped):
        select(model, prompts, "e2e", **options)
    first = calls[: stop_at - 1]
    calls[:] = [None] * stop_at
    again = select(model, prompts, "e2e", **options)
    assert not set(calls[stop_at:]) & set(first)
    assert again.selected == made[method].selected
    assert again.cost.num_forwards == made[method].cost.num_forwards
    assert again.cost.num_tokens == made[method].cost.num_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "greedy"}, "unknown method 'greedy'"),
        (
            {"method": "cosine_window", "up_to": 1},
            "makes sets of multiples of 2 sublayers, up to up_to; given: up_to 1",
        ),
        ({"method": "evopress", "budgets": [3]}, "given: up_to 4 and budgets 3"),
        ({"method": "evopress", "budgets": [6]}, "given: up_to 4 and budgets 6"),
        ({"budgets": [2]}, "method search makes a set for every number of sublayers"),
        ({"settings": {"effort": 1.0}}, "method search has no setting effort; allowed: none"),
        ({"method": "evopress", "settings": {"tokens": 1}}, "has no setting tokens; allowed: effort, seed"),
        ({"method": "evopress", "settings": {"effort": 0}}, "effort must be above 0 and at most 10; got 0"),
    ],
)
def test_what_a_method_cannot_do_is_refused_before_anything_is_measured(model, prompts, monkeypatch, options, message):
    monkeypatch.setattr("adaskip.calibration.select.calibrate", None)
    with pytest.raises(ValueError, match=message):
        select(model, prompts, "e2e", **{"up_to": 4, **options}, **ENDS)


def test_evopress_makes_sets_for_the_asked_budgets_alone(model, prompts):
    settings = {"effort": 0.05, "seed": 3}
    made = select(model, prompts, "prefill", method="evopress", up_to=6, budgets=[6], settings=settings, **ENDS)
    assert list(made.selected) == [6]
    assert made.settings == settings


def test_a_selection_without_a_method_is_a_search(made, tmp_path):
    path = replace(made["blockpruner"], method="search").save(tmp_path / "old.json")
    held = json.loads(path.read_text())
    del held["method"], held["settings"]
    path.write_text(json.dumps(held))
    assert SelectionProfile.load(path).method == "search"
    for change in ({"method": "greedy"}, {"settings": 3}, {"settings": {"seed": "0"}}):
        path.write_text(json.dumps({**held, **change}))
        with pytest.raises(ProfileError, match="is not a valid selection profile"):
            SelectionProfile.load(path)


def test_block_influence_is_most_skips_set(model, prompts):
    importance = calibrate(model, prompts)
    options = {"phase": "e2e", "budget": Budget(layers=2), "num_layers": LAYERS, "profile": importance}
    ours, most = build("block_influence", **options), build("most_skip", **options)
    assert ours is not None
    assert most is not None
    assert ours.skipped == most.skipped
    influence = [1 - x for x in importance.layer.similarity]
    assert ours.skipped.ffn == set(sorted(range(LAYERS), key=influence.__getitem__)[:2])
