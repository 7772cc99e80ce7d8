"""Where a run's model and samples come from: the embedded testbed, or a real checkpoint and LongBench."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from datasets import Dataset

from adaskip import testbed
from adaskip.blocks import decoder_layers
from adaskip.longbench import LongBenchError, as_dataset, load_records
from adaskip.models import LoadedModel, load_model
from adaskip.runs.config import SharedConfig

Sample = dict[str, Any]


def load(config: SharedConfig, model: str) -> LoadedModel:
    """The model of a configuration; the last one stays loaded, so that cells of one model share it."""
    checkpoint, chat = config.checkpoint, config.chat
    if config.testbed:  # its models were trained on bare prompts
        checkpoint, chat = checkpoint or str(testbed.checkpoint_dir(model)), chat or "none"
    return _load(
        model,
        checkpoint,
        device=config.device,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        device_map=config.device_map,
        chat=chat,
    )


_load = lru_cache(maxsize=1)(load_model)


def num_layers(config: SharedConfig, model: str) -> int:
    """Decoder layers of the model of a configuration."""
    return len(decoder_layers(load(config, model).model))


def scored_samples(
    config: SharedConfig, task: str, limit: int | None = None, subset: int | None = None
) -> tuple[Sample, ...]:
    """The samples a run is scored on, in LongBench's record format.

    Args:
        limit: only the first so many.
        subset: only so many drawn by `config.seed`, or all where there are fewer. The draw depends on nothing but the
            task's records and the seed, and a larger subset begins with the smaller one.
    """
    samples = _samples(task, config.testbed, "test", config.data_dir, None if subset else limit)
    if subset:
        samples = samples.shuffle(seed=config.seed).take(min(subset, len(samples)))
    return tuple(samples.to_list())


def calibration_samples(config: SharedConfig, limit: int) -> tuple[Sample, ...]:
    """The first `limit` samples of the setup's calibration task."""
    return tuple(
        _samples(config.setup.calibration_task, config.testbed, "calibration", config.data_dir, limit).to_list()
    )


@lru_cache(maxsize=16)
def _samples(task: str, is_testbed: bool, split: str, data_dir: str | None, limit: int | None) -> Dataset:
    if is_testbed:
        return as_dataset(testbed.records(task, split=split, limit=limit))
    try:
        return load_records(task, data_dir, limit=limit)
    except LongBenchError as error:
        if data_dir is not None:
            raise
        hint = "--data-dir takes any of these, --testbed the embedded models and tasks"
        raise LongBenchError(f"{error}; {hint}") from None


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over the samples' JSON, one line each with sorted keys."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(sample, sort_keys=True, ensure_ascii=False).encode("utf-8") + b"\n")
    return digest.hexdigest()
