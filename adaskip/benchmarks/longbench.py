"""LongBench as a benchmark: selection of its records, and its prompts and scores, which the testbed shares.

`longbench_tasks` has the tasks; `longbench_files` finds and reads files. The selected records are a `datasets.Dataset`
with LongBench's columns and types.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaskip.benchmarks import scoring
from adaskip.benchmarks.longbench_files import JsonlFile, LongBenchError, list_sets
from adaskip.benchmarks.longbench_tasks import EXTENDED_SUFFIX, EXTENDED_TASKS, TASKS, TaskSpec, get_task, set_meant
from adaskip.benchmarks.protocol import HUB, Benchmark, Record, register_benchmark
from adaskip.benchmarks.scores import Evaluation, SampleScore
from adaskip.common.choices import check_choice
from adaskip.common.configs import load_yaml
from adaskip.common.optional import optional_import

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

PAPER_MIN_LENGTH = 4000
"""The paper keeps samples of more than 4000 words (AdaSkip, Experiments)."""

COLUMNS = {
    **{"input": "text", "context": "text", "answers": "texts", "length": "number", "dataset": "text"},
    **{"language": "text", "all_classes": "texts", "_id": "text"},
}
"""LongBench's columns, and the type of each."""
_REQUIRED: dict[str, type] = {"input": str, "context": str, "answers": list, "length": int, "_id": str}


def find_set(task: str, source: str | Path | None = None, extended: bool | None = None) -> JsonlFile:
    """The file of a task's records in `source`; the arguments are those of `load_records`.

    Raises:
        LongBenchError: unknown task, a missing or broken source, or no such set in it.
    """
    spec, sets, meant = get_task(task), list_sets(source), set_meant(task, extended)
    if extended and not spec.has_extended:
        raise LongBenchError(f"LongBench-E has no set of {spec.name!r}; it has: {', '.join(EXTENDED_TASKS)}")
    names = [meant] + [task] * (extended is None and meant != task)
    for name in names:
        if name in sets:
            return sets[name]
    raise LongBenchError(f"{source or HUB} has no {' or '.join(names)} (.jsonl); it has: {', '.join(sets)}")


def load_records(
    task: str,
    source: str | Path | None = None,
    min_length: int | None = PAPER_MIN_LENGTH,
    limit: int | None = None,
    extended: bool | None = None,
) -> Dataset:
    """The selected records of a task, in file order; optional columns that a record lacks are None.

    Args:
        task: a LongBench task; `trec_e` means `trec` with `extended=True`.
        source: a folder of jsonl files, a zip archive, `"hub"`, or None for the local Hub cache (see
            `longbench_files.list_sets`).
        min_length: keep only records of more than this many words; None keeps all.
        limit: keep only the first `limit` of those; None keeps all.
        extended: use the LongBench-E set `<task>_e`, as in the paper (True), or the plain one (False). None: the
            LongBench-E set if the task and the source have one, else the plain one.

    Raises:
        LongBenchError: unknown task, missing or broken source, a record that lacks a field, or no record left.
    """
    if limit is not None and limit < 1:
        raise LongBenchError(f"limit is {limit}, it must be at least 1")
    spec, file = get_task(task), find_set(task, source, extended)
    if extended is None and file.set_name != (meant := set_meant(task)):
        logger.warning("%s has no %s.jsonl (LongBench-E); using %s.jsonl", source, meant, file.set_name)
    records = (_checked(record, spec, f"{file}:{number}") for number, record in file.records())
    kept = list(islice((r for r in records if min_length is None or r["length"] > min_length), limit))
    if not kept:
        wanted = "" if min_length is None else f" of more than {min_length} words"
        raise LongBenchError(f"{file} holds no record{wanted}")
    try:
        return as_dataset(kept)
    except (ValueError, OverflowError) as error:  # half a surrogate pair in a text, a length of more than 64 bits
        raise LongBenchError(f"{file} contains values that cannot be stored: {error}") from None


