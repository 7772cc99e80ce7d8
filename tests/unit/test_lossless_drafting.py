"""Where drafts come from, what steps cost, and which draft is chosen."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from adaskip.core.plan import SkipPlan
from adaskip.speculative import lossless
from adaskip.speculative.batch_rounds import RowsOfNGrams
from adaskip.speculative.choice import Greedy
from adaskip.speculative.drafting import TRIAL_SHARE, Drafting
from adaskip.speculative.ngrams import NGrams
from adaskip.speculative.skipped_model import SkippedModel
from adaskip.speculative.statistics import DraftStatistics
from adaskip.speculative.step_costs import ASSUMED_SLOPE, MOST, StepCosts
from adaskip.strategies import FixedPlan
from tests.families import random_model, random_prompts

IDS = torch.zeros(1, 1, dtype=torch.long)


def test_ngrams_draft_what_followed_the_longest_match():
    source = NGrams([1, 2, 3, 4, 9, 3, 7, 1, 2, 3])
    assert source.draft(IDS, 3, 0.0) == [4, 9, 3], "2 3 was followed by 4, the later 3 by 7"
    source.add([4], None)
    assert source.draft(IDS, 2, 0.0) == [9, 3]


def test_a_copy_that_reaches_the_end_repeats_itself():
    assert NGrams([5, 6, 7, 5, 6, 7]).draft(IDS, 7, 0.0) == [5, 6, 7, 5, 6, 7, 5]


def test_ngrams_learn_without_a_draft_and_by_length_of_the_match():
    source = NGrams([1, 2, 3, 4] * 3)
    before = source.survival(4)
    source.add([1, 2, 3, 4] * 5, None)
    after = source.survival(4)
    assert all(late > early for early, late in zip(before, after, strict=True))
    assert after == sorted(after, reverse=True)
    assert source.rates[1].value == pytest.approx(NGrams([]).rates[1].value), "no match was that short"


def test_a_prompt_of_embeddings_has_nothing_to_copy():
    source = NGrams([])
    assert source.survival(3) == []
    source.add([4], None)
    assert source.draft(IDS, 2, 0.0) == [4, 4]


class Forwards:
    """Logits whose highest one is the token 1, by so much each."""

    prompt_length = 1

    def __init__(self, leads):
        self.leads, self.forgotten, self.seconds = iter(leads), 0, 0.0

    def clock(self):
        self.seconds += 0.5
        return self.seconds

    def draft(self, ids, plan):
        return torch.tensor([[0.0, next(self.leads), 0.0]])

    def forget_draft(self, plan, drafted):
        self.forgotten += drafted


def skipped_model(leads, ends=()):
    strategy = FixedPlan(num_layers=2, plan=SkipPlan(ffn={1}))
    return SkippedModel(Forwards(leads), strategy, lambda ids, scores: scores, Greedy(), ends)


def test_the_skipped_model_stops_where_it_is_not_sure():
    sure, unsure = 9.0, 0.2
    source = skipped_model([sure, sure, unsure, sure, sure])
    assert source.draft(IDS, 5, least_survival=0.4) == [1, 1, 1]
    assert source.forwards.forgotten == 3
    assert skipped_model([sure, sure, unsure, sure, sure]).draft(IDS, 5, least_survival=0.0) == [1] * 5
    assert skipped_model([sure] * 5, ends=(1,)).draft(IDS, 5, least_survival=0.0) == [1]


def test_the_skipped_model_learns_how_often_and_how_fast():
    source = skipped_model([9.0] * 40)
    assert source.draft_s(2.0) == 1.5, "its share of the sublayers, before it has drafted"
    for _ in range(10):
        source.add([2], source.draft(IDS, 1, 0.0))
    assert source.draft_s(2.0) == 0.5, "as measured"
    assert source.survival(2) == [pytest.approx(source.rate.value), pytest.approx(source.rate.value**2)]
    assert source.rate.value < 0.3
    assert source.draft(IDS, 5, least_survival=0.5) == [1], "a sure token of a draft that was always wrong"


def test_an_empty_plan_drafts_from_ngrams_only():
    model, (prompt,) = random_model("granite"), random_prompts([9])
    ids, decoder = prompt.repeat(4)[None], lossless(model, SkipPlan())
    options = {"max_new_tokens": 40, "eos_token_id": None, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, custom_generate=decoder, **options), expected)
    assert decoder.last_request.draft_forwards == 0 < decoder.last_request.copied


def test_costs_are_medians_with_lines_between_and_ratios_last():
    costs = StepCosts()
    costs.add(1, 2.0)
    assert costs.curve()[4] == pytest.approx(2.0 * (1 + 3 * ASSUMED_SLOPE))
    assert not costs.measured
    for seconds in (5.0, 6.0, 100.0):
        costs.add(5, seconds)
    curve = costs.curve()
    assert (curve[1], curve[3], curve[5]) == (2.0, 4.0, 6.0)
    assert curve[MOST] == pytest.approx(6.0 + (MOST - 5) * 1.0)
    costs.new_request()
    costs.add(1, 4.0)
    assert costs.measured
    assert costs.curve()[5] == pytest.approx(12.0), "three steps, as in the request before"


class Oracle:
    """Drafts the right token with a fixed probability, which it knows."""

    def __init__(self, acceptance, seconds=0.0):
        self.acceptance, self.seconds, self.drafts = acceptance, seconds, []

    def survival(self, most):
        return [self.acceptance ** (i + 1) for i in range(most)]

    def draft_s(self, step_s):
        return self.seconds

    def draft(self, ids, most, least_survival):
        self.drafts.append(most)
        return [0] * most

    def add(self, kept, drafted): ...


def decode(sources, cost, tokens=600, costs=None, seed=0):
    """Seconds of an answer and its drafting. cost: seconds of a forward by its number of tokens."""
    draw, drafting = random.Random(seed).random, Drafting(sources, costs or StepCosts())
    drafting.begin([0])
    spent, made = 0.0, 0
    while made < tokens:
        draft = drafting.next(tokens - made - 1)
        drafted = draft.source.draft(IDS, draft.most, draft.least_survival) if draft.source else []
        accepted = 0
        while accepted < len(drafted) and draw() < draft.source.acceptance:
            accepted += 1
        draft_s = len(drafted) * draft.source.seconds if draft.source else 0.0
        drafting.add(draft, drafted, [0] * (accepted + 1), draft_s, cost(len(drafted) + 1))
        spent, made = spent + draft_s + cost(len(drafted) + 1), made + accepted + 1
    return spent, made


def dear(tokens):
    return 1.0 if tokens == 1 else 1.8 + 0.05 * tokens


def flat(tokens):
    return 1.0


def cheaper_than_a_step(tokens):
    return 1.0 if tokens == 1 else 0.6


@pytest.mark.parametrize("cost", [dear, flat])
def test_good_drafts_pay(cost):
    spent, made = decode([Oracle(0.9)], cost)
    assert made / spent > 2.0


def test_the_better_source_is_taken():
    good, bad = Oracle(0.9), Oracle(0.3)
    decode([bad, good], flat)
    assert len(good.drafts) > 20 * max(1, len(bad.drafts))


def test_the_set_is_chosen_anew_by_what_it_earns():
    """The first skips more and is right until it has drafted 40 times, then never; the second always is."""

    class Fading(Oracle):
        def survival(self, most):
            self.acceptance = 0.95 if len(self.drafts) < 40 else 0.05
            return super().survival(most)

    fast, slow = Fading(0.95, seconds=0.1), Oracle(0.9, seconds=0.2)
    decode([fast, slow], flat, 6000)
    assert min(fast.drafts[:40]) > 1 == max(fast.drafts[40:]), "tried, one token at a time"
    assert len(slow.drafts) > 40 > len(fast.drafts) - 40


def test_a_set_that_has_become_better_is_found_while_another_drafts():
    class Growing(Oracle):
        """Nearly always right from its third draft on."""

        def survival(self, most):
            self.acceptance = 0.3 if len(self.drafts) < 2 else 0.97
            return super().survival(most)

    fast, slow = Growing(0.3, seconds=0.1), Oracle(0.9, seconds=0.2)
    decode([fast, slow], flat, 12000)
    assert fast.drafts[:2] == [1, 1]
    assert min(fast.drafts[2:20]) > 1
    assert len(slow.drafts) > 10


def test_several_sources_that_do_not_pay_are_tried_no_more_often_than_one():
    sources = [Oracle(0.1, seconds=seconds) for seconds in (0.3, 0.4, 0.5)]
    spent, made = decode(sources, flat, 1000)
    assert all(source.drafts for source in sources)
    assert sum(source.seconds * len(source.drafts) for source in sources) <= 1000 * TRIAL_SHARE
    assert spent < 1.02 * made


def test_where_several_tokens_cost_less_than_one_even_useless_drafts_pay():
    spent, made = decode([Oracle(0.0)], cheaper_than_a_step)
    assert made / spent > 1.5


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_that_repeats_nothing_on_purpose_loses_little(seed):
    """A random sequence: its n-grams occur before by chance, and what followed them says nothing."""
    draw = random.Random(seed)
    tokens = [draw.randrange(300) for _ in range(1400)]
    spent, made = replay(NGrams(tokens[:1000]), tokens[1000:], dear)
    assert made < spent < 1.03 * made, "something was drafted"


@pytest.mark.parametrize("cost", [dear, flat])
def test_an_answer_that_copies_the_prompt_is_decoded_much_faster(cost):
    draw = random.Random(0)
    prompt = [draw.randrange(3000) for _ in range(1000)]
    spent, made = replay(NGrams(prompt), prompt[300:500], cost)
    assert made / spent > 3.5


def replay(source, answer, cost):
    """Seconds of decoding `answer` with drafts of `source`, and the tokens after the first."""
    drafting, made, spent = Drafting([source], StepCosts()), 1, 0.0
    drafting.begin(answer[:1])
    while made < len(answer):
        draft = drafting.next(len(answer) - made - 1)
        drafted = source.draft(IDS, draft.most, draft.least_survival) if draft.source else []
        ahead = answer[made : made + len(drafted)]
        accepted = next(
            (i for i, pair in enumerate(zip(drafted, ahead, strict=True)) if pair[0] != pair[1]), len(ahead)
        )
        kept, seconds = answer[made : made + accepted + 1], cost(len(drafted) + 1)
        drafting.add(draft, drafted, kept, 0.0, seconds)
        made, spent = made + len(kept), spent + seconds
    return spent, made - 1


def test_without_a_gain_a_source_with_costs_is_tried_seldom_and_one_token_at_a_time():
    source = Oracle(0.1, seconds=0.3)
    decode([source], flat, 1000)
    assert 0 < len(source.drafts) <= 1000 * TRIAL_SHARE / 0.3
    assert set(source.drafts) == {1}


def test_statistics_add_up():
    total = DraftStatistics()
    assert total.acceptance_rate is None
    assert total.tokens_per_verify is None
    for _ in range(2):
        total += DraftStatistics(requests=1, new_tokens=6, verify_forwards=2, accepted=3, judged=4, draft_s=0.5)
    assert (total.requests, total.acceptance_rate, total.tokens_per_verify, total.draft_s) == (2, 0.75, 3.0, 1.0)


def test_the_slowest_row_of_a_batch_decides():
    """By its answer so far; of rows that are level, the one that drafts worst."""
    rows = [SimpleNamespace(finished=False, ids=torch.zeros(1, 9), ngrams=NGrams([1, 2] * 9)) for _ in range(3)]
    copied, new = NGrams([1, 2] * 9).survival(3), NGrams([1, 2, 3]).survival(3)
    source = RowsOfNGrams(rows)  # pyright: ignore[reportArgumentType]
    assert source.survival(3) == copied
    rows[1].ngrams = NGrams([1, 2, 3])
    assert source.survival(3) == new
    rows[1].ids = torch.zeros(1, 12)
    assert source.survival(3) == copied
    rows[0].finished = rows[2].finished = True
    assert source.survival(3) == new
