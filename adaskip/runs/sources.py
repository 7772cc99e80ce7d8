"""Where a run's model and samples come from: the embedded testbed, or a real checkpoint and LongBench."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig

from adaskip import testbed
from adaskip.longbench import TaskSpec, as_dataset, build_prompt_ids, load_records
from adaskip.longbench_data import MissingDataError
from adaskip.models import LoadedModel, architecture, load_model, registry, weight_files
from adaskip.runs.config import SharedConfig

Sample = dict[str, Any]


def load(config: SharedConfig, model: str) -> LoadedModel:
    """The model of a configuration; the last one stays loaded, so that cells of one model share it."""
    return _load(
        model,
        checkpoint_of(config, model),
        device=config.device,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        device_map=config.device_map,
        chat=chat_of(config, model),
    )


_load = lru_cache(maxsize=1)(load_model)


def checkpoint_of(config: SharedConfig, model: str) -> str | None:
    """Folder or Hub id of a configuration's model; None for the one that `configs/models.yaml` pins."""
    return config.checkpoint or (str(testbed.checkpoint_dir(model)) if config.testbed else None)


def chat_of(config: SharedConfig, model: str) -> str:
    """How prompts are wrapped; the testbed's models were trained on bare ones."""
    return config.chat or ("none" if config.testbed else registry()[model].chat)


def model_config(config: SharedConfig, model: str) -> PreTrainedConfig:
    """The architecture of a configuration's model, which is not loaded."""
    return _architecture(model, checkpoint_of(config, model))


_architecture = lru_cache(maxsize=8)(architecture)


def num_layers(config: SharedConfig, model: str) -> int:
    """Decoder layers of a configuration's model, which is not loaded."""
    return model_config(config, model).get_text_config().num_hidden_layers


def weight_files_of(config: SharedConfig, model: str) -> str | None:
    """Fingerprint of the model's weight files; None where they are not on this machine."""
    return weight_files(model, checkpoint_of(config, model))


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
    except MissingDataError as error:
        hint = "--data-dir takes any of these, --testbed the embedded models and tasks"
        raise MissingDataError(f"{error}; {hint}") from None


def prompt_ids(samples: Sequence[Sample], task: TaskSpec, loaded: LoadedModel) -> list[Tensor]:
    """The samples' prompts as the model is given them, 1-D token ids."""
    spec = loaded.spec
    tokenizer: Any = loaded.tokenizer
    return [
        torch.tensor(build_prompt_ids(sample, task, tokenizer, spec.max_prompt_tokens, spec.chat_template))
        for sample in samples
    ]


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over the samples' JSON, one line each with sorted keys."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(sample, sort_keys=True, ensure_ascii=False).encode("utf-8") + b"\n")
    return digest.hexdigest()
