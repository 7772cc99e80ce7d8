"""Where samples come from, in LongBench's record format: LongBench, or the testbed's generated tasks."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from adaskip import testbed
from adaskip.benchmarks.longbench import (
    PAPER_MIN_LENGTH,
    TaskSpec,
    as_dataset,
    build_prompt_ids,
    build_reference_ids,
    find_set,
    load_records,
    set_meant,
)
from adaskip.benchmarks.longbench_files import HUB, LongBenchError, MissingDataError, list_sets
from adaskip.models.loading import LoadedModel
from adaskip.runs.config import DataConfig, SharedConfig

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Sample = dict[str, Any]


@dataclass(frozen=True)
class Records(ABC):
    """Samples of tasks. seed: of the samples that are drawn at random."""

    is_testbed: ClassVar[bool]
    seed: int

    def scored(self, task: str, limit: int | None = None, subset: int | None = None) -> tuple[Sample, ...]:
        """The samples a run is scored on.

        Args:
            limit: only the first so many.
            subset: only so many drawn by the seed, or all where there are fewer. The draw depends on nothing but the
                task's records and the seed, and a larger subset begins with the smaller one.
        """
        samples = self._scored(task, None if subset else limit)
        if subset:
            samples = samples.shuffle(seed=self.seed).take(min(subset, len(samples)))
        return tuple(samples.to_list())

    def unscored(self, tasks: Sequence[str], limit: int, max_length: int) -> list[tuple[str, Sample]]:
        """(task, sample) of `limit` samples that no run is scored on, the tasks in turns: in LongBench those of at most
        `max_length` words, the first in file order; in the testbed the calibration split.

        Raises:
            ValueError: there are fewer.
        """
        each = -(-limit // len(tasks))
        columns = []
        for task in tasks:
            found = self._unscored(task, max_length)[:each]
            if len(found) < each:
                raise ValueError(
                    f"strategy calibrated searches on {each} samples of {task} that no run is scored on, of at most "
                    f"{max_length} words, and there are {len(found)}; --profile takes a selection made elsewhere"
                )
            columns.append([(task, sample) for sample in found])
        return [pair for row in zip(*columns, strict=True) for pair in row][:limit]

    @abstractmethod
    def calibration(self, task: str, limit: int) -> tuple[Sample, ...]:
        """The first `limit` samples of a calibration task, with a warning where there are fewer."""

    @abstractmethod
    def set_name(self, task: str) -> str | None:
        """The set of LongBench that a task's samples are of, `trec` or `trec_e`; None on the testbed."""

    @abstractmethod
    def describe(self, tasks: Sequence[str]) -> dict[str, Any]:
        """What a manifest says of the choice among records."""

    @abstractmethod
    def _scored(self, task: str, limit: int | None) -> Dataset: ...

    @abstractmethod
    def _unscored(self, task: str, max_length: int) -> tuple[Sample, ...]: ...


@dataclass(frozen=True)
class TestbedRecords(Records):
    """The generated tasks of the embedded models."""

    __test__: ClassVar[bool] = False  # no class of tests
    is_testbed: ClassVar[bool] = True

    def calibration(self, task: str, limit: int) -> tuple[Sample, ...]:
        return tuple(_generated(task, "calibration", limit).to_list())

    def set_name(self, task: str) -> None:
        return None

    def describe(self, tasks: Sequence[str]) -> dict[str, Any]:
        return {"sets": None, "min_length": None}

    def _scored(self, task: str, limit: int | None) -> Dataset:
        return _generated(task, "test", limit)

    def _unscored(self, task: str, max_length: int) -> tuple[Sample, ...]:
        return tuple(testbed.records(task, split="calibration"))


