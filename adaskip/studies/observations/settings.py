"""The options of the observation scripts; their defaults are in `configs/observations.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adaskip.common.choices import check_choice
from adaskip.common.configs import load_yaml
from adaskip.common.options import option
from adaskip.models.source import find_source, name_of
from adaskip.studies.study import StudyConfig
from adaskip.studies.tables import labels

KINDS = {"attention": "Attention", "ffn": "FFN"}
TASKS = {**labels.TASKS, "qasper": "Qasper", "2wikimqa": "2WikiMQA"}


@dataclass(frozen=True)
class Target:
    """What is measured: the prompts of a task (prefill), or the answers to them (decode)."""

    task: str
    phase: Literal["prefill", "decode"]

    @property
    def folder_name(self) -> str:
        return f"{self.task}-{self.phase}"

    @property
    def label(self) -> str:
        """The spelling of the dataset, or the name of a task that the paper does not use."""
        return TASKS.get(self.task, self.task)


@dataclass(frozen=True, kw_only=True)
class ObserveConfig(StudyConfig):
    """The options of every script in `observations/`."""

    folder = "observations"

    limit: int | None = option("number of samples of each task (default: configs/observations.yaml)", least=1)
    batch_size: int | None = option("samples per batch (default: configs/observations.yaml)", least=1)
    max_new_tokens: int | None = option(
        "maximum number of new tokens per answer (default: the cap of task and phase)", least=1
    )

    @property
    def defaults(self) -> dict[str, Any]:
        """The benchmark's block of `configs/observations.yaml` with `windows`; ValueError if it has none."""
        content = load_yaml("observations")
        windows = content.pop("windows")
        name = check_choice("benchmark of the observations", str(self.benchmark), content)
        return {"windows": windows, **content[name]}

    @property
    def num_samples(self) -> int:
        """Samples of each measured task."""
        return self.limit or self.defaults["limit"]

    @property
    def out_dir(self) -> Path:
        """With `--checkpoint`, a folder of the checkpoint's name in the default folder."""
        if self.checkpoint is None or self.output_dir is not None:
            return super().out_dir
        return super().out_dir / name_of(self.checkpoint)

    def label(self, model: str) -> str:
        """The name of a model in folders, tables and figures."""
        return find_source(model).name if self.checkpoint is None else name_of(self.checkpoint)
