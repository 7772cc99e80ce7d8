"""Tries drafts along a known answer of the full model: how many tokens are right, and what each forward costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from adaskip.core.blocks import execution_device
from adaskip.core.context import patches_for
from adaskip.core.decoding import plain_generate
from adaskip.core.plan import SkipPlan
from adaskip.core.strategy import Strategy
from adaskip.speculative.checks import check_request
from adaskip.speculative.forwards import ForwardRunner
from adaskip.speculative.step_costs import MOST

LONGEST = MOST - 1
"""Tokens of the longest draft."""


class Trial:
    """What was seen of the drafts of one strategy.

    given: as the user gave it, a strategy or plan. accepted, judged: tokens by their place in a draft. cost_ratios: of
    each draft, time of a token / time of a step of the full model at the same place of the answer.
    """

    def __init__(self, given: Strategy | SkipPlan, strategy: Strategy):
        self.given, self.strategy, self.plan = given, strategy, strategy.decode_plan(1)
        self.accepted, self.judged = [0] * LONGEST, [0] * LONGEST
        self.cost_ratios: list[float] = []

    def draft(self, forwards: ForwardRunner, ids: Tensor, known: int) -> tuple[int, float]:
        """Draft until a token is wrong: (number of tokens, seconds of each).

        ids: prompt and answer, [1, S]. known: how many of these tokens come before the draft.
        """
        start_s, drafted = forwards.clock(), 0
        for place, token in enumerate(ids[0, known : known + LONGEST].tolist()):
            right = int(forwards.draft(ids[:, : known + place], self.plan).argmax()) == token
            self.judged[place] += 1
            self.accepted[place] += right
            drafted += 1
            if not right:
                break
        forwards.forget_draft(self.plan, drafted)
        return drafted, (forwards.clock() - start_s) / drafted


class Trials:
    """The trials of several strategies on the same answers, and the forwards of the full model beside them.

    verify_ratios: by number of tokens, times of a forward / times of a step at the same place of the answer.
    """

    def __init__(self, each: Sequence[Trial]):
        self.each = each
        self.verify_ratios: dict[int, list[float]] = {}

    def follow(self, model: PreTrainedModel, prompt: Tensor, answer: Sequence[int]) -> None:
        """Try every strategy along an answer of at least two tokens. prompt: token ids, 1-D."""
        prompt = prompt.to(execution_device(model))[None]
        arguments: dict[str, Any] = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        along = _Along(self, torch.cat([prompt, prompt.new_tensor([answer])], dim=-1))
        plain_generate(model, **arguments, max_new_tokens=len(answer), custom_generate=along)

    def run(self, forwards: ForwardRunner, ids: Tensor) -> None:
        """Go along prompt and answer, `ids` [1, S], from the answer's first token on, which the prefill gives."""
        forwards.prefill(ids[:, : forwards.prompt_length])
        begins = [forwards.prompt_length + 1] * len(self.each)
        for known in range(forwards.prompt_length + 1, ids.shape[1]):
            drafts: list[tuple[Trial, float]] = []
            for i, trial in enumerate(self.each):
                if begins[i] == known:
                    drafted, token_s = trial.draft(forwards, ids, known)
                    begins[i] += drafted
                    drafts.append((trial, token_s))
            tokens = min(2 + known % LONGEST, ids.shape[1] - known + 1)
            verify_s = _verify_s(forwards, ids[:, : known + tokens - 1], tokens, kept=0)
            step_s = _verify_s(forwards, ids[:, :known], 1, kept=1)
            self.verify_ratios.setdefault(tokens, []).append(verify_s / step_s)
            for trial, token_s in drafts:
                trial.cost_ratios.append(token_s / step_s)


def _verify_s(forwards: ForwardRunner, ids: Tensor, tokens: int, *, kept: int) -> float:
    """Seconds of a forward of the full model over the last tokens of `ids` [1, S]; `kept` of them stay in the cache."""
    start_s = forwards.clock()
    forwards.verify(ids, tokens).argmax(dim=-1).tolist()
    forwards.forget_rejected(tokens - kept)
    return forwards.clock() - start_s


class _Along:
    """A decoding method for `generate` that follows the answer in `ids` [1, S] instead of making one."""

    def __init__(self, trials: Trials, ids: Tensor):
        self.trials, self.ids = trials, ids

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        check_request(model, input_ids, generation_config, model_kwargs)
        with patches_for(model, self.trials.each[0].strategy).install() as patches:
            forwards = ForwardRunner(model, patches, input_ids, generation_config, model_kwargs)
            try:
                self.trials.run(forwards, self.ids)
            finally:
                forwards.stop_recording()
        return input_ids
