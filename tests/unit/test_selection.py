"""Sets chosen by the divergence of the output: the measure, the search, the profile and the strategy."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch.nn.functional import kl_div

from adaskip.calibration import divergence as divergence_module
from adaskip.calibration.divergence import OutputDivergence
from adaskip.calibration.measure import calibrate
from adaskip.calibration.progress import Progress
from adaskip.calibration.search import SEARCH, most_measured, search
from adaskip.calibration.select import most_forwards, select, sets_of_others
from adaskip.core.generate import generate
from adaskip.core.plan import EMPTY_PLAN, Budget, SkipPlan, Sublayer
from adaskip.profiles.fields import ProfileError
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from adaskip.strategies import CalibratedSkip, build
from tests.families import random_model, random_prompts
from tests.reference import ReferenceDecoder

pytestmark = pytest.mark.usefixtures("short_answers")
PLAN = SkipPlan(attention={0, 2}, ffn={1}, scales={("ffn", 1): 1.2})
ENDS = {"eos_token_ids": [2], "pad_token_id": 0}
LAYERS = 4
ALL = [Sublayer(kind, layer) for layer in range(LAYERS) for kind in ("attention", "ffn")]


def naive_divergence(model, prompt, phase: str, plan: SkipPlan) -> float:
    """Token by token on a decoder without the skipped sublayers."""
    (answer,) = generate(model, None, [prompt], max_new_tokens=divergence_module.ANSWER_TOKENS, **ENDS)
    tokens = [*prompt.tolist(), *answer.token_ids]
    dense = len(prompt) if phase == "decode" else 0
    full, skipped = ReferenceDecoder(model), ReferenceDecoder(model)
    p = full.run(tokens).log_softmax(-1)
    q = torch.stack([skipped.step(token, plan if i >= dense else EMPTY_PLAN) for i, token in enumerate(tokens)])
    kl = kl_div(q.log_softmax(-1), p, reduction="none", log_target=True).sum(-1)
    if phase == "decode":  # the answer's first token is the prompt's last forward's, which is dense
        return float(kl[len(prompt) :].mean())
    answered = kl[len(prompt) - 1 :].mean()
    return float(answered if phase == "e2e" else (kl[: len(prompt) - 1].mean() + answered) / 2)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2"])
@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_divergence_is_that_of_a_decoder_without_the_sublayers(family, phase):
    model = random_model(family)
    prompts = random_prompts([9, 14])
    divergence = OutputDivergence(model, prompts, phase, **ENDS)
    expected = [naive_divergence(model, prompt, phase, PLAN) for prompt in prompts]
    assert min(expected) > 0.01
    for _ in range(2):  # the K/V of the dense part survive a call
        torch.testing.assert_close(divergence(PLAN, range(2)), expected, rtol=1e-3, atol=1e-5)
    assert divergence(PLAN, [1]) == pytest.approx(expected[1:], rel=1e-3)
    assert divergence(EMPTY_PLAN, range(2)) == pytest.approx([0, 0], abs=1e-6)


def test_prompts_of_one_length_are_answered_together(monkeypatch):
    model, prompts = random_model("llama"), random_prompts([9, 14, 9, 9])
    alone = [generate(model, None, [prompt], max_new_tokens=12, **ENDS)[0].token_ids for prompt in prompts]
    batches = []

    def counted(model, strategy, batch, **options):
        batches.append(len(batch))
        return generate(model, strategy, batch, **options)

    monkeypatch.setattr(divergence_module, "generate", counted)
    monkeypatch.setattr(divergence_module, "BATCH_TOKENS", 2 * (9 + 12))
    made = list(divergence_module.greedy_answers(model, prompts, **ENDS))
    assert made == [{0: alone[0], 2: alone[2]}, {3: alone[3]}, {1: alone[1]}]
    assert batches == [2, 1, 1]
    assert list(divergence_module.greedy_answers(model, prompts, **ENDS, known={0, 1, 3})) == made[:1]  # as a whole


def test_the_cost_counts_every_forward_of_what_was_asked():
    model = random_model("llama")
    divergence = OutputDivergence(model, random_prompts([9, 14]), "prefill", **ENDS)
    forwards, tokens, seconds = divergence.num_forwards, divergence.num_tokens, divergence.seconds
    divergence(PLAN, [0, 1, 1])
    assert divergence.num_forwards == forwards + 3
    assert divergence.num_tokens == tokens + sum(divergence.passages[i].ids.numel() for i in (0, 1, 1))
    assert divergence.seconds > seconds > 0


def additive(weights):
    """A measure without interactions, slightly different on each prompt."""

    def measure(chosen, which):
        return [sum(weights[s] for s in chosen) * (1 + 0.01 * prompt) for prompt in which]

    return measure


def test_without_interactions_the_search_finds_the_best_set_of_each_size():
    draw = random.Random(0)
    weights = {sublayer: draw.random() for sublayer in ALL}
    found = search(additive(weights), ALL, num_layers=LAYERS, num_prompts=6, up_to=5, starts={})
    for count, choice in found.items():
        best = min(combinations(ALL, count), key=lambda chosen: sum(weights[s] for s in chosen))
        assert choice.sublayers == frozenset(best)
        assert choice.found_by == SEARCH
        assert choice.divergence == pytest.approx(sum(weights[s] for s in best) * 1.025)


def test_what_has_become_dear_given_the_others_is_not_chosen():
    """Two sublayers that do the same: either may go, not both. Choosing by the first look would take both."""
    weights = dict.fromkeys(ALL, 1.0) | {ALL[1]: 0.1, ALL[3]: 0.2}

    def measure(chosen, which):
        return [sum(weights[s] for s in chosen) + 5 * ({ALL[1], ALL[3]} <= chosen) for _ in which]

    found = search(measure, ALL, num_layers=LAYERS, num_prompts=2, up_to=2, starts={})
    assert ALL[1] in found[2].sublayers
    assert ALL[3] not in found[2].sublayers


def test_a_better_set_of_another_takes_over_and_the_search_goes_on_from_it():
    theirs = frozenset(ALL[4:6])

    def measure(chosen, which):
        return [(0.1 if theirs <= chosen else float(len(chosen))) + 0.01 * len(chosen) for _ in which]

    found = search(measure, ALL, num_layers=LAYERS, num_prompts=6, up_to=4, starts={"early_exit": {2: theirs}})
    assert found[2].sublayers == theirs
    assert found[2].found_by == "early_exit"
    assert theirs < found[3].sublayers < found[4].sublayers
    assert found[4].divergence == pytest.approx(0.14)


def test_what_is_clear_after_the_screening_is_not_measured_further():
    """Differences that are the same on every prompt are clear, whatever the prompts add."""
    weights, asked = {sublayer: 1.0 + 0.1 * i for i, sublayer in enumerate(ALL)}, set()

    def measure(chosen, which):
        asked.update((chosen, prompt) for prompt in which)
        return [100.0 * prompt + sum(weights[s] for s in chosen) for prompt in which]

    usual = {"adaskip": {1: frozenset(ALL[7:])}}
    found = search(measure, ALL, num_layers=LAYERS, num_prompts=9, up_to=1, starts=usual, default="adaskip")
    assert found[1].sublayers == frozenset(ALL[:1])
    assert [sum(chosen == frozenset({sublayer}) for chosen, _ in asked) for sublayer in ALL] == [9, *[4] * 7]


def test_a_set_that_overflows_on_a_late_prompt_drops_no_other():
    def measure(chosen, which):
        late = float("inf") if ALL[0] in chosen else 3.0
        return [1.0 + 0.1 * (ALL[0] not in chosen) + 0.01 * prompt if prompt < 8 else late for prompt in which]

    found = search(measure, ALL, num_layers=LAYERS, num_prompts=9, up_to=1, starts={})
    assert found[1].sublayers == frozenset(ALL[1:2])


@pytest.mark.parametrize(("late", "found_by"), [(0.0, "adaskip"), (0.1, SEARCH)])
def test_a_default_that_is_measured_on_all_prompts_is_judged_by_all(late, found_by):
    """Its first four prompts alone are clearly worse, but its total was below the best one's until the last."""
    gaps = [0.1, 0.101, 0.1, 0.101, 0.9, -0.9, 0.9, -0.9, late]
    default = frozenset(ALL[7:])

    def measure(chosen, which):
        return [2.0 + (gaps[prompt] if chosen == default else 0.0 if ALL[0] in chosen else 9.0) for prompt in which]

    options = {"num_layers": LAYERS, "num_prompts": 9, "up_to": 1, "starts": {"adaskip": {1: default}}}
    speeds = {"faster": lambda chosen: 1.0} if found_by == "adaskip" else {}
    assert search(measure, ALL, **options, default="adaskip", **speeds)[1].found_by == found_by


