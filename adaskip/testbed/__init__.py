"""Three small trained models and generated tasks, so that every experiment runs anywhere, without a GPU or the Hub.

The testbed is one more checkpoint per family and one more source of records: prompts, metrics and runner are those of
the real models. Importing this needs no torch.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from adaskip.testbed.tasks import GENERATORS, SPLITS, stream

__all__ = ["FAMILIES", "SPLITS", "TASKS", "checkpoint_dir", "records"]

FAMILIES = ("llama", "internlm", "vicuna")
TASKS = tuple(GENERATORS)
RECORDS_PER_SPLIT = 200
RECORDS_SEED = 0


def checkpoint_dir(family: str) -> Path:
    """Folder of a family's trained model, in Hugging Face's layout."""
    if family not in FAMILIES:
        raise ValueError(f"unknown testbed family {family!r}; one of {', '.join(FAMILIES)}")
    return Path(__file__).parent / "models" / family


def records(task: str, split: str = "test", limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` (default: all 200) records of a task's split, the same ones on every machine."""
    if limit is not None and not 1 <= limit <= RECORDS_PER_SPLIT:
        raise ValueError(f"limit is {limit}; a testbed split has {RECORDS_PER_SPLIT} records, allowed is 1 to that")
    samples = stream(task, split, RECORDS_SEED)
    return [sample.record() for sample in islice(samples, limit or RECORDS_PER_SPLIT)]
