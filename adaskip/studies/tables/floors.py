"""Floors: what answers score that need no model, so that a score that says nothing is recognised."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from adaskip import testbed
from adaskip.benchmarks import scoring
from adaskip.benchmarks.longbench import load_records
from adaskip.common.intervals import mean
from adaskip.studies.tables.runs import ResultsError, Run

EMPTY, MAJORITY, FIRST_SENTENCE = "empty answer", "majority class", "first sentence"
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
MIN_WORDS = 5
"""Of a first sentence: headings and labels such as `Passage 1:` are shorter."""


def floors(run: Run, task: str, data_dir: str | None = None) -> dict[str, float | None]:
    """Mean scores, fractions of 1, of trivial answers to a task's records of `run`; none if there are no records.

    `empty answer`; `majority class`, where answers are classes: the most frequent one, always; `first sentence` of the
    context: where `data_dir` names LongBench's data, or on the testbed, None for records of other generated tasks.

    Raises:
        LongBenchError: `data_dir` has no data of the task.
        ResultsError: the data lacks a record of the run.
    """
    records = run.tasks[task].records
    if not records:
        return {}
    found: dict[str, float | None] = {EMPTY: _score(task, records, [""] * len(records))}
    if records[0]["all_classes"]:
        ((most, _),) = Counter(record["references"][0] for record in records).most_common(1)
        found[MAJORITY] = _score(task, records, [most] * len(records))
    if knows_contexts(run, data_dir):
        sentences = _first_sentences(task, run.manifest["testbed"], data_dir, run.is_extended(task))
        unknown = [record["id"] for record in records if record["id"] not in sentences]
        if unknown and not run.manifest["testbed"]:
            raise ResultsError(f"{data_dir} has no record {unknown[0]} of {task}, which {run.cell.label} answered")
        answers = [sentences.get(record["id"], "") for record in records]
        found[FIRST_SENTENCE] = None if unknown else _score(task, records, answers)
    return found


def knows_contexts(run: Run, data_dir: str | None) -> bool:
    """Whether first sentences can be found."""
    return run.manifest["testbed"] or data_dir is not None


def _score(task: str, records: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> float:
    given = [{**record, "prediction": answer} for record, answer in zip(records, answers, strict=True)]
    return mean(scoring.score_samples(task, given).per_sample)


@lru_cache(maxsize=16)
def _first_sentences(task: str, is_testbed: bool, data_dir: str | None, extended: bool) -> Mapping[str, str]:
    """The first sentence of each sample's context, by the sample's id."""
    data = testbed.records(task) if is_testbed else load_records(task, data_dir, None, extended=extended)
    return {record["_id"]: first_sentence(record["context"]) for record in data}


def first_sentence(text: str) -> str:
    """The first sentence, or line, of at least five words; the whole text where there is none."""
    parts = (part.strip() for part in SENTENCE_END.split(text))
    return next((part for part in parts if len(part.split()) >= MIN_WORDS), text.strip())
