"""The options of `make reproduce`, and the estimated durations of its samples."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from adaskip.common.configs import load_yaml
from adaskip.common.options import check_options, option
from adaskip.common.paths import default_path, given_or_default
from adaskip.core.plan import PHASES
from adaskip.runs.cells import MODELS
from adaskip.runs.config import GridConfig, RunConfig
from adaskip.runs.job import find_cells
from adaskip.strategies.names import GRID_STRATEGIES
from adaskip.studies.observations.settings import ObserveConfig

OUTPUT_DIR = "results/reproduced"
SAMPLE_S = {"prefill": 0.3, "decode": 0.9, "e2e": 0.9}
"""CPU seconds per sample of a cell, on one core; only their ratios matter for the time left."""
TARGET_S = {"prefill": 0.15, "decode": 0.4}
"""CPU seconds per sample of an observation."""
CHECK_S = 4.0
"""CPU seconds per sample of the importance check, over all its cells."""
DRAW_S = 30.0
"""Seconds for scoring and drawing."""


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """The options of `eval/reproduce.py`."""

    strategies: tuple[str, ...] = option(f"strategies: {', '.join(GRID_STRATEGIES)}", GRID_STRATEGIES)
    limit: int | None = option(
        "use only the first N samples of each task; default: `quick` in configs/phases.yaml", least=1
    )
    subset: int | None = option("use N random samples of each task instead (--seed), the same for every cell", least=1)
    seed: int = option("seed of --subset", 0)
    jobs: int | None = option("number of processes; default: one per core", least=1)
    output_dir: str | None = option(f"output folder; default: {OUTPUT_DIR}")
    dry_run: bool = option("print the cells and an estimate, and run nothing", False)

    def __post_init__(self) -> None:
        check_options(self)
        committed = default_path("results/testbed")
        if self.out_dir.resolve() == committed.resolve():
            raise ValueError(
                f"--output-dir {committed} contains the committed results; make reproduce FULL=1 makes them again"
            )
        self.cells()  # raises for invalid options of the grid

    @property
    def out_dir(self) -> Path:
        return given_or_default(self.output_dir, OUTPUT_DIR)

    @property
    def num_jobs(self) -> int:
        return self.jobs or os.cpu_count() or 1

    def cells(self) -> list[RunConfig]:
        """The paper's grid on the testbed, model by model, with the samples of each phase."""
        quick = load_yaml("phases")["quick"]
        cells = []
        for phase in PHASES:
            limit = None if self.subset else self.limit or quick[phase]
            grid = GridConfig(
                benchmark="testbed",
                device="cpu",
                threads=1,
                phases=(phase,),
                strategies=self.strategies,
                limit=limit,
                subset=self.subset,
                seed=self.seed,
                output_dir=str(self.out_dir / "runs"),
            )
            cells += find_cells(grid)
        return sorted(cells, key=lambda cell: MODELS.index(cell.model))

    def observe(self, model: str | None = None, *, check: bool = False) -> ObserveConfig:
        """The options of the observations on one model, or on all; check: those of the importance check."""
        quick = load_yaml("phases")["quick"]
        return ObserveConfig(
            benchmark="testbed",
            device="cpu",
            threads=1,
            models=MODELS if model is None else (model,),
            limit=self.limit or quick["importance_check" if check else "observations"],
            output_dir=str(self.out_dir / "observations"),
        )
