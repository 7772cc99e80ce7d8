"""What the ablation varies, and what a user may choose of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaskip.common.choices import check_choice
from adaskip.common.options import option
from adaskip.common.paths import given_or_default
from adaskip.models.stories import STORIES
from adaskip.runs.cells import MODELS
from adaskip.runs.config import SharedConfig

WINDOWS = (5, 10, 20, 40)
QUANTILES = (0.1, 0.25, 0.5)
OFFLINE = (1.0, 1.5, 2.0, 2.5, 3.0)
"""Budgets without online learning, as multiples of the least one, which is the one with it."""
STORIES_BUDGETS = (2, 3, 4, 5, 6)
"""The same for stories260K, of 10 sublayers."""


@dataclass(frozen=True)
class Variant:
    """AdaSkip in the decode phase. window: P, 0 for no online learning. quantile: beta's, None for the paper's beta."""

    sublayers: int
    window: int = 0
    quantile: float | None = None

    @property
    def label(self) -> str:
        """`4-off`, `4-P20-paper` or `4-P20-q0.5`; `0-off` is the full model."""
        learning = f"P{self.window}-{self.beta}" if self.window else "off"
        return f"{self.sublayers}-{learning}"

    @property
    def beta(self) -> str:
        return "paper" if self.quantile is None else f"q{self.quantile:g}"


def variants(budgets: Sequence[int], windows: Sequence[int], quantiles: Sequence[float]) -> list[Variant]:
    """The full model, every budget without online learning, and the least one with it under every P and beta."""
    betas = (*sorted(quantiles), None)
    online = [Variant(budgets[0], window, beta) for window in windows for beta in betas]
    return [Variant(0), *map(Variant, budgets), *online]


@dataclass(frozen=True, kw_only=True)
class AblationConfig(SharedConfig):
    """The options of `eval/online_ablation.py`."""

    models: tuple[str, ...] = option(f"of {', '.join(MODELS)}", MODELS, aliases=["--model"])
    tasks: tuple[str, ...] = option("tasks with answers longer than P", ("gov_report", "multi_news"))
    limit: int = option("samples of each task", 8)
    stories: int = option(f"stories for {STORIES}, where ADASKIP_REAL names the folder that holds it; 0 for none", 24)
    windows: tuple[int, ...] = option("values of P", WINDOWS)
    quantiles: tuple[float, ...] = option("values of beta beside the paper's, quantiles of FFN similarity", QUANTILES)
    jobs: int | None = option("runs side by side; if not given, with --testbed one per core, else one")
    output_dir: str | None = option("where everything goes; if not given, results/online, or results/testbed/online")
    draw_only: bool = option("run no model: table, verdict and figure of what is saved", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.models:
            check_choice("model", name, MODELS)
        if self.checkpoint is not None and len(self.models) != 1:
            raise ValueError("--checkpoint is one model's: give it with exactly one --model")
        if min(self.windows, default=0) < 1:
            raise ValueError(f"--windows are at least 1 token each; got {' '.join(map(str, self.windows)) or 'none'}")
        if not all(0 <= quantile <= 1 for quantile in self.quantiles):
            raise ValueError(f"--quantiles lie between 0 and 1; got {' '.join(map(str, self.quantiles))}")

    @property
    def out_dir(self) -> Path:
        return given_or_default(self.output_dir, f"{self.find_benchmark().results_dir()}/online")

    @property
    def num_jobs(self) -> int:
        return self.jobs or ((os.cpu_count() or 1) if self.find_benchmark().models else 1)

    @property
    def variants(self) -> list[Variant]:
        """Of a model that runs the tasks."""
        least = min(self.setup.budgets)
        return variants([round(least * factor) for factor in OFFLINE], self.windows, self.quantiles)

    @property
    def stories_variants(self) -> list[Variant]:
        return variants(STORIES_BUDGETS, self.windows, self.quantiles)
