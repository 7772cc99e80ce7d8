"""LongBench's tasks as data: prompts, caps and metrics, read from `configs/longbench.yaml`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from adaskip.benchmarks.longbench_files import LongBenchError
from adaskip.benchmarks.protocol import BenchmarkError, Task
from adaskip.common.configs import ConfigError, load_yaml

EXTENDED_SUFFIX = "_e"


@dataclass(frozen=True, kw_only=True)
class TaskSpec(Task):
    """One LongBench task; the fields left out in the YAML have the defaults here."""

    has_extended: bool = False
    """Whether LongBench-E has an `_e` set of this task."""
    first_line_only: bool = False
    """Only the prediction's first line is scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{context}" not in self.template:
            raise BenchmarkError(f"task {self.name}: the template has no {{context}}")


def _read_tasks() -> dict[str, TaskSpec]:
    try:
        return {name: TaskSpec(name=name, **fields) for name, fields in load_yaml("longbench")["tasks"].items()}
    except (KeyError, TypeError, AttributeError, BenchmarkError) as error:
        raise ConfigError(f"configs/longbench.yaml does not describe tasks: {error}") from None


TASKS: dict[str, TaskSpec] = _read_tasks()
EXTENDED_TASKS: tuple[str, ...] = tuple(name for name, task in TASKS.items() if task.has_extended)


def get_task(name: str) -> TaskSpec:
    """The task called `name`; `trec` and its LongBench-E set `trec_e` share one spec.

    Raises:
        LongBenchError: no such task; the line suggests the nearest names and lists all.
    """
    if name in TASKS:
        return TASKS[name]
    base = name.removesuffix(EXTENDED_SUFFIX)
    if base in EXTENDED_TASKS:
        return TASKS[base]
    if base in TASKS:
        raise LongBenchError(f"LongBench-E has no set of {base!r}; it has: {', '.join(EXTENDED_TASKS)}")
    close = difflib.get_close_matches(base.lower(), TASKS, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise LongBenchError(f"unknown LongBench task {name!r}.{hint} Tasks: {', '.join(TASKS)}")


def set_meant(task: str, extended: bool | None = None) -> str:
    """The set of a task name: `trec_e` for `trec_e` and, unless `extended` is False, for `trec`.

    Raises:
        LongBenchError: no such task.
    """
    spec = get_task(task)
    takes_extended = task not in TASKS or (spec.has_extended and extended is not False)
    return spec.name + EXTENDED_SUFFIX * takes_extended
