"""Sampling with a draft draws from the full model's distribution, by chi-square against exact probabilities."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from transformers import LogitsProcessor, LogitsProcessorList

from adaskip.core.plan import SkipPlan
from adaskip.speculative import lossless
from adaskip.speculative.choice import Sampling
from adaskip.strategies import FixedPlan
from tests.families import random_model

DRAFT = FixedPlan(num_layers=2, plan=SkipPlan(attention={0}, ffn={0, 1}))


class AcceptAll(Sampling):
    """A broken rule: the draft's distribution instead of the full model's."""

    def verify(self, scores, drafted):
        return super().verify(scores, None) if drafted is None else torch.tensor([drafted.token])


class RedrawFromTheFullModel(Sampling):
    """A broken rule, and a likely mistake: after a rejection draws from p, not from what is left of it."""

    def verify(self, scores, drafted):
        token = super().verify(scores, drafted)
        return token if drafted is None or int(token) == drafted.token else super().verify(scores, None)


BROKEN_RULE = pytest.param(AcceptAll, marks=pytest.mark.slow)


def p_value(counts, probabilities):
    """Of the hypothesis that counts were drawn with these probabilities; outcomes expected under 5 times are pooled."""
    expected = torch.tensor(probabilities, dtype=torch.float64) * sum(counts)
    observed = torch.tensor(counts, dtype=torch.float64)
    if observed[expected == 0].any():
        return 0.0
    rare = (expected > 0) & (expected < 5)
    kept = expected >= 5
    seen = torch.cat([observed[kept], observed[rare].sum()[None]])
    due = torch.cat([expected[kept], expected[rare].sum()[None]])
    return chisquare(seen[due > 0], due[due > 0], sum_check=False).pvalue


def draws(chooser, p_scores, q_scores, count):
    torch.manual_seed(0)
    counts = [0] * p_scores.shape[1]
    for _ in range(count):
        counts[int(chooser.verify(p_scores, chooser.draft(q_scores)))] += 1
    return counts


def test_a_token_accepted_or_redrawn_has_the_full_models_distribution():
    torch.manual_seed(1)
    p_scores, q_scores = torch.randn(1, 7), torch.randn(1, 7)
    p_scores[0, 2] = q_scores[0, 4] = float("-inf")  # as top-k and top-p leave it
    p = p_scores.softmax(-1)[0].tolist()
    counts = draws(Sampling(), p_scores, q_scores, 4000)
    assert counts[2] == 0
    assert p_value(counts, p) > 0.01
    for broken in (AcceptAll(), RedrawFromTheFullModel()):
        assert p_value(draws(broken, p_scores, q_scores, 4000), p) < 1e-6


def test_equal_distributions_are_always_accepted():
    scores = torch.randn(1, 7, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    chooser = Sampling()
    for _ in range(500):
        drafted = chooser.draft(scores)
        assert int(chooser.verify(scores, drafted)) == drafted.token


TOKENS = 4
OPTIONS = {"do_sample": True, "temperature": 0.8, "top_k": 3, "top_p": 0.8, "eos_token_id": None, "pad_token_id": 0}


class FrequencyPenalty(LogitsProcessor):
    """Counts the tokens of the answer as they come; `before`: those it has counted already."""

    def __init__(self, before=()):
        self.counts = [0] * 8
        for token in before[:-1]:
            self.counts[token] += 1
        self.begun = bool(before)

    def __call__(self, input_ids, scores):
        if self.begun:
            self.counts[int(input_ids[0, -1])] += 1
        self.begun = True
        return scores - 1.5 * torch.tensor(self.counts)


def exact_probabilities(model, prompt, processor=None):
    """Probability of every answer of `TOKENS` tokens, by the full model and transformers' own processors.

    processor: makes the user's one, from the part of the answer it has seen.
    """
    answers = {(): 1.0}
    for _ in range(TOKENS):
        longer = {}
        for answer, probability in answers.items():
            ids = torch.cat([prompt, torch.tensor(answer, dtype=torch.long)])[None]
            asked = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 1}
            if processor is not None:
                asked["logits_processor"] = LogitsProcessorList([processor(answer)])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS, **asked)
            for token, p in enumerate(out.scores[0].softmax(-1)[0].tolist()):
                if p:
                    longer[*answer, token] = probability * p
        answers = longer
    return answers


@pytest.mark.parametrize("chooser", [Sampling, BROKEN_RULE], ids=["speculative sampling", "broken"])
def test_answers_are_drawn_as_the_full_model_draws_them(chooser, monkeypatch):
    monkeypatch.setattr("adaskip.speculative.rounds.Sampling", chooser)
    model = random_model("llama", num_layers=2, vocab_size=8)
    prompt = torch.tensor([3, 5, 6, 4])
    exact = exact_probabilities(model, prompt)
    assert sum(exact.values()) == pytest.approx(1.0)
    decoder = lossless(model, DRAFT, gamma=2)
    torch.manual_seed(0)
    counts = dict.fromkeys(exact, 0)
    for _ in range(600):
        output = model.generate(prompt[None], **OPTIONS, max_new_tokens=TOKENS, custom_generate=decoder)
        answer = tuple(output[0, len(prompt) :].tolist())
        counts[answer] = counts.get(answer, 0) + 1
    probabilities = [exact.get(answer, 0.0) for answer in counts]
    p = p_value(list(counts.values()), probabilities)
    if chooser is AcceptAll:
        assert p < 1e-6
    else:
        assert p > 0.01
        assert 0 < decoder.statistics.accepted < decoder.statistics.judged


@pytest.mark.parametrize(
    "stateless", [(), pytest.param((FrequencyPenalty,), marks=pytest.mark.slow)], ids=["kept from drafts", "broken"]
)
def test_answers_under_a_processor_with_state_are_drawn_as_the_full_model_draws_them(stateless):
    """Broken: the processor counts drafted tokens, rejected ones too."""
    model = random_model("llama", num_layers=2, vocab_size=8)
    prompt = torch.tensor([3, 5, 6, 4])
    exact = exact_probabilities(model, prompt, FrequencyPenalty)
    assert sum(exact.values()) == pytest.approx(1.0)
    plain = exact_probabilities(model, prompt)
    assert sum(abs(p - plain.get(answer, 0.0)) for answer, p in exact.items()) > 0.5, "the penalty matters"
    decoder = lossless(model, DRAFT, gamma=2, stateless=stateless)
    torch.manual_seed(0)
    counts = dict.fromkeys(exact, 0)
    for _ in range(600):
        processors = LogitsProcessorList([FrequencyPenalty()])
        options = {**OPTIONS, "max_new_tokens": TOKENS, "logits_processor": processors}
        output = model.generate(prompt[None], custom_generate=decoder, **options)
        answer = tuple(output[0, len(prompt) :].tolist())
        counts[answer] = counts.get(answer, 0) + 1
    p = p_value(list(counts.values()), [exact.get(answer, 0.0) for answer in counts])
    assert p < 1e-6 if stateless else p > 0.01


def test_a_seeded_run_repeats():
    model = random_model("llama", num_layers=2)
    decoder = lossless(model, DRAFT)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(
            model.generate(torch.tensor([[3, 5, 6]]), do_sample=True, max_new_tokens=30, custom_generate=decoder)
        )
    assert torch.equal(*runs)
