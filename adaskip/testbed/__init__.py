"""Three small trained models and generated tasks, with which every experiment runs without a GPU or the Hub.

The testbed provides one checkpoint per family and its own records; prompts, metrics and the runner are those of real
models. Importing this module does not import torch.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from adaskip.common.paths import PACKAGE, checkout
from adaskip.testbed.tasks import GENERATORS, SPLITS, stream

__all__ = ["FAMILIES", "SPLITS", "TASKS", "TestbedError", "checkpoint_dir", "records"]

FAMILIES = ("llama", "internlm", "vicuna")
TASKS = tuple(GENERATORS)
MODELS = "adaskip/testbed/models"
"""Folder of the trained models in a checkout."""
RECORDS_PER_SPLIT = 200
RECORDS_SEED = 0


class TestbedError(ValueError):
    """The testbed's models are not on this machine."""


def checkpoint_dir(family: str) -> Path:
    """Folder of a family's trained model, in the Hugging Face layout.

    It is in the checkout of this package, else in that of the script that was started.

    Raises:
        ValueError: unknown family.
        TestbedError: there is no checkout: the models are not in a wheel.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown testbed family {family!r}; one of {', '.join(FAMILIES)}")
    for root in (PACKAGE.parent, checkout()):
        if root is not None and (root / MODELS).is_dir():
            return root / MODELS / family
    raise TestbedError(
        f"the testbed's models are not part of an installed package: they are in {MODELS} of a source checkout of "
        "adaskip; install and run adaskip there (docs/install.md), or leave out --testbed"
    )


def records(task: str, split: str = "test", limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` (default: all 200) records of a split of a task; the same on every machine."""
    if limit is not None and not 1 <= limit <= RECORDS_PER_SPLIT:
        raise ValueError(f"limit is {limit}; allowed: 1 to {RECORDS_PER_SPLIT}, the number of records of a split")
    samples = stream(task, split, RECORDS_SEED)
    return [sample.record() for sample in islice(samples, limit or RECORDS_PER_SPLIT)]
