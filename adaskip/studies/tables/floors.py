"""Floors: what answers score that need no model, so that a score that says nothing is recognised."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace

from adaskip.benchmarks.protocol import Benchmark
from adaskip.common.intervals import mean
from adaskip.studies.tables.runs import ResultsError, Run

EMPTY, MAJORITY, FIRST_SENTENCE = "empty answer", "majority class", "first sentence"
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
MIN_WORDS = 5
"""Of a first sentence: headings and labels such as `Passage 1:` are shorter."""


def floors(run: Run, task: str, data_dir: str | None = None) -> dict[str, float | None]:
    """Mean scores, fractions of 1, of trivial answers to a task's records of `run`; none if there are no records.

    `empty answer`; `majority class`, where answers are classes (`all_classes`): the most frequent one, always; `first
    sentence` of the context, where the benchmark knows it, some with their data in `data_dir`; None for other records.

    Raises:
        BenchmarkError: `data_dir` has no data of the task.
        ResultsError: the data lacks a record of the run.
    """
    records = run.tasks[task].records
    if not records:
        return {}
    found: dict[str, float | None] = {EMPTY: _score(run, task, [""] * len(records))}
    if records[0].get("all_classes"):
        ((most, _),) = Counter(record["references"][0] for record in records).most_common(1)
        found[MAJORITY] = _score(run, task, [most] * len(records))
    contexts = _at(run.benchmark, data_dir).contexts(task, run.manifest)
    if contexts is not None:
        unknown = [record["id"] for record in records if record["id"] not in contexts]
        if unknown and data_dir is not None:
            raise ResultsError(f"{data_dir} has no record {unknown[0]} of {task}, which {run.cell.label} answered")
        answers = [first_sentence(contexts.get(record["id"], "")) for record in records]
        found[FIRST_SENTENCE] = None if unknown else _score(run, task, answers)
    return found


def knows_contexts(run: Run, data_dir: str | None) -> bool:
    """Whether first sentences can be found."""
    return any(_at(run.benchmark, data_dir).contexts(task, run.manifest) is not None for task in run.tasks)


def _at(benchmark: Benchmark, data_dir: str | None) -> Benchmark:
    """The benchmark with its data there, if it takes any."""
    takes = data_dir is not None and "data_dir" in {each.name for each in fields(benchmark)}
    return replace(benchmark, data_dir=data_dir) if takes else benchmark


def _score(run: Run, task: str, answers: Sequence[str]) -> float:
    records = run.tasks[task].records
    given = [{**record, "prediction": answer} for record, answer in zip(records, answers, strict=True)]
    return mean(run.benchmark.evaluate(task, given, run.manifest).main.per_sample)


def first_sentence(text: str) -> str:
    """The first sentence, or line, of at least five words; the whole text where there is none."""
    parts = (part.strip() for part in SENTENCE_END.split(text))
    return next((part for part in parts if len(part.split()) >= MIN_WORDS), text.strip())
