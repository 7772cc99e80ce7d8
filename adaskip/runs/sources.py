"""Where a run's model and samples come from: the embedded testbed, or a real checkpoint and LongBench."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from adaskip import testbed
from adaskip.blocks import decoder_layers
from adaskip.longbench import LongBenchError, load_records
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


def scored_samples(config: SharedConfig, task: str, limit: int | None) -> tuple[Sample, ...]:
    """The first `limit` samples a run is scored on, in LongBench's record format."""
    return _samples(task, config.testbed, "test", config.data_dir, limit)


def calibration_samples(config: SharedConfig, limit: int) -> tuple[Sample, ...]:
    """The first `limit` samples of the setup's calibration task."""
    return _samples(config.setup.calibration_task, config.testbed, "calibration", config.data_dir, limit)


@lru_cache(maxsize=16)
def _samples(task: str, is_testbed: bool, split: str, data_dir: str | None, limit: int | None) -> tuple[Sample, ...]:
    if is_testbed:
        return tuple(testbed.records(task, split=split, limit=limit))
    try:
        return tuple(load_records(task, data_dir, limit=limit))
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