@dataclass(frozen=True)
class LongBenchRecords(Records):
    """LongBench's records of more than `min_length` and at most `max_length` words.

    data_dir: see `longbench_files.list_sets`. extended: which set a task's name means, see `longbench.load_records`.
    """

    is_testbed: ClassVar[bool] = False
    data_dir: str | None
    extended: bool | None = None
    min_length: int = PAPER_MIN_LENGTH
    max_length: int | None = None

    def calibration(self, task: str, limit: int) -> tuple[Sample, ...]:
        """The first `limit` samples of a calibration task, filtered as in the paper, but of at most `max_length` words
        (below the paper's least length: of more than `min_length`).

        They are of the kind of set that the scored samples are of, plain or LongBench-E's, or, where the data has none
        of that, of the other kind. Warns, once in a process, of that and of fewer samples.

        Raises:
            LongBenchError: the data has neither set, or no such samples in it.
        """
        extended = self.extended
        if extended is not None:
            extended = _kind_at_hand(task, self.data_dir, extended)
        is_short = self.max_length is not None and self.max_length <= PAPER_MIN_LENGTH
        least = self.min_length if is_short else PAPER_MIN_LENGTH
        try:
            samples = _records(task, self.data_dir, limit, least, self.max_length, extended)
        except MissingDataError:
            raise
        except LongBenchError as error:
            raise LongBenchError(f"to calibrate on {task}: {error}; --profile takes a profile made elsewhere") from None
        if len(samples) < limit:
            _warn_of_few(task, len(samples), limit, _range(least, self.max_length))
        return tuple(samples.to_list())

    def set_name(self, task: str) -> str:
        return _set_name(task, self.data_dir, self.extended)

    def describe(self, tasks: Sequence[str]) -> dict[str, Any]:
        limit = {} if self.max_length is None else {"max_length": self.max_length}
        return {"sets": {task: self.set_name(task) for task in tasks}, "min_length": self.min_length, **limit}

    def _scored(self, task: str, limit: int | None) -> Dataset:
        return _records(task, self.data_dir, limit, self.min_length, self.max_length, self.extended)

    def _unscored(self, task: str, max_length: int) -> tuple[Sample, ...]:
        return _short_records(task, self.data_dir, max_length, self.extended)


def find_records(config: SharedConfig) -> Records:
    """Where a configuration's samples come from."""
    if config.testbed:
        return TestbedRecords(config.seed)
    if isinstance(config, DataConfig):
        return LongBenchRecords(config.seed, config.data_dir, config.extended, config.min_length, config.max_length)
    return LongBenchRecords(config.seed, config.data_dir, config.extended)


@lru_cache(maxsize=16)
def _generated(task: str, split: str, limit: int | None) -> Dataset:
    return as_dataset(testbed.records(task, split=split, limit=limit))


@lru_cache(maxsize=16)
def _records(
    task: str,
    data_dir: str | None,
    limit: int | None,
    min_length: int,
    max_length: int | None,
    extended: bool | None,
) -> Dataset:
    with _said_where_to_get_data():
        if max_length is None:
            return load_records(task, data_dir, min_length or None, limit, extended)
        records = load_records(task, data_dir, min_length or None, None, extended).to_list()
    kept = [record for record in records if record["length"] <= max_length]
    if not kept:
        shortest = min(record["length"] for record in records)
        raise LongBenchError(
            f"{data_dir or HUB} holds no record of {task} {_range(min_length, max_length)}; the shortest of more than "
            f"{min_length} words has {shortest}"
        )
    return as_dataset(kept[:limit])


def _range(min_length: int, max_length: int | None) -> str:
    return (
        f"of over {min_length} words" if max_length is None else f"of over {min_length} and at most {max_length} words"
    )


@lru_cache(maxsize=16)
def _short_records(task: str, data_dir: str | None, max_length: int, extended: bool | None) -> tuple[Sample, ...]:
    records = load_records(task, data_dir, min_length=None, extended=extended)
    return tuple(record for record in records.to_list() if record["length"] <= max_length)


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
def _warn_of_few(task: str, found: int, asked: int, kind: str) -> None:
    logger.warning(
        "calibration on %d samples of %s instead of %d: the data has no more %s", *(found, task, asked, kind)
    )


@lru_cache
def _set_name(task: str, data_dir: str | None, extended: bool | None) -> str:
    with _said_where_to_get_data():
        return find_set(task, data_dir, extended).set_name


@contextmanager
def _said_where_to_get_data() -> Iterator[None]:
    try:
        yield
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


def reference_ids(
    samples: Sequence[Sample], prompts: Sequence[Tensor], max_tokens: int, loaded: LoadedModel
) -> list[Tensor | None]:
    """The samples' reference answers as they would follow their prompts, 1-D token ids; None for an empty one."""
    made = (
        build_reference_ids(sample, prompt.tolist(), loaded.tokenizer, max_tokens)
        for sample, prompt in zip(samples, prompts, strict=True)
    )
    return [torch.tensor(ids) if ids else None for ids in made]


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over the samples' JSON, one line each with sorted keys."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(sample, sort_keys=True, ensure_ascii=False).encode("utf-8") + b"\n")
    return digest.hexdigest()
