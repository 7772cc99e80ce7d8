"""Sampling in lossless mode gives what stock `generate` samples with the same seed, whatever is drafted."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from adaskip.core.plan import SkipPlan
from adaskip.speculative import lossless
from adaskip.speculative.choice import Sampling
from adaskip.strategies import FixedPlan
from tests.families import random_model

DRAFT = FixedPlan(num_layers=2, plan=SkipPlan(ffn={1}))
MODEL = random_model("llama", num_layers=2)
PROMPT = torch.tensor([[3, 5, 6, 4, 3, 5]])
SEEDS = range(5)


class FrequencyPenalty(LogitsProcessor):
    """Counts the tokens that it sees one by one."""

    def __init__(self):
        self.counts = [0.0] * MODEL.config.vocab_size

    def __call__(self, input_ids, scores):
        self.counts[int(input_ids[0, -1])] += 1
        return scores - 1.5 * torch.tensor(self.counts)


def sampled(seed, decoder=None, processor=None, **options):
    torch.manual_seed(seed)
    options = {"do_sample": True, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0} | options
    if processor is not None:
        options["logits_processor"] = LogitsProcessorList([processor()])
    answer = MODEL.generate(PROMPT, custom_generate=decoder, **options)
    return answer.tolist(), torch.rand(()).item()


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5, "top_k": 5}, {"top_p": 0.8, "min_p": 0.01}, {"processor": FrequencyPenalty}],
    ids=["plain", "top-k", "top-p", "processor with state"],
)
def test_a_seed_gives_the_tokens_that_it_gives_without_drafts(options):
    """And leaves the generator as stock `generate` leaves it, so that the next request agrees, too."""
    stock = [sampled(seed, **options) for seed in SEEDS]
    assert len({str(answer) for answer, _ in stock}) > len(SEEDS) / 2, "the seed matters"
    for gamma in (None, 1, 4):
        decoder = lossless(MODEL, DRAFT, gamma=gamma)
        assert [sampled(seed, decoder, **options) for seed in SEEDS] == stock
        if gamma is not None and "processor" not in options:
            assert 0 < decoder.statistics.accepted < decoder.statistics.judged


def test_a_processor_with_state_that_saw_drafts_would_change_the_answers():
    decoder = lossless(MODEL, DRAFT, gamma=4, stateless=(FrequencyPenalty,))
    options = {"processor": FrequencyPenalty}
    assert [sampled(seed, decoder, **options) for seed in SEEDS] != [sampled(seed, **options) for seed in SEEDS]


def test_draft_and_full_model_with_equal_scores_choose_the_same_tokens():
    choose, scores = Sampling(torch.device("cpu")), torch.randn(6, 1, 50)
    with choose.ahead():
        drafted = [int(choose(row)) for row in scores]
    assert [int(choose(row)) for row in scores] == drafted
    assert [int(choose(row)) for row in scores] != drafted, "each token takes new random numbers"


def test_close_distributions_are_mostly_accepted():
    """Independent draws would agree with the probability sum p^2, here about 0.08."""
    torch.manual_seed(0)
    choose, agreed = Sampling(torch.device("cpu")), 0
    for _ in range(300):
        scores, noise = torch.randn(1, 20), 0.2 * torch.randn(1, 20)
        with choose.ahead():
            drafted = int(choose(scores + noise))
        agreed += int(choose(scores)) == drafted
    assert agreed > 240