def load_both_sets(
    task: str, source: str | Path | None = None, min_length: int | None = PAPER_MIN_LENGTH, limit: int | None = None
) -> Dataset:
    """`load_records` of the LongBench-E set, followed by records of the plain set that are not in it (by id, or by
    input and context). A task named like a LongBench-E set (`trec_e`), or with a single set, has only that set."""
    names = sets_of(task, source)
    records: list[dict[str, Any]] = []
    for name in names:
        found = load_records(name, source, None, extended=name.endswith(EXTENDED_SUFFIX)).to_list()
        ids, texts = ({record["_id"] for record in records}, {_text_of(record) for record in records})
        records += [each for each in found if each["_id"] not in ids and _text_of(each) not in texts]
    kept = [record for record in records if record["length"] > (min_length or 0)][:limit]
    if not kept:
        raise LongBenchError(
            f"{source or HUB} holds no record of {' and '.join(names)} of more than {min_length} words"
        )
    return as_dataset(kept)


def sets_of(task: str, source: str | Path | None = None) -> tuple[str, ...]:
    """The sets of a task in `source`, LongBench-E's first; for `trec_e` only that one.

    Raises:
        LongBenchError: unknown task, a missing or broken source, or no such set in it.
    """
    sets = list_sets(source)
    found = [name for name in dict.fromkeys((set_meant(task), task)) if name in sets]
    return tuple(found) or (find_set(task, source).set_name,)


def _text_of(record: Mapping[str, Any]) -> tuple[str, str]:
    return record["input"], record["context"]


def as_dataset(records: Sequence[Mapping[str, Any]]) -> Dataset:
    """Records in LongBench's format as a table in memory; texts are unchanged."""
    with optional_import():
        from datasets import Dataset, Features, List, Value
    types = {"text": Value("string"), "texts": List(Value("string")), "number": Value("int64")}
    features = Features({name: types[kind] for name, kind in COLUMNS.items()})
    return Dataset.from_list([dict(record) for record in records], features=features)


def _checked(record: dict[str, Any], spec: TaskSpec, place: str) -> dict[str, Any]:
    """The columns of a record, after checking the required fields and their types."""
    for field, kind in _REQUIRED.items():
        if field not in record:
            raise LongBenchError(f"{place}: the record has no field {field!r}; it has: {', '.join(record)}")
        if not isinstance(record[field], kind) or isinstance(record[field], bool):
            given = type(record[field]).__name__
            raise LongBenchError(f"{place}: field {field!r} must be {kind.__name__}, not {given}")
    if not record["answers"] or not all(isinstance(answer, str) for answer in record["answers"]):
        raise LongBenchError(f"{place}: field 'answers' must be a list of at least one string")
    classes = record.get("all_classes")
    if spec.metric == "classification" and not (classes and all(isinstance(name, str) for name in classes)):
        raise LongBenchError(f"{place}: field 'all_classes' must be a list of strings for {spec.name}")
    return {column: record.get(column) for column in COLUMNS}


BOTH = "both"
SETS: dict[str, bool | None] = {"auto": None, "plain": False, "extended": True, BOTH: None}
"""Choices of `longbench_set`, with the `extended` of `load_records`; for `both`, `load_both_sets` is used."""


