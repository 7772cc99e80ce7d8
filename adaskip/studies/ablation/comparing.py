"""Online learning against none: with the same offline set, and with an offline set of as many sublayers.

Differences are paired by sample, with 95 % bootstrap intervals. Learning online skips more, and whoever skips more
keeps less; so the question is whether what is learnt is better than what a larger offline budget would have added.
Between two budgets a sample's quality is interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from adaskip.common.intervals import Estimate, mean, mean_estimate
from adaskip.studies.ablation.saved import SampleResult, Subject
from adaskip.studies.ablation.settings import Variant


@dataclass(frozen=True)
class Comparison:
    """One P and beta on a group of models: their samples together."""

    subjects: Sequence[Subject]
    variant: Variant

    @property
    def samples(self) -> list[SampleResult]:
        return [sample for subject in self.subjects for sample in subject.samples[self.variant]]

    @cached_property
    def quality(self) -> Estimate:
        return _estimate([sample.quality for sample in self.samples])

    @cached_property
    def skipped(self) -> float:
        """Sublayers per decode step."""
        return mean([sample.skipped for sample in self.samples])

    @cached_property
    def added(self) -> float:
        """FFNs that joined, per request."""
        return mean([sample.added for sample in self.samples])

    @cached_property
    def fired(self) -> float:
        """Share of the requests in which any joined."""
        return mean([float(sample.added > 0) for sample in self.samples])

    @cached_property
    def over_off(self) -> Estimate:
        """Quality gained over the same offline set without online learning."""
        off = Comparison(self.subjects, Variant(self.variant.sublayers))
        return _estimate([a.quality - b.quality for a, b in zip(self.samples, off.samples, strict=True)])

    @cached_property
    def over_offline(self) -> Estimate | None:
        """Quality gained over offline sets of as many sublayers; None if more were skipped than any offline set has."""
        matched = [_offline_quality(subject, self.variant) for subject in self.subjects]
        expected = [quality for each in matched if each is not None for quality in each]
        if len(expected) < len(self.samples):
            return None
        return _estimate([sample.quality - other for sample, other in zip(self.samples, expected, strict=True)])

    @property
    def verdict(self) -> str:
        """`adds nothing`, `better`, `worse`, `within chance`, or `beyond the offline sets`."""
        if self.added == 0:
            return "adds nothing"
        gain = self.over_offline
        if gain is None:
            return "beyond the offline sets"
        if gain.low is None or gain.high is None:
            return "within chance"
        return "better" if gain.low > 0 else "worse" if gain.high < 0 else "within chance"


def comparisons(subjects: Sequence[Subject]) -> tuple[list[Comparison], list[Comparison]]:
    """(without online learning, with it) of models that share their variants."""
    shared = [v for v in subjects[0].samples if all(v in subject.samples for subject in subjects)]
    both = [Comparison(subjects, variant) for variant in shared]
    return [c for c in both if not c.variant.window], [c for c in both if c.variant.window]


def _offline_quality(subject: Subject, variant: Variant) -> list[float] | None:
    """Each sample's quality if as many sublayers as the variant skips on average had been skipped offline."""
    wanted = mean([sample.skipped for sample in subject.samples[variant]])
    budgets = sorted(v.sublayers for v in subject.samples if not v.window and v.sublayers)
    if not budgets[0] <= wanted <= budgets[-1]:
        return None
    above = next(budget for budget in budgets if budget >= wanted)
    below = max((budget for budget in budgets if budget <= wanted), default=above)
    weight = (wanted - below) / (above - below) if above > below else 0.0
    pairs = zip(subject.samples[Variant(below)], subject.samples[Variant(above)], strict=True)
    return [(1 - weight) * fewer.quality + weight * more.quality for fewer, more in pairs]


def _estimate(values: Sequence[float]) -> Estimate:
    estimate = mean_estimate(values)
    assert estimate is not None, "every variant has samples"
    return estimate
