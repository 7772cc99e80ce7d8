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
from pathlib import Path
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
    count_prompt_tokens,
    find_set,
    get_task,
    load_both_sets,
    load_records,
    set_meant,
    sets_of,
)
from adaskip.benchmarks.longbench_files import HUB, LongBenchError, MissingDataError, list_sets
from adaskip.models.loading import LoadedModel, ModelSource, load_tokenizer
from adaskip.runs.config import BOTH, LONGBENCH_SETS, DataConfig, SharedConfig
from adaskip.runs.loading import Loading

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

    def unscored(self, tasks: Sequence[str], limit: int) -> list[tuple[str, Sample]]:
        """(task, sample) of `limit` samples that no run is scored on, the tasks in turns: of LongBench the first, in
        file order, of those that the protocol leaves out; of the testbed the calibration split.

        Raises:
            ValueError: there are fewer.
        """
        each = -(-limit // len(tasks))
        columns = []
        for task in tasks:
            found = self._unscored(task)[:each]
            if len(found) < each:
                raise ValueError(
                    f"strategy calibrated searches on {each} samples of {task} that no run is scored on, "
                    f"{self.unscored_kind}, and there are {len(found)}; --profile takes a selection made elsewhere"
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

    @property
    @abstractmethod
    def unscored_kind(self) -> str:
        """What samples are that no run is scored on, as an error says it."""

    @property
    def unscored_words(self) -> int | None:
        """The most words that these have; None where words do not tell them from the scored ones."""
        return None

    @abstractmethod
    def _scored(self, task: str, limit: int | None) -> Dataset: ...

    @abstractmethod
    def _unscored(self, task: str) -> Sequence[Sample]: ...


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

    @property
    def unscored_kind(self) -> str:
        return "of the calibration split"

    def _unscored(self, task: str) -> Sequence[Sample]:
        return testbed.records(task, split="calibration")


@dataclass(frozen=True)
class PromptLimit:
    """Prompts of more than `tokens` tokens, before they are wrapped, are left out. source: whose tokenizer counts."""

    tokens: int
    source: ModelSource


@dataclass(frozen=True)
class LongBenchRecords(Records):
    """LongBench's records of more than `min_length` and at most `max_length` words and within `prompt_limit`.

    data_dir: see `longbench_files.list_sets`. longbench_set: which set a task's name means, as `--longbench-set`.
    """

    is_testbed: ClassVar[bool] = False
    data_dir: str | None
    longbench_set: str = "auto"
    min_length: int = PAPER_MIN_LENGTH
    max_length: int | None = None
    prompt_limit: PromptLimit | None = None

    def calibration(self, task: str, limit: int) -> tuple[Sample, ...]:
        """The first `limit` samples of a calibration task, filtered as in the paper, but of at most `max_length` words
        (below the paper's least length, and with a `prompt_limit`, to which their prompts are cut: of more than
        `min_length`).

        They are of the kind of set that the scored samples are of, plain or LongBench-E's, or, where the data has none
        of that, of the other kind. Warns, once in a process, of that and of fewer samples.

        Raises:
            LongBenchError: the data has neither set, or no such samples in it.
        """
        kind = self.longbench_set
        if LONGBENCH_SETS[kind] is not None:
            kind = _kind_at_hand(task, self.data_dir, kind)
        is_short = self.max_length is not None and self.max_length <= PAPER_MIN_LENGTH
        least = self.min_length if is_short or self.prompt_limit is not None else PAPER_MIN_LENGTH
        try:
            samples = _records(task, self.data_dir, limit, least, self.max_length, kind)
        except MissingDataError:
            raise
        except LongBenchError as error:
            raise LongBenchError(f"to calibrate on {task}: {error}; --profile takes a profile made elsewhere") from None
        if len(samples) < limit:
            _warn_of_few(task, len(samples), limit, _range(least, self.max_length))
        return tuple(samples.to_list())

    def set_name(self, task: str) -> str:
        return _set_name(task, self.data_dir, self.longbench_set)

    def describe(self, tasks: Sequence[str]) -> dict[str, Any]:
        words = {} if self.max_length is None else {"max_length": self.max_length}
        tokens = {} if self.prompt_limit is None else {"longest_prompt_tokens": self.prompt_limit.tokens}
        return {"sets": {task: self.set_name(task) for task in tasks}, "min_length": self.min_length, **words, **tokens}

    @property
    def unscored_kind(self) -> str:
        if self.prompt_limit is not None:
            return f"with prompts of over {self.prompt_limit.tokens} tokens"
        return f"of at most {self.min_length} words"

    @property
    def unscored_words(self) -> int | None:
        return self.min_length if self.prompt_limit is None else None

    def _scored(self, task: str, limit: int | None) -> Dataset:
        if self.prompt_limit is None:
            return _records(task, self.data_dir, limit, self.min_length, self.max_length, self.longbench_set)
        records = _records(task, self.data_dir, None, self.min_length, self.max_length, self.longbench_set)
        counts = self._prompt_tokens(task)
        kept = [record for record in records.to_list() if counts[record["_id"]] <= self.prompt_limit.tokens]
        if not kept:
            raise LongBenchError(
                f"{self.data_dir or HUB} holds no record of {task} whose prompt has at most {self.prompt_limit.tokens} "
                f"tokens; the shortest has {min(counts.values())}"
            )
        return as_dataset(kept[:limit])

    def _unscored(self, task: str) -> Sequence[Sample]:
        samples = _all_records(task, self.data_dir, self.longbench_set)
        if self.prompt_limit is None:
            return [sample for sample in samples if sample["length"] <= self.min_length]
        counts = self._prompt_tokens(task)
        return [sample for sample in samples if counts[sample["_id"]] > self.prompt_limit.tokens]

    def _prompt_tokens(self, task: str) -> dict[str, int]:
        """Tokens of the prompt of each record of a task, by its id."""
        assert self.prompt_limit is not None, "there is a tokenizer to count with"
        return _prompt_tokens(task, self.data_dir, self.longbench_set, self.prompt_limit.source.path)


def find_records(config: SharedConfig, loading: Loading | None = None) -> Records:
    """Where a configuration's samples come from. loading: the model that they are for.

    Raises:
        ValueError: the protocol counts tokens of prompts, and it is not known of which model.
    """
    if config.testbed:
        return TestbedRecords(config.seed)
    setup = config.setup if loading is None else config.setup_of(loading.source.entry)
    limit = None
    if setup.longest_prompt_tokens is not None:
        if loading is None:
            raise ValueError(f"protocol {setup.name} counts tokens of prompts, which this command cannot: leave it out")
        limit = PromptLimit(loading.max_prompt_tokens, loading.source)
    given = config if isinstance(config, DataConfig) else None
    return LongBenchRecords(
        config.seed,
        config.data_dir,
        longbench_set=(given and given.longbench_set) or setup.longbench_set,
        min_length=setup.min_length if given is None or given.min_length is None else given.min_length,
        max_length=None if given is None else given.max_length,
        prompt_limit=limit,
    )


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
    longbench_set: str,
) -> Dataset:
    with _said_where_to_get_data():
        if max_length is None:
            return _load(task, data_dir, min_length, limit, longbench_set)
        records = _load(task, data_dir, min_length, None, longbench_set).to_list()
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
def _all_records(task: str, data_dir: str | None, longbench_set: str) -> tuple[Sample, ...]:
    with _said_where_to_get_data():
        return tuple(_load(task, data_dir, 0, None, longbench_set).to_list())


@lru_cache(maxsize=16)
def _prompt_tokens(task: str, data_dir: str | None, longbench_set: str, folder: Path) -> dict[str, int]:
    spec, tokenizer = get_task(task), load_tokenizer(folder)
    samples = _all_records(task, data_dir, longbench_set)
    return {sample["_id"]: count_prompt_tokens(sample, spec, tokenizer) for sample in samples}


def _load(task: str, data_dir: str | None, min_length: int, limit: int | None, longbench_set: str) -> Dataset:
    if longbench_set == BOTH:
        return load_both_sets(task, data_dir, min_length or None, limit)
    return load_records(task, data_dir, min_length or None, limit, LONGBENCH_SETS[longbench_set])


@lru_cache
def _kind_at_hand(task: str, data_dir: str | None, kind: str) -> str:
    """`plain` or `extended`: `kind` if the data has such a set of `task`, or has none at all; else the other one."""
    with _said_where_to_get_data():
        sets = list_sets(data_dir)
    wanted, other = (set_meant(task, extended) for extended in (LONGBENCH_SETS[kind], not LONGBENCH_SETS[kind]))
    if wanted in sets or other not in sets:
        return kind
    logger.warning("calibration on %s: %s has no %s", other, data_dir or HUB, wanted)
    return "plain" if kind == "extended" else "extended"


@lru_cache
def _warn_of_few(task: str, found: int, asked: int, kind: str) -> None:
    logger.warning(
        "calibration on %d samples of %s instead of %d: the data has no more %s", *(found, task, asked, kind)
    )


@lru_cache
def _set_name(task: str, data_dir: str | None, longbench_set: str) -> str:
    with _said_where_to_get_data():
        if longbench_set == BOTH:
            return "+".join(sets_of(task, data_dir))
        return find_set(task, data_dir, LONGBENCH_SETS[longbench_set]).set_name


@contextmanager
def _said_where_to_get_data() -> Iterator[None]:
    try:
        yield
    except MissingDataError as error:
        hint = "--data-dir takes any of these, --testbed the embedded models and tasks"
        raise MissingDataError(f"{error}; {hint}") from None


def prompt_ids(samples: Sequence[Sample], task: TaskSpec, loaded: LoadedModel, most: int | None = None) -> list[Tensor]:
    """The samples' prompts as the model is given them, 1-D token ids; `most` tokens, or the model's limit, are kept of
    a longer one before it is wrapped."""
    tokenizer, template = loaded.tokenizer, loaded.spec.chat_template
    limit = min(loaded.spec.max_prompt_tokens, most or loaded.spec.max_prompt_tokens)
    return [torch.tensor(build_prompt_ids(sample, task, tokenizer, limit, template)) for sample in samples]


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