class LongBenchTasks(Benchmark):
    """What LongBench and the testbed share: prompts, caps and scores."""

    label = "LongBench"
    tasks = tuple(TASKS.values())
    kept = ("all_classes", "length")
    in_paper = True

    def score(self, task: str, prediction: str, references: Sequence[str], **kept: Any) -> SampleScore:
        return scoring.sample_score(task, prediction, references, kept.get("all_classes"))

    def fidelity(self, task: str, prediction: str, full_answer: str, **kept: Any) -> float:
        """Of the texts that the metric reads: for some tasks the first line, for code the first line of code. If
        answers are classes: the classes that both name / the classes that either names. 0 for a different answer of
        the full model that cannot be a reference."""
        ours, full = (scoring.scored_text(task, text).strip() for text in (prediction, full_answer))
        if (classes := kept.get("all_classes")) and ours and full and ours != full:
            return scoring.same_classes(task, ours, full, tuple(classes))
        try:
            return super().fidelity(task, ours, full, **kept)
        except scoring.MetricError:
            return 0.0

    def evaluate(self, task: str, records: Sequence[Record], manifest: Mapping[str, Any]) -> Evaluation:
        """Also by Google's `rouge_score` if the metric is Rouge-L, and by buckets of length for LongBench-E."""
        main = super().evaluate(task, records, manifest).main
        beside = scoring.STANDARD_ROUGE.get(main.metric)
        is_extended = set_of(task, manifest).endswith(EXTENDED_SUFFIX)
        if is_extended and any("length" not in record for record in records):
            raise scoring.MetricError(f"a record of {task} has no 'length', so that it belongs to no bucket")
        return Evaluation(
            main,
            scoring.score_samples(task, records, beside) if beside else None,
            scoring.score_buckets(main.per_sample, [r["length"] for r in records]) if is_extended else None,
        )

    def score_version(self) -> str:
        return f"{_scoring_code(type(self))}, {scoring.fingerprint()}"


@cache
def _scoring_code(cls: type[LongBenchTasks]) -> str:
    """Digest of the methods of a class and its bases that score answers."""
    held = [vars(each).get(name) for each in cls.__mro__ for name in ("score", "fidelity", "evaluate")]
    return hashlib.sha256("".join(map(inspect.getsource, filter(None, held))).encode()).hexdigest()


def set_of(task: str, manifest: Mapping[str, Any]) -> str:
    """The set of a run's samples: `trec`, `trec_e` or both, `trec_e+trec`; for older runs the name of the task."""
    return (manifest.get("sets") or {}).get(task, task)


