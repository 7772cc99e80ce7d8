"""Selects the records of a benchmark for scoring, calibration and search, and builds prompts from them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaskip.benchmarks.prompts import build_prompt_ids, build_reference_ids, count_tokens
from adaskip.benchmarks.protocol import Benchmark, BenchmarkError
from adaskip.models.loading import LoadedModel, load_tokenizer
from adaskip.models.source import ModelSource
from adaskip.runs.config import SharedConfig
from adaskip.runs.loading import Loading

logger = logging.getLogger(__name__)

Sample = dict[str, Any]


@dataclass(frozen=True)
class PromptLimit:
    """Leaves out prompts of more than `tokens` tokens before the chat wrapper. source: the model whose tokenizer
    counts."""

    tokens: int
    source: ModelSource


@dataclass(frozen=True)
class Records:
    """The samples of a benchmark, optionally within a `prompt_limit`. seed: for random subsets."""

    benchmark: Benchmark
    seed: int = 0
    prompt_limit: PromptLimit | None = None

    def scored(self, task: str, limit: int | None = None, subset: int | None = None) -> tuple[Sample, ...]:
        """The samples that a run is scored on.

        Args:
            limit: use only this many, the first ones.
            subset: use only this many random ones, or all if there are fewer. The choice depends only on the task's
                records and the seed, and a larger subset begins with the smaller one.
        """
        if subset is None:
            return self._fitting(task, limit)
        samples = self._fitting(task, None)
        drawn = np.random.default_rng(self.seed).permutation(len(samples))[:subset]
        return tuple(samples[place] for place in drawn)

    def unscored(self, tasks: Sequence[str], limit: int) -> list[tuple[str, Sample]]:
        """(task, sample) of `limit` samples that no run is scored on, alternating between tasks.

        Of each task these are the first ones that the benchmark provides or, with a `prompt_limit`, that exceed it.

        Raises:
            ValueError: there are too few.
        """
        each = -(-limit // len(tasks))
        columns = []
        for task in tasks:
            found = self._left_out(task)[:each]
            if len(found) < each:
                raise ValueError(
                    f"strategy calibrated searches on {each} samples of {task} that no run is scored on"
                    f"{self._left_out_kind}, but there are only {len(found)}; use --profile with an existing selection"
                )
            columns.append([(task, sample) for sample in found])
        return [pair for row in zip(*columns, strict=True) for pair in row][:limit]

    def calibration(self, task: str, limit: int) -> tuple[Sample, ...]:
        """The first `limit` samples of a calibration task; warns once per process if there are fewer."""
        samples = _read(self.benchmark, "calibration_records", task, limit)[:limit]
        if len(samples) < limit:
            _warn_of_few(task, len(samples), limit)
        return samples

    def describe(self, tasks: Sequence[str]) -> dict[str, Any]:
        """The fields of a manifest that identify these records."""
        limit = {} if self.prompt_limit is None else {"longest_prompt_tokens": self.prompt_limit.tokens}
        options = self.benchmark.options or None
        return {
            **{"benchmark": self.benchmark.name, "benchmark_options": options},
            **self.benchmark.describe(tasks),
            **limit,
        }

    @property
    def unscored_words(self) -> int | None:
        """Maximum number of words of a sample that no run is scored on; None if unknown."""
        return self.benchmark.unscored_words if self.prompt_limit is None else None

    @property
    def _left_out_kind(self) -> str:
        if self.prompt_limit is not None:
            return f", with prompts of over {self.prompt_limit.tokens} tokens"
        return "" if (words := self.unscored_words) is None else f", of at most {words} words"

    def _fitting(self, task: str, limit: int | None) -> tuple[Sample, ...]:
        """The first `limit` samples within the `prompt_limit`."""
        if self.prompt_limit is None:
            return _read(self.benchmark, "records", task, limit)[:limit]
        most, counts = self.prompt_limit.tokens, self._prompt_tokens(task)
        kept = tuple(sample for sample, count in counts if count <= most)
        if not kept:
            raise BenchmarkError(
                f"{self.benchmark.name} has no record of {task} whose prompt has at most {most} tokens; the shortest "
                f"has {min(count for _, count in counts)}"
            )
        return kept[:limit]

    def _left_out(self, task: str) -> Sequence[Sample]:
        if self.prompt_limit is None:
            return _read(self.benchmark, "unscored_records", task)
        return [sample for sample, count in self._prompt_tokens(task) if count > self.prompt_limit.tokens]

    def _prompt_tokens(self, task: str) -> tuple[tuple[Sample, int], ...]:
        """Each sample with the number of tokens of its prompt."""
        assert self.prompt_limit is not None, "there is a tokenizer to count with"
        return _prompt_tokens(self.benchmark, task, self.prompt_limit.source.path)


def find_records(config: SharedConfig, loading: Loading | None = None) -> Records:
    """The records of a configuration. loading: the model that they are for.

    Raises:
        ValueError: the protocol counts prompt tokens, but no model is given.
    """
    setup = config.setup if loading is None else config.setup_of(loading.source.entry)
    limit = None
    if setup.longest_prompt_tokens is not None:
        if loading is None:
            raise ValueError(f"protocol {setup.name} counts prompt tokens, which this command cannot: leave it out")
        limit = PromptLimit(loading.max_prompt_tokens, loading.source)
    return Records(config.find_benchmark(setup), config.seed, limit)


@lru_cache(maxsize=32)
def _read(benchmark: Benchmark, method: str, task: str, *limit: int | None) -> tuple[Sample, ...]:
    """The checked result of a method of the benchmark."""
    samples = tuple(dict(record) for record in getattr(benchmark, method)(task, *limit))
    for number, sample in enumerate(samples):
        if problem := _problem(benchmark, sample):
            raise BenchmarkError(f"record {number} of task {task} of benchmark {benchmark.name} {problem}")
    if len({sample["_id"] for sample in samples}) < len(samples):
        raise BenchmarkError(f"two records of task {task} of benchmark {benchmark.name} have the same '_id'")
    return samples


@lru_cache(maxsize=32)
def _prompt_tokens(benchmark: Benchmark, task: str, folder: Path) -> tuple[tuple[Sample, int], ...]:
    tokenizer = load_tokenizer(folder)
    samples = _read(benchmark, "records", task, None)
    return tuple((sample, count_tokens(benchmark.prompt(task, sample), tokenizer)) for sample in samples)


def _problem(benchmark: Benchmark, sample: Sample) -> str:
    """The problem of an invalid record; empty for a valid one."""
    if missing := [name for name in ("_id", "answers", *benchmark.kept) if name not in sample]:
        return f"has no {', '.join(map(repr, missing))}; it has: {', '.join(sample)}"
    if not isinstance(sample["_id"], str):
        return f"has the '_id' {sample['_id']!r}, which must be a string"
    answers = sample["answers"]
    if not isinstance(answers, list | tuple) or not answers or not all(isinstance(text, str) for text in answers):
        return "has 'answers' that are not a non-empty list of strings"
    try:
        json.dumps(sample, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        return f"cannot be written as JSON: {error}"
    return ""


@lru_cache
def _warn_of_few(task: str, found: int, asked: int) -> None:
    logger.warning("calibration on %d samples of %s instead of %d: the data has no more", found, task, asked)


def prompt_ids(
    benchmark: Benchmark, task: str, samples: Sequence[Sample], loaded: LoadedModel, most: int | None = None
) -> list[Tensor]:
    """The prompts of samples as token ids, each 1-D. Before the chat wrapper is added, a prompt is truncated to the
    model's limit or, if lower, to `most` tokens."""
    limit = min(loaded.spec.max_prompt_tokens, most or loaded.spec.max_prompt_tokens)
    wrapper = loaded.spec.chat_template if benchmark.task(task).chat else None
    texts = (benchmark.prompt(task, sample) for sample in samples)
    return [torch.tensor(build_prompt_ids(text, loaded.tokenizer, limit, wrapper)) for text in texts]


def reference_ids(
    benchmark: Benchmark,
    task: str,
    samples: Sequence[Sample],
    prompts: Sequence[Tensor],
    max_tokens: int,
    loaded: LoadedModel,
) -> list[Tensor | None]:
    """The reference answers of samples as tokenised after their prompts, each 1-D; None for an empty answer."""
    made = (
        build_reference_ids(benchmark.reference(task, sample), prompt.tolist(), loaded.tokenizer, max_tokens)
        for sample, prompt in zip(samples, prompts, strict=True)
    )
    return [torch.tensor(ids) if ids else None for ids in made]


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over the samples as JSON lines with sorted keys."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(sample, sort_keys=True, ensure_ascii=False).encode("utf-8") + b"\n")
    return digest.hexdigest()
