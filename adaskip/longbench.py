"""LongBench's protocol: which tasks there are, how a record becomes a prompt, and how a long prompt is cut.

The protocol's data (templates, caps, metrics) is `configs/longbench.yaml`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from adaskip.configs import load_yaml

EXTENDED_SUFFIX = "_e"


class LongBenchError(ValueError):
    """A task, a record or a data source is not what LongBench's protocol asks for."""


@dataclass(frozen=True)
class TaskSpec:
    """One LongBench task; the fields left out in the YAML have the defaults here."""

    name: str
    template: str
    """Prompt with `{context}` and, for most tasks, `{input}`."""
    max_new_tokens: int
    """LongBench's cap on generated tokens (the paper caps its prefill tasks at 32)."""
    metric: str
    """Key of a metric in `adaskip.metrics.METRICS`."""
    language: str
    has_extended: bool = False
    """Whether LongBench-E has an `_e` set of this task."""
    first_line_only: bool = False
    """Only the prediction's first line is scored."""
    chat: bool = True
    """Whether a chat model's template wraps the prompt."""
    min_new_tokens: int = 0
    stop_at_newline: bool = False
    """Generation also ends at a newline token."""


def _read_tasks() -> dict[str, TaskSpec]:
    return {name: TaskSpec(name=name, **fields) for name, fields in load_yaml("longbench")["tasks"].items()}


TASKS: dict[str, TaskSpec] = _read_tasks()
EXTENDED_TASKS: tuple[str, ...] = tuple(name for name, task in TASKS.items() if task.has_extended)


def get_task(name: str) -> TaskSpec:
    """The task called `name`; `trec` and its LongBench-E set `trec_e` share one spec.

    Raises:
        LongBenchError: no such task; the line suggests the nearest names and lists all.
    """
    base = name.removesuffix(EXTENDED_SUFFIX)
    if name in TASKS or (base in EXTENDED_TASKS):
        return TASKS[name if name in TASKS else base]
    if base in TASKS:
        raise LongBenchError(f"LongBench-E has no set of {base!r}; it has: {', '.join(EXTENDED_TASKS)}")
    close = difflib.get_close_matches(name.lower(), TASKS, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise LongBenchError(f"unknown LongBench task {name!r}.{hint} Tasks: {', '.join(TASKS)}")
