"""The calibration data of a model's profiles, and the folder where profiles are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from adaskip.models.loading import LoadedModel
from adaskip.runs.config import DataConfig, SharedConfig
from adaskip.runs.records import Records, Sample, find_records, prompt_ids


@dataclass(frozen=True)
class Calibration:
    """Samples for calibration; they are read once, at first use.

    task: the task for measuring importance. tasks: the tasks for searching a selection, with `num_searched` samples
    that no run is scored on, prompts cut to `search_prompt_tokens` (None: to the model's limit). folder: where profiles
    are kept; None to keep none.
    """

    records: Records
    task: str
    tasks: tuple[str, ...]
    num_samples: int
    num_searched: int
    search_prompt_tokens: int | None = None
    folder: Path | None = None

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """The samples for measuring importance."""
        return self.records.calibration(self.task, self.num_samples)

    @cached_property
    def searched(self) -> list[tuple[str, Sample]]:
        """The samples for searching a selection, as (task, sample)."""
        return self.records.unscored(self.tasks, self.num_searched)

    def data(self, loaded: LoadedModel) -> Mapping[str, Any]:
        """Keyword arguments for `calibrate`: the samples as prompts, and their description."""
        benchmark = self.records.benchmark
        return {
            "prompts": prompt_ids(benchmark, self.task, self.samples, loaded),
            "model_name": loaded.spec.name,
            "dataset": benchmark.task(self.task).name,
            "data_ids": [sample["_id"] for sample in self.samples],
        }

    def prompts(self, samples: Sequence[tuple[str, Sample]], loaded: LoadedModel) -> list[Tensor]:
        """The prompts of (task, sample) pairs as 1-D token ids, truncated as in the search of a selection."""
        benchmark, most = self.records.benchmark, self.search_prompt_tokens
        return [prompt_ids(benchmark, task, [sample], loaded, most)[0] for task, sample in samples]


def find_calibration(
    config: SharedConfig,
    records: Records | None = None,
    tasks: Sequence[str] = (),
    num_samples: int | None = None,
) -> Calibration:
    """The calibration data of a configuration; profiles are kept beside its runs if it has runs."""
    setup = config.setup
    return Calibration(
        records or find_records(config),
        task=setup.calibration_task,
        tasks=tuple(tasks),
        num_samples=num_samples or setup.calibration_samples,
        num_searched=num_samples or setup.search_samples,
        search_prompt_tokens=setup.search_prompt_tokens,
        folder=config.runs_dir.parent / "profiles" if isinstance(config, DataConfig) else None,
    )
