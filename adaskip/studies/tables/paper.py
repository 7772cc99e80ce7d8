"""The paper's scores by fraction of skipped sublayers, so that models of any depth can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from adaskip.common.configs import load_yaml


@dataclass(frozen=True)
class PaperTable:
    """One phase's part of the paper's Tables 3 and 4, in per cent as printed there."""

    source: str
    metrics: dict[str, str]
    """Task -> metric of the paper, in the column order of the table."""
    has_speedup: bool
    by_fraction: dict[float, dict[str, dict[str, list[float]]]]
    """Fraction of skipped sublayers -> model -> strategy -> a number per task, then the speedup."""

    @property
    def tasks(self) -> list[str]:
        return list(self.metrics)

    def score(self, model: str, strategy: str, fraction: float, task: str) -> float | None:
        """The published score, per cent; None if the paper has none."""
        numbers = self._numbers(model, strategy, fraction)
        return numbers[self.tasks.index(task)] if numbers and task in self.metrics else None

    def retention(self, model: str, strategy: str, fraction: float, task: str) -> float | None:
        """The published score over the full model's published score."""
        score, full = self.score(model, strategy, fraction, task), self.score(model, "full", 0.0, task)
        return None if score is None or not full else score / full

    def speedup(self, model: str, strategy: str, fraction: float) -> float | None:
        numbers = self._numbers(model, strategy, fraction)
        return numbers[-1] if numbers and self.has_speedup else None

    def _numbers(self, model: str, strategy: str, fraction: float) -> list[float] | None:
        return self.by_fraction.get(fraction, {}).get(model, {}).get(strategy)


@dataclass(frozen=True)
class Paper:
    """The numbers of the paper."""

    source: str
    models: dict[str, str]
    """Our key -> the model the paper used."""
    num_sublayers: int
    """Of each of them."""
    tables: dict[str, PaperTable]
    """By phase."""


@cache
def load_paper(*, publishes: bool = True) -> Paper:
    """The paper's numbers from `configs/paper.yaml`. publishes: whether it has scores of the benchmark that was run."""
    content = load_yaml("paper")
    num_sublayers = 2 * content["num_layers"]
    if not publishes:
        tables = {phase: PaperTable("", {}, False, {}) for phase in content["scores"]}
        return Paper(content["source"], {}, num_sublayers, tables)
    tables = {phase: _table(block, num_sublayers) for phase, block in content["scores"].items()}
    return Paper(content["source"], content["models"], num_sublayers, tables)


def _table(block: dict[str, Any], num_sublayers: int) -> PaperTable:
    by_fraction = {sublayers / num_sublayers: models for sublayers, models in block["by_sublayers"].items()}
    return PaperTable(block["source"], block["metrics"], block["speedup"], by_fraction)
