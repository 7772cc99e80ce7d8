"""How sublayers and tasks are written in tables and figures."""

from __future__ import annotations

from adaskip.studies.tables import labels

KINDS = {"attention": "Attention", "ffn": "FFN"}
_TASKS = {**labels.TASKS, "qasper": "Qasper", "2wikimqa": "2WikiMQA"}
METRICS = {"qa_f1": "F1", "classification": "accuracy", "rouge": "Rouge-L"}
"""By our metric's name."""


def task_label(task: str) -> str:
    """A dataset's own spelling; LongBench's key where the paper does not speak of it."""
    return _TASKS.get(task, task)
