"""Chooses the set that drafts: the one with the most expected tokens per second on answers to some prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor

from adaskip.core.generate import generate
from adaskip.core.plan import EMPTY_PLAN, SkipPlan
from adaskip.core.strategy import Strategy
from adaskip.core.wrappers import unwrapped
from adaskip.speculative.decoder import drafting_strategies
from adaskip.speculative.draft_trials import LONGEST, Trial, Trials
from adaskip.speculative.drafting import GAIN, best_length
from adaskip.speculative.step_costs import StepCosts


def plan_of(given: Strategy | SkipPlan) -> SkipPlan:
    """What is skipped in a draft."""
    return given if isinstance(given, SkipPlan) else given.skipped


@dataclass(frozen=True)
class DraftCandidate:
    """What drafts of one strategy or plan earn and cost.

    accepted, judged: for the 1st, 2nd, ..., 15th token of a draft, how many were right, and how many were drafted.
    cost_ratio: time of a drafted token / time of a step of the full model. gamma: tokens of a draft with which most is
    expected. speedup: expected tokens per second of such drafts / those of plain decoding.
    """

    strategy: Strategy | SkipPlan
    accepted: tuple[int, ...]
    judged: tuple[int, ...]
    cost_ratio: float
    gamma: int
    speedup: float

    @property
    def acceptance(self) -> float:
        """Share of the tokens of the full model's answers that were drafted right."""
        return sum(self.accepted) / sum(self.judged)

    def __str__(self) -> str:
        name = "plan" if isinstance(self.strategy, SkipPlan) else self.strategy.name
        set_of, drafted = f"{name}, {len(plan_of(self.strategy))} sublayers", sum(self.judged)
        return (
            f"{set_of}: {self.acceptance:.3f} of {drafted} tokens accepted, "
            f"{self.cost_ratio:.3f} steps each; drafts of {self.gamma}: speedup {self.speedup:.3f}"
        )


@dataclass(frozen=True)
class DraftChoice:
    """The set to draft with, for `lossless(model, choice.strategy)`. Printed, it shows what was measured.

    strategy: as it was given; the empty plan, with which only n-grams draft, if no set pays. gamma, speedup: those of
    its `DraftCandidate`; None and 1.0 if no set pays. candidates: in the order given. verify_ratios: time of a forward
    of the full model over 1, 2, ..., 16 tokens / time of a step; numbers of tokens that did not occur lie on lines
    through those that did.
    """

    strategy: Strategy | SkipPlan
    gamma: int | None
    speedup: float
    candidates: tuple[DraftCandidate, ...]
    verify_ratios: tuple[float, ...]

    @property
    def plan(self) -> SkipPlan:
        """What is skipped in a draft; empty if no set pays."""
        return plan_of(self.strategy)

    def __str__(self) -> str:
        verify = ", ".join(f"{tokens} tokens {self.verify_ratios[tokens - 1]:.2f}" for tokens in (2, 4, 8, 16))
        chosen = "no set" if self.gamma is None else f"{len(self.plan)} sublayers, drafts of {self.gamma}"
        return "\n".join([*map(str, self.candidates), f"steps that a forward takes: {verify}", f"chosen: {chosen}"])


def choose_draft(
    model: Any,
    strategies: Strategy | SkipPlan | Sequence[Strategy | SkipPlan],
    prompts: Sequence[Tensor],
    *,
    new_tokens: int = 64,
    eos_token_ids: Sequence[int] = (),
) -> DraftChoice:
    """Choose the strategy or plan for `lossless` by acceptance per cost, on the full model's answers to some prompts.

    Each candidate drafts along the greedy answers as in a request: the full model has computed the K/V of everything
    before the draft, which ends at the first wrong token; the next draft begins behind that token. So every token after
    an answer's first is drafted once. Times of drafted tokens and of forwards over 2 to 16 tokens are compared with a
    step of the full model at the same place of the answer, in the clock of `lossless`.

    Chosen is the candidate and the length gamma with the most expected tokens per second:
    (accepted + 1) / (gamma * drafted token + forward over gamma + 1 tokens), where accepted = a + a**2 + ... + a**gamma
    for an acceptance of a. This takes acceptance as independent of the place in a draft; the candidates' `accepted` and
    `judged` show whether it was.

    A set must promise 5 % more than plain decoding, like every draft of `lossless`. Where a forward over several tokens
    takes less time than a step, it must also promise more than such forwards do with useless drafts.

    strategies: as in `lossless`, in any number; their sets must stay the same during an answer. prompts: token ids,
    each 1-D; they should resemble the prompts of the later use. new_tokens: limit of an answer. eos_token_ids: tokens
    that end an answer; if empty, those of the model's generation config.

    The result holds for this machine, dtype and number of threads, and about this length of prompts. It does not count
    n-grams, which also draft in `lossless`. Raises UnsupportedModelError and ValueError like `lossless`.
    """
    given = strategies if isinstance(strategies, Sequence) else [strategies]
    if not given or not prompts:
        raise ValueError(
            f"choose_draft needs at least one strategy or plan and one prompt; got {len(given)} and {len(prompts)}"
        )
    if new_tokens < 2:
        raise ValueError(f"choose_draft drafts the tokens after an answer's first; got new_tokens={new_tokens}")
    model = unwrapped(model)
    drafting = drafting_strategies(model, given)
    for strategy in drafting:
        if type(strategy).decode_plan is not Strategy.decode_plan and not strategy.is_steady:
            raise ValueError(
                f"strategy {strategy.name} changes its set during an answer, so it has no one acceptance and cost; "
                "allowed: a constant set"
            )
    trials = Trials([Trial(*pair) for pair in zip(given, drafting, strict=True)])
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "eos_token_ids": eos_token_ids}
    for prompt in prompts:
        (answer,) = generate(model, None, [prompt], **options, pad_token_id=0)  # a single row has no pads
        if len(answer.token_ids) > 1:
            trials.follow(model, prompt, answer.token_ids)
    if not trials.verify_ratios:
        raise ValueError(
            f"choose_draft drafts the tokens after an answer's first, but the full model gives none to any of the "
            f"{len(prompts)} prompts; use prompts that it answers"
        )
    return choice_of(trials.each, trials.verify_ratios)


def choice_of(trials: Sequence[Trial], verify_ratios: Mapping[int, Sequence[float]]) -> DraftChoice:
    """The choice after some trials. verify_ratios: steps that forwards of the full model took, by number of tokens."""
    costs = StepCosts()
    for tokens, seen in {1: [1.0], **verify_ratios}.items():
        costs.add(tokens, median(seen))
    curve = costs.curve()
    candidates = tuple(_candidate(trial, curve) for trial in trials)
    measured = candidates, tuple(curve[1:])
    needed = max(GAIN, 1.0 / min(curve[1:]))
    paying = [each for each in candidates if plan_of(each.strategy) and each.speedup > needed]
    if not paying:
        return DraftChoice(EMPTY_PLAN, None, 1.0, *measured)
    best = max(paying, key=lambda each: each.speedup)
    return DraftChoice(best.strategy, best.gamma, best.speedup, *measured)


def _candidate(trial: Trial, curve: Sequence[float]) -> DraftCandidate:
    acceptance, cost_ratio = sum(trial.accepted) / sum(trial.judged), median(trial.cost_ratios)
    speedup, gamma = best_length([acceptance**i for i in range(1, LONGEST + 1)], cost_ratio, curve)
    return DraftCandidate(trial.given, tuple(trial.accepted), tuple(trial.judged), cost_ratio, gamma, speedup)