@pytest.mark.parametrize(("spread", "chosen"), [(0.01, SEARCH), (0.8, "adaskip")])
def test_the_default_is_left_only_for_what_is_better_beyond_chance(spread, chosen):
    """The search's set is better by 0.1 on average, whatever the spread over the prompts."""
    divergences = {frozenset(ALL[:1]): (1.0, 0.0), frozenset(ALL[1:2]): (0.9, spread)}

    def measure(sublayers, which):
        mean, gap = divergences.get(sublayers, (3.0, 0.0))
        return [mean + (gap if prompt % 2 else -gap) for prompt in which]

    options = {"num_layers": LAYERS, "num_prompts": 20, "up_to": 1, "starts": {"adaskip": {1: frozenset(ALL[:1])}}}
    assert search(measure, ALL, **options)[1].sublayers == frozenset(ALL[1:2])
    found = search(measure, ALL, **options, default="adaskip")[1]
    assert found.found_by == chosen
    assert (found.sublayers, found.divergence) == (
        (frozenset(ALL[:1]), 1.0) if chosen == "adaskip" else (frozenset(ALL[1:2]), pytest.approx(0.9))
    )


def test_one_attention_stays_live():
    weights = {sublayer: float(sublayer.kind == "ffn") for sublayer in ALL}
    found = search(additive(weights), ALL, num_layers=LAYERS, num_prompts=1, up_to=7, starts={})
    assert sum(s.kind == "attention" for s in found[7].sublayers) == LAYERS - 1
    with pytest.raises(ValueError, match="8 candidates are too few for a set of 8 sublayers"):
        search(additive(weights), ALL, num_layers=LAYERS, num_prompts=1, up_to=8, starts={})


