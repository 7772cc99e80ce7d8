"""Lossless mode as it decodes where nothing pays."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from adaskip.core.strategy import Strategy
from adaskip.speculative.decoder import LosslessDecoder, drafting_strategies
from adaskip.speculative.drafting import NO_DRAFT, Drafting, NextDraft
from adaskip.speculative.skipped_model import SkippedModel


class _PlainSteps(Drafting):
    """Learns and decides like lossless mode, but then drafts nothing."""

    def next(self, most: int) -> NextDraft:
        super().next(most)
        return NO_DRAFT


class NeverDrafting(LosslessDecoder):
    """A decoding method that takes only plain steps."""

    @classmethod
    def with_strategy(cls, model: PreTrainedModel, strategy: Strategy) -> NeverDrafting:
        """strategy: the one that would draft."""
        return cls(model, drafting_strategies(model, [strategy]), gamma=None, streamer=None, stateless=frozenset())

    def drafting(self, skipped: Sequence[SkippedModel], input_ids: Tensor) -> Drafting:
        """The sources of a request, all of them without effect."""
        usual = super().drafting(skipped, input_ids)
        assert isinstance(usual, Drafting), "without gamma"
        return _PlainSteps(usual.sources, usual.costs)