@register_benchmark
@dataclass(frozen=True, kw_only=True)
class LongBench(LongBenchTasks):
    """LongBench's records of more than `min_length` and at most `max_length` words.

    data_dir: see `longbench_files.list_sets`. longbench_set: the set that a task name means, one of
    `SETS`. calibration_min_length: importance is measured on records of more words.
    """

    name = "longbench"

    data_dir: str | None = None
    longbench_set: str = "auto"
    min_length: int = PAPER_MIN_LENGTH
    max_length: int | None = None
    calibration_min_length: int = PAPER_MIN_LENGTH

    def __post_init__(self) -> None:
        check_choice("--longbench-set", self.longbench_set, SETS)
        if self.min_length < 0:
            raise ValueError(f"--min-length must be at least 0 words, not {self.min_length}")
        if self.max_length is not None and self.max_length <= self.min_length:
            raise ValueError(
                f"--max-length {self.max_length} leaves no record, since --min-length {self.min_length} keeps those of "
                "more words: give a larger --max-length or a smaller --min-length"
            )

    @classmethod
    def results_dir(cls) -> str:
        return "results"

    def task(self, name: str) -> TaskSpec:
        return get_task(name)

    def check_tasks(self, names: Sequence[str]) -> None:
        super().check_tasks(names)
        for task in names:
            meant = set_meant(task, SETS[self.longbench_set])
            if task in TASKS and meant != task and meant in names:
                raise ValueError(
                    f"--tasks {task} and {meant} are one set with --longbench-set {self.longbench_set}: give one of "
                    f"them, or --longbench-set plain, by which {task} is LongBench's own"
                )

    def num_records(self, task: str) -> int | None:
        is_papers = (self.min_length, self.max_length, SETS[self.longbench_set]) == (PAPER_MIN_LENGTH, None, None)
        return super().num_records(task) if is_papers and self.longbench_set != BOTH else None

    def records(self, task: str, limit: int | None = None) -> Sequence[Record]:
        return self._load(task, limit, self.min_length, self.longbench_set)

    def unscored_records(self, task: str) -> Sequence[Record]:
        """The records that are too short to be scored."""
        return [each for each in self._load_all(task, None, 0, self.longbench_set) if each["length"] <= self.min_length]

    @property
    def unscored_words(self) -> int:
        return self.min_length

    @property
    def download_bytes(self) -> int:
        return load_yaml("longbench")["hub"]["bytes"]

    def calibration_records(self, task: str, limit: int) -> Sequence[Record]:
        """The first records of a calibration task with more than `calibration_min_length` words or, if `max_length`
        excludes these, more than `min_length`.

        They are from the same kind of set as the scored samples, plain or LongBench-E's; if the data has no such set,
        from the other kind, with one warning per process.

        Raises:
            LongBenchError: the data has neither set, or no such samples.
        """
        kind = self.longbench_set
        if SETS[kind] is not None:
            kind = _kind_at_hand(task, self.data_dir, kind)
        is_short = self.max_length is not None and self.max_length <= self.calibration_min_length
        try:
            return self._load(task, limit, self.min_length if is_short else self.calibration_min_length, kind)
        except LongBenchError as error:
            raise LongBenchError(f"to calibrate on {task}: {error}; --profile takes a profile made elsewhere") from None

    def contexts(self, task: str, manifest: Mapping[str, Any]) -> Mapping[str, str] | None:
        """None without a `data_dir`; the local Hub cache is not searched."""
        if self.data_dir is None:
            return None
        sets = [_load_set(name, self.data_dir) for name in reversed(set_of(task, manifest).split("+"))]
        return {record["_id"]: record["context"] for records in sets for record in records}

    def _load(self, task: str, limit: int | None, min_length: int, kind: str) -> Sequence[Record]:
        most = self.max_length
        if most is None:
            return self._load_all(task, limit, min_length, kind)
        records = self._load_all(task, None, min_length, kind)
        if not (kept := [record for record in records if record["length"] <= most]):
            shortest = min(record["length"] for record in records)
            raise LongBenchError(
                f"{self.data_dir or HUB} holds no record of {task} of over {min_length} and at most {most} words; the "
                f"shortest of more than {min_length} words has {shortest}"
            )
        return kept[:limit]

    def _load_all(self, task: str, limit: int | None, min_length: int, kind: str) -> Sequence[Record]:
        if kind == BOTH:
            return load_both_sets(task, self.data_dir, min_length or None, limit).to_list()
        return load_records(task, self.data_dir, min_length or None, limit, SETS[kind]).to_list()

    @property
    def options(self) -> dict[str, Any]:
        return {}  # `describe` has the resulting sets

    def describe(self, tasks: Sequence[str]) -> dict[str, Any]:
        limit = {} if self.max_length is None else {"max_length": self.max_length}
        return {"sets": {task: self._set_name(task) for task in tasks}, "min_length": self.min_length, **limit}

    def _set_name(self, task: str) -> str:
        if self.longbench_set == BOTH:
            return "+".join(sets_of(task, self.data_dir))
        return find_set(task, self.data_dir, SETS[self.longbench_set]).set_name


@lru_cache(maxsize=16)
def _load_set(name: str, data_dir: str) -> Sequence[Record]:
    return load_records(name, data_dir, None, extended=name.endswith(EXTENDED_SUFFIX)).to_list()


@lru_cache
def _kind_at_hand(task: str, data_dir: str | None, kind: str) -> str:
    """`plain` or `extended`: `kind` if the data has such a set of `task` or no set of it at all, else the other."""
    sets = list_sets(data_dir)
    wanted, other = (set_meant(task, extended) for extended in (SETS[kind], not SETS[kind]))
    if wanted in sets or other not in sets:
        return kind
    logger.warning("calibration on %s: %s has no %s", other, data_dir or HUB, wanted)
    return "plain" if kind == "extended" else "extended"
