"""The testbed as a benchmark: generated records, and prompts and scores of the tasks that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from adaskip import testbed
from adaskip.benchmarks.longbench import LongBenchTasks
from adaskip.benchmarks.longbench_tasks import TASKS
from adaskip.benchmarks.protocol import Record, register_benchmark


@register_benchmark
@dataclass(frozen=True, kw_only=True)
class Testbed(LongBenchTasks):
    """The generated tasks of the embedded models."""

    __test__ = False  # no class of tests
    name = "testbed"
    tasks = tuple(TASKS[name] for name in testbed.TASKS)
    models = testbed.FAMILIES

    def records(self, task: str, limit: int | None = None) -> Sequence[Record]:
        return testbed.records(task, limit=limit)

    def unscored_records(self, task: str) -> Sequence[Record]:
        return testbed.records(task, split="calibration")

    def calibration_records(self, task: str, limit: int) -> Sequence[Record]:
        return testbed.records(task, split="calibration", limit=limit)

    def contexts(self, task: str, manifest: Mapping[str, Any]) -> Mapping[str, str]:
        return _contexts(task)

    @classmethod
    def checkpoint(cls, model: str) -> Path:
        return testbed.checkpoint_dir(model)


@cache
def _contexts(task: str) -> Mapping[str, str]:
    return {record["_id"]: record["context"] for record in testbed.records(task)}