@pytest.fixture(scope="module")
def model():
    return random_model("llama")


@pytest.fixture(scope="module")
def prompts():
    return random_prompts([9, 14, 11, 8, 10])


@pytest.fixture(scope="module", params=["prefill", "decode", "e2e"])
def selection(request, model, prompts):
    return select(model, prompts, request.param, up_to=4, dataset="made up", data_ids=("a", "b"), **ENDS)


def test_no_set_diverges_more_on_the_calibration_prompts_than_that_of_another(selection, model, prompts):
    importance = calibrate(model, prompts)
    divergence = OutputDivergence(model, prompts, selection.phase, **ENDS)
    for count, chosen in selection.selected.items():
        assert sum(divergence(chosen.plan, range(5))) / 5 == pytest.approx(chosen.divergence, rel=1e-4)
        for sets in sets_of_others(importance, 4).values():
            if count in sets:
                plan = SkipPlan.of_sublayers({s: importance.scale_of(s) for s in sets[count]})
                assert chosen.divergence <= sum(divergence(plan, range(5))) / 5 + 1e-6


def test_a_selection_is_saved_loaded_and_refused_on_another_model(selection, model, tmp_path):
    path = selection.save(tmp_path / "selection.json")
    assert SelectionProfile.load(path, model) == selection
    assert selection.cost.num_forwards > selection.cost.adaskip_forwards == 5
    with pytest.raises(ProfileError, match="this model's weights are"):
        SelectionProfile.load(path, random_model("llama", seed=1))
    with pytest.raises(ProfileError, match="is not a saved importance profile"):
        ImportanceProfile.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not a saved selection profile"),
        ({"cost": {}}, "is not a valid selection profile"),
        ({"selected": {"2": {"attention": {}, "ffn": {"1": 1}, "divergence": 1, "found_by": "x"}}}, "for 2 .* has 1"),
        ({"method": "greedy"}, "method of a selection must be one of search, cosine_window, blockpruner, evopress"),
        ({"selected": {"1": {"attention": {}, "ffn": {}, "divergence": 1, "found_by": "x"}}}, "for 1 sublayers has 0"),
    ],
)
def test_a_damaged_selection_is_refused(selection, tmp_path, change, message):
    path = selection.save(tmp_path / "selection.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ProfileError, match=message):
        SelectionProfile.load(path)


def test_the_strategy_skips_the_set_of_its_budget_in_its_phase(selection):
    strategy = build("calibrated", phase=selection.phase, budget=Budget(sublayers=3), num_layers=4, profile=selection)
    assert isinstance(strategy, CalibratedSkip)
    assert strategy.skipped == selection.selected[3].plan
    assert strategy.prefill_plan == (EMPTY_PLAN if selection.phase == "decode" else strategy.skipped)
    assert strategy.window_tokens == 0


def test_a_selection_for_something_else_is_refused(selection, model, prompts):
    other = {"prefill": "decode", "decode": "e2e", "e2e": "prefill"}[selection.phase]
    options = {"phase": selection.phase, "budget": Budget(sublayers=3), "num_layers": 4, "profile": selection}
    with pytest.raises(ValueError, match=f"for phase {selection.phase}, not for {other}"):
        build("calibrated", **{**options, "phase": other})
    with pytest.raises(ValueError, match="up to 4 sublayers, budget sublayers=5 needs 5"):
        build("calibrated", **{**options, "budget": Budget(sublayers=5)})
    with pytest.raises(ValueError, match="has 4 layers, but the model has 6"):
        build("calibrated", **{**options, "num_layers": 6})
    with pytest.raises(ValueError, match="of type ImportanceProfile; got SelectionProfile"):
        build("adaskip", **options)
    with pytest.raises(ValueError, match="of type SelectionProfile; got ImportanceProfile"):
        build("calibrated", **{**options, "profile": calibrate(model, prompts)})


def answers_of(model, prompts):
    return [
        generate(model, None, [prompt], max_new_tokens=divergence_module.ANSWER_TOKENS, **ENDS)[0] for prompt in prompts
    ]


def test_a_search_measures_no_more_than_foretold(selection, model, prompts):
    answers = sum(len(answer.token_ids) for answer in answers_of(model, prompts))
    setup = len(prompts) * 2 + answers + len(prompts) * (2 if selection.phase == "decode" else 1)
    searched = selection.cost.num_forwards - setup
    assert 0 < searched <= most_forwards(LAYERS, len(prompts), 4)


@pytest.mark.parametrize("num_prompts", [3, 6])
def test_the_first_step_measures_the_most_where_nothing_is_dropped(num_prompts):
    """All contenders equal until the last prompt: none can be given up early."""
    asked = set()

    def measure(chosen, which):
        asked.update((chosen, prompt) for prompt in which)
        return [1.0 if prompt == num_prompts - 1 else 0.0 for prompt in which]

    search(measure, ALL, num_layers=LAYERS, num_prompts=num_prompts, up_to=1, starts={})
    assert len(asked) == most_measured(len(ALL), num_prompts, [0])


class Stopped(Exception):
    pass


def test_a_stopped_selection_goes_on_where_it_was(model, prompts, tmp_path, monkeypatch):
    path, calls = tmp_path / "partial.jsonl", []
    measured = OutputDivergence.__call__

    def stopping(self, plan, which):
        calls.append((plan, tuple(which)))
        if len(calls) == 20:
            raise Stopped
        return measured(self, plan, which)

    options = {"up_to": 4, "progress_path": path, **ENDS}
    whole = select(model, prompts, "prefill", up_to=4, **ENDS)
    monkeypatch.setattr(OutputDivergence, "__call__", stopping)
    with pytest.raises(Stopped):
        select(model, prompts, "prefill", **options)
    with path.open("a") as file:
        file.write('{"set": [["ffn", 1]], "prom')  # killed while it wrote
    first = calls[:19]
    calls[:] = [None] * 20
    again = select(model, prompts, "prefill", **options)
    assert not set(calls[20:]) & set(first)
    assert again.selected == whole.selected
    assert again.cost.num_forwards == whole.cost.num_forwards
    assert again.cost.num_tokens == whole.cost.num_tokens
    assert path.exists()  # until the profile is saved
    calls.clear()
    assert select(model, prompts, "prefill", **options).selected == whole.selected
    assert not calls


def test_what_another_search_has_measured_is_not_taken_over(model, prompts, tmp_path):
    path = tmp_path / "partial.jsonl"
    Progress(lambda chosen, prompt: 0.0, path, {"phase": "prefill"})(frozenset(ALL[:1]), [0])
    assert len(path.read_text().splitlines()) == 2
    assert Progress(lambda chosen, prompt: 1.0, path, {"phase": "prefill"})(frozenset(ALL[:1]), [0, 1]) == [0.0, 1.0]
    assert Progress(lambda chosen, prompt: 2.0, path, {"phase": "decode"})(frozenset(ALL[:1]), [0]) == [2.0]
    assert Progress(lambda chosen, prompt: 3.0, path, {"phase": "prefill"})(frozenset(ALL[:1]), [0, 1]) == [0.0, 1.0]


def test_an_output_that_overflows_is_as_bad_as_can_be(model, prompts):
    """Two sublayers that leave the output finite, whatever the others do; then none is left."""
    finite = frozenset(ALL[:2])

    def measure(sublayers, which):
        return [float(len(sublayers)) if sublayers <= finite else float("inf") for _ in which]

    options = {"num_layers": LAYERS, "num_prompts": 2, "starts": {}}
    assert search(measure, ALL, up_to=2, **options)[2].sublayers == finite
    with pytest.raises(ValueError, match="no set of 3 sublayers leaves the output finite"):
        search(measure, ALL, up_to=3, **options)
    divergence = OutputDivergence(model, prompts[:1], "prefill", **ENDS)
    overflowing = SkipPlan.of_sublayers({Sublayer("ffn", 1): 1e38, Sublayer("ffn", 2): 1e38})
    assert divergence(overflowing) == [float("inf")]


def test_in_decode_prompts_without_an_answer_are_left_out(model, prompts, monkeypatch):
    answered = answers_of(model, prompts)
    silent = [replace(answer, token_ids=[] if i % 2 else answer.token_ids) for i, answer in enumerate(answered)]
    coming = iter(silent)
    monkeypatch.setattr(divergence_module, "generate", lambda model, plan, batch, **ends: [next(coming) for _ in batch])
    assert len(OutputDivergence(model, prompts, "decode", **ENDS)) == 3
    monkeypatch.setattr(divergence_module, "generate", lambda model, plan, batch, **ends: [silent[1]] * len(batch))
    with pytest.raises(ValueError, match="gives none to any of the 5 prompts"):
        OutputDivergence(model, prompts, "decode", **ENDS)
    assert len(OutputDivergence(model, prompts, "e2e", **ENDS)) == 5
