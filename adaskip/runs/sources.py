"""Where a run's model, samples and given profile come from: the testbed, or a real checkpoint and LongBench."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from adaskip import testbed
from adaskip.benchmarks.longbench import (
    PAPER_MIN_LENGTH,
    TaskSpec,
    as_dataset,
    build_prompt_ids,
    find_set,
    load_records,
    set_meant,
)
from adaskip.benchmarks.longbench_files import HUB, LongBenchError, MissingDataError, list_sets
from adaskip.models.loading import (
    LoadedModel,
    architecture,
    check_checkpoint,
    load_model,
    prompt_limit,
    registry,
    weight_files,
)
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from adaskip.runs.config import RunConfig, SharedConfig
from adaskip.strategies import profile_type

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Sample = dict[str, Any]
_held: dict[tuple[Any, ...], LoadedModel] = {}
"""The last model, by all that it was loaded with."""


def load(config: SharedConfig, model: str) -> LoadedModel:
    """The model of a configuration; the last one stays loaded, so that cells of one model share it.

    Another one is let go of first: two of them may not fit into memory.
    """
    options: dict[str, Any] = {
        "checkpoint": checkpoint_of(config, model),
        "device": config.device,
        "dtype": config.dtype,
        "attn_implementation": config.attn_implementation,
        "device_map": config.device_map,
        "chat": chat_of(config, model),
        # The testbed's prompts were made for its models, so that a limit below the registry's is nothing to warn of.
        "max_prompt_tokens": max_prompt_tokens(config, model) if config.testbed else None,
    }
    key = (model, *options.values())
    if key not in _held:
        _release()
        _held[key] = load_model(model, **options)
    return _held[key]


def _release() -> None:
    _held.clear()
    gc.collect()  # a model holds itself in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_weights(config: SharedConfig, model: str) -> None:
    """ModelError if the weights of a configuration's model are missing or damaged; they are not loaded."""
    check_checkpoint(model, checkpoint_of(config, model))


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


def max_prompt_tokens(config: SharedConfig, model: str) -> int:
    """Longest prompt before wrapping of a configuration's model, which is not loaded."""
    return prompt_limit(model_config(config, model), model)


def weight_files_of(config: SharedConfig, model: str) -> str | None:
    """Fingerprint of the model's weight files; None where they are not on this machine."""
    return weight_files(model, checkpoint_of(config, model))


def scored_samples(
    config: SharedConfig,
    task: str,
    limit: int | None = None,
    subset: int | None = None,
    min_length: int | None = PAPER_MIN_LENGTH,
    extended: bool | None = None,
) -> tuple[Sample, ...]:
    """The samples a run is scored on, in LongBench's record format.

    Args:
        limit: only the first so many.
        subset: only so many drawn by `config.seed`, or all where there are fewer. The draw depends on nothing but the
            task's records and the seed, and a larger subset begins with the smaller one.
        min_length, extended: which of LongBench's records (see `longbench.load_records`); the testbed has its own.
    """
    first = None if subset else limit
    samples = _samples(task, config.testbed, "test", config.data_dir, first, min_length, extended)
    if subset:
        samples = samples.shuffle(seed=config.seed).take(min(subset, len(samples)))
    return tuple(samples.to_list())


def calibration_samples(config: SharedConfig, limit: int) -> tuple[Sample, ...]:
    """The first `limit` samples of the setup's calibration task, filtered as in the paper.

    They are of the kind of set that `config` takes for its tasks, plain or LongBench-E's, or, where the data has none
    of that, of the other kind. Warns, once in a process, of that and of fewer samples.

    Raises:
        LongBenchError: the data has neither set, or no such samples in it.
    """
    task, extended = config.setup.calibration_task, config.extended
    if extended is not None and not config.testbed:
        extended = _kind_at_hand(task, config.data_dir, extended)
    try:
        samples = _samples(task, config.testbed, "calibration", config.data_dir, limit, PAPER_MIN_LENGTH, extended)
    except MissingDataError:
        raise
    except LongBenchError as error:
        raise LongBenchError(f"to calibrate on {task}: {error}; --profile takes a profile made elsewhere") from None
    if len(samples) < limit:
        _warn_of_few(task, len(samples), limit)
    return tuple(samples.to_list())


