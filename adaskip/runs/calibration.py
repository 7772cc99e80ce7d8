"""What the profiles of a model are made on, and where they are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adaskip.benchmarks.protocol import Benchmark
from adaskip.models.loading import LoadedModel
from adaskip.runs.config import DataConfig, SharedConfig
from adaskip.runs.records import Sample, calibration_samples, prompt_ids, searched_samples


@dataclass(frozen=True)
class Calibration:
    """Samples to calibrate on; they are read once, when first asked for.

    task: what importance is measured on. tasks: what a selection is searched on, samples that no run is scored on.
    num_samples: of either. folder: where profiles are kept, None where they are not.
    """

    benchmark: Benchmark
    task: str
    tasks: tuple[str, ...]
    num_samples: int
    folder: Path | None = None

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """What importance is measured on."""
        return calibration_samples(self.benchmark, self.task, self.num_samples)

    @cached_property
    def searched(self) -> list[tuple[str, Sample]]:
        """(task, sample): what a selection is searched on."""
        return searched_samples(self.benchmark, self.tasks, self.num_samples)

    def data(self, loaded: LoadedModel) -> Mapping[str, Any]:
        """The samples as prompts, and what they are, by the names that `calibrate` takes."""
        return {
            "prompts": prompt_ids(self.benchmark, self.task, self.samples, loaded),
            "model_name": loaded.spec.name,
            "dataset": self.benchmark.task(self.task).name,
            "data_ids": [sample["_id"] for sample in self.samples],
        }


def find_calibration(config: SharedConfig, tasks: Sequence[str] = (), num_samples: int | None = None) -> Calibration:
    """What a configuration calibrates on; its profiles are kept beside its runs if it has any."""
    return Calibration(
        config.find_benchmark(),
        task=config.setup.calibration_task,
        tasks=tuple(tasks),
        num_samples=num_samples or config.setup.calibration_samples,
        folder=config.runs_dir.parent / "profiles" if isinstance(config, DataConfig) else None,
    )
