"""Warns where phase decode skips nothing, since only prompts are read, as by a benchmark of log-likelihoods."""

from __future__ import annotations

import logging

from adaskip.core.step import Step
from adaskip.core.strategy import Strategy

logger = logging.getLogger(__name__)

PROMPTS_WITHOUT_ANSWER = 8
"""After this many prompts without a decoded token, the warning comes."""


class PromptsOnly:
    """Counts the prompts and the decode steps of one context."""

    def __init__(self, strategy: Strategy):
        self.answers_only = strategy.phase == "decode" and len(strategy.skipped) > 0
        self.num_prompts = self.num_decode_steps = 0

    def count(self, step: Step) -> None:
        """Count a step that has run."""
        self.num_decode_steps += step.kind == "decode"
        self.num_prompts += step.request.num_forwards == 1
        if self.num_prompts == PROMPTS_WITHOUT_ANSWER:
            self.warn()

    def warn(self) -> None:
        """Warn if prompts were read, no token was decoded, and the strategy skips only in answers."""
        if self.answers_only and self.num_prompts and not self.num_decode_steps:
            self.num_decode_steps = 1  # so that the warning comes once
            logger.warning(
                "phase decode skips nothing while a prompt is read, and no token was decoded after the %d prompts so "
                "far: scores of prompts (log-likelihoods) are the full model's; use phase prefill or e2e for them",
                self.num_prompts,
            )