@lru_cache
def _kind_at_hand(task: str, data_dir: str | None, extended: bool) -> bool:
    """`extended` if the data has such a set of `task`, or has none at all; else the other kind."""
    with _said_where_to_get_data():
        sets = list_sets(data_dir)
    wanted, other = set_meant(task, extended), set_meant(task, not extended)
    if wanted in sets or other not in sets:
        return extended
    logger.warning("calibration on %s: %s has no %s", other, data_dir or HUB, wanted)
    return not extended


@lru_cache
def _warn_of_few(task: str, found: int, asked: int) -> None:
    logger.warning(
        "calibration on %d samples of %s instead of %d: the data has no more of over %d words",
        *(found, task, asked, PAPER_MIN_LENGTH),
    )


def set_name(config: SharedConfig, task: str, extended: bool | None = None) -> str | None:
    """The set of LongBench that a task's samples are of, `trec` or `trec_e`; None on the testbed."""
    return None if config.testbed else _set_name(task, config.data_dir, extended)


@lru_cache
def _set_name(task: str, data_dir: str | None, extended: bool | None) -> str:
    with _said_where_to_get_data():
        return find_set(task, data_dir, extended).set_name


def unscored_samples(
    config: SharedConfig, tasks: Sequence[str], limit: int, *, max_length: int, extended: bool | None = None
) -> list[tuple[str, Sample]]:
    """(task, sample) of `limit` samples that no run is scored on, the tasks in turns: in LongBench those of at most
    `max_length` words, the first in file order; in the testbed the calibration split.

    Raises:
        ValueError: there are fewer.
    """
    each = -(-limit // len(tasks))
    columns = []
    for task in tasks:
        found = _unscored(task, config.testbed, config.data_dir, max_length, extended)[:each]
        if len(found) < each:
            raise ValueError(
                f"strategy calibrated searches on {each} samples of {task} that no run is scored on, of at most "
                f"{max_length} words, and there are {len(found)}; --profile takes a selection made elsewhere"
            )
        columns.append([(task, sample) for sample in found])
    return [pair for row in zip(*columns, strict=True) for pair in row][:limit]


@lru_cache(maxsize=16)
def _unscored(
    task: str, is_testbed: bool, data_dir: str | None, max_length: int, extended: bool | None
) -> tuple[Sample, ...]:
    if is_testbed:
        return tuple(testbed.records(task, split="calibration"))
    records = load_records(task, data_dir, min_length=None, extended=extended)
    return tuple(record for record in records.to_list() if record["length"] <= max_length)


@lru_cache(maxsize=16)
def _samples(
    task: str,
    is_testbed: bool,
    split: str,
    data_dir: str | None,
    limit: int | None,
    min_length: int | None,
    extended: bool | None,
) -> Dataset:
    if is_testbed:
        return as_dataset(testbed.records(task, split=split, limit=limit))
    with _said_where_to_get_data():
        return load_records(task, data_dir, min_length, limit, extended)


@contextmanager
def _said_where_to_get_data() -> Iterator[None]:
    try:
        yield
    except MissingDataError as error:
        hint = "--data-dir takes any of these, --testbed the embedded models and tasks"
        raise MissingDataError(f"{error}; {hint}") from None


def given_profile(config: RunConfig) -> ImportanceProfile | SelectionProfile | None:
    """What `--profile` names, for whatever model it was made; None where it names nothing that the strategy uses.

    Raises:
        ValueError: there is no such file, or it is no profile of the strategy's kind.
    """
    if config.profile is None or (kind := profile_type(config.strategy)) is None:
        return None
    if not Path(config.profile).is_file():
        raise ValueError(f"--profile {config.profile} does not exist; `adaskip calibrate` makes one")
    return kind.load(config.profile)


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
