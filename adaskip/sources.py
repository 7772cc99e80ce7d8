"""Where a run's model and samples come from: the embedded testbed, or a real checkpoint and LongBench."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from adaskip import testbed
from adaskip.longbench import HUB, load_records
from adaskip.models import LoadedModel, load_model
from adaskip.run_config import SharedConfig

Sample = dict[str, Any]


def load(config: SharedConfig, model: str) -> LoadedModel:
    """The model of a configuration; the last one stays loaded, so that cells of one model share it."""
    checkpoint = config.checkpoint
    if checkpoint is None and config.testbed:
        checkpoint = str(testbed.checkpoint_dir(model))
    where = (config.device, config.dtype, config.attn_implementation, config.device_map)
    return _load(model, checkpoint, config.testbed, *where)


@lru_cache(maxsize=1)
def _load(
    model: str,
    checkpoint: str | None,
    is_testbed: bool,
    device: str | None,
    dtype: str | None,
    attn_implementation: str,
    device_map: str | None,
) -> LoadedModel:
    loaded = load_model(
        model,
        checkpoint=checkpoint,
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        device_map=device_map,
    )
    if not is_testbed:
        return loaded
    # The testbed's models are no chat models, and their tokenizer's own end of text is their only stop.
    return replace(loaded, spec=replace(loaded.spec, chat_template=None, stop_token_ids=(), stop_strings=()))


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
    return tuple(load_records(task, data_dir or HUB, limit=limit))


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over the samples' JSON, one line each with sorted keys."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(sample, sort_keys=True, ensure_ascii=False).encode("utf-8") + b"\n")
    return digest.hexdigest()
