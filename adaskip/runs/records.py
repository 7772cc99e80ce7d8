"""The records of a benchmark that a run is scored, calibrated or searched on, and the prompts made of them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaskip.benchmarks.prompts import build_prompt_ids
from adaskip.benchmarks.protocol import Benchmark, BenchmarkError
from adaskip.models.loading import LoadedModel

logger = logging.getLogger(__name__)

Sample = dict[str, Any]


def scored_samples(
    benchmark: Benchmark, task: str, limit: int | None = None, subset: int | None = None, seed: int = 0
) -> tuple[Sample, ...]:
    """The samples a run is scored on.

    Args:
        limit: only the first so many.
        subset: only so many drawn by the seed, or all where there are fewer. The draw depends on nothing but the task's
            records and the seed, and a larger subset begins with the smaller one.
    """
    if subset is None:
        return _read(benchmark, "records", task, limit)[:limit]
    samples = _read(benchmark, "records", task, None)
    drawn = np.random.default_rng(seed).permutation(len(samples))[:subset]
    return tuple(samples[place] for place in drawn)


def calibration_samples(benchmark: Benchmark, task: str, limit: int) -> tuple[Sample, ...]:
    """The first `limit` samples of a calibration task; warns, once in a process, where there are fewer."""
    samples = _read(benchmark, "calibration_records", task, limit)[:limit]
    if len(samples) < limit:
        _warn_of_few(task, len(samples), limit)
    return samples


def searched_samples(benchmark: Benchmark, tasks: Sequence[str], limit: int) -> list[tuple[str, Sample]]:
    """(task, sample) of `limit` samples that no run is scored on, the first ones, the tasks in turns.

    Raises:
        ValueError: there are fewer.
    """
    each = -(-limit // len(tasks))
    columns = []
    for task in tasks:
        found = _read(benchmark, "unscored_records", task)[:each]
        if len(found) < each:
            words = "" if benchmark.unscored_words is None else f", of at most {benchmark.unscored_words} words,"
            raise ValueError(
                f"strategy calibrated searches on {each} samples of {task} that no run is scored on{words} and there "
                f"are {len(found)}; --profile takes a selection made elsewhere"
            )
        columns.append([(task, sample) for sample in found])
    return [pair for row in zip(*columns, strict=True) for pair in row][:limit]


@lru_cache(maxsize=32)
def _read(benchmark: Benchmark, method: str, task: str, *limit: int | None) -> tuple[Sample, ...]:
    """What a method of the benchmark returns, checked."""
    records = tuple(dict(record) for record in getattr(benchmark, method)(task, *limit))
    for number, record in enumerate(records):
        if problem := _problem(benchmark, record):
            raise BenchmarkError(f"record {number} of task {task} of benchmark {benchmark.name} {problem}")
    if len({record["_id"] for record in records}) < len(records):
        raise BenchmarkError(f"two records of task {task} of benchmark {benchmark.name} have the same '_id'")
    return records


def _problem(benchmark: Benchmark, record: Sample) -> str:
    """What is wrong with a record; empty if nothing is."""
    if missing := [name for name in ("_id", "answers", *benchmark.kept) if name not in record]:
        return f"has no {', '.join(map(repr, missing))}; it has: {', '.join(record)}"
    if not isinstance(record["_id"], str):
        return f"has the '_id' {record['_id']!r}, which must be a text"
    answers = record["answers"]
    if not isinstance(answers, list | tuple) or not answers or not all(isinstance(text, str) for text in answers):
        return "has 'answers' that are no list of at least one text"
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        return f"holds what JSON cannot: {error}"
    return ""


@lru_cache
def _warn_of_few(task: str, found: int, asked: int) -> None:
    logger.warning("calibration on %d samples of %s instead of %d: the data has no more", found, task, asked)


def prompt_ids(
    benchmark: Benchmark,
    task: str,
    samples: Sequence[Sample],
    loaded: LoadedModel,
    max_prompt_tokens: int | None = None,
) -> list[Tensor]:
    """The samples' prompts as the model is given them, 1-D token ids. max_prompt_tokens: another limit than its own."""
    tokenizer: Any = loaded.tokenizer
    limit = max_prompt_tokens or loaded.spec.max_prompt_tokens
    wrapper = loaded.spec.chat_template if benchmark.task(task).chat else None
    return [
        torch.tensor(build_prompt_ids(benchmark.prompt(task, sample), tokenizer, limit, wrapper)) for sample in samples
    ]


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over the samples' JSON, one line each with sorted keys."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(sample, sort_keys=True, ensure_ascii=False).encode("utf-8") + b"\n")
    return digest.hexdigest()
