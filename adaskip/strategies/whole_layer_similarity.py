"""Whole layers by similarity: MostSkip and LeastSkip, which check that similarity measures importance, and ShortGPT's
block influence, whose set is MostSkip's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from adaskip.core.look import BLUE, ORANGE, Look
from adaskip.core.plan import SkipPlan
from adaskip.core.strategy import Strategy
from adaskip.profiles.importance import ImportanceProfile


@dataclass(frozen=True, kw_only=True)
class _WholeLayerSimilarity(Strategy):
    profile: ImportanceProfile

    def _ranked(self, most_similar_first: bool) -> SkipPlan:
        self.profile.check_num_layers(self.num_layers)
        n = self.budget.num_whole_layers(self.num_layers, most=self.num_layers - 1)
        similarity = self.profile.layer.similarity
        sign = -1.0 if most_similar_first else 1.0
        order = sorted(range(self.num_layers), key=lambda layer: (sign * similarity[layer], layer))
        return SkipPlan.of_layers(order[:n])


@dataclass(frozen=True, kw_only=True)
class MostSkip(_WholeLayerSimilarity):
    """Skip the n layers whose output is most similar to their input."""

    name = "most_skip"
    short_name = "MOST"
    label = "MostSkip"
    look = Look(BLUE, "o")
    profile_type = ImportanceProfile
    whole_layers = True

    @cached_property
    def skipped(self) -> SkipPlan:
        return self._ranked(most_similar_first=True)


@dataclass(frozen=True, kw_only=True)
class BlockInfluence(MostSkip):
    """Skip the n layers of lowest block influence, 1 minus the mean similarity of output and input. No scales.

    Source: Men et al., ShortGPT, arXiv 2403.03853.
    """

    name = "block_influence"
    short_name = "BI"
    label = "Block Influence"
    look = Look("#B8860B", "<", (3, 1, 1, 1))


@dataclass(frozen=True, kw_only=True)
class LeastSkip(_WholeLayerSimilarity):
    """Skip the n layers whose output is least similar to their input."""

    name = "least_skip"
    short_name = "LEAST"
    label = "LeastSkip"
    look = Look(ORANGE, "s", (4, 1.5))
    profile_type = ImportanceProfile
    whole_layers = True

    @cached_property
    def skipped(self) -> SkipPlan:
        return self._ranked(most_similar_first=False)
