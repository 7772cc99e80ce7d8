"""LongBench's protocol: which tasks there are, which records count, and how a record becomes a prompt.

The protocol's data (templates, caps, metrics) is `configs/longbench.yaml`; `longbench_files` finds and reads files. The
records that count are a `datasets.Dataset` of LongBench's own columns and types.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaskip.benchmarks.longbench_files import HUB, JsonlFile, LongBenchError, list_sets
from adaskip.common.configs import ConfigError, load_yaml
from adaskip.common.optional import optional_import

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "EXTENDED_TASKS",
    "HUB",
    "PAPER_MIN_LENGTH",
    "TASKS",
    "LongBenchError",
    "TaskSpec",
    "as_dataset",
    "build_prompt_ids",
    "build_reference_ids",
    "count_prompt_tokens",
    "find_set",
    "get_task",
    "load_both_sets",
    "load_records",
    "set_meant",
]

logger = logging.getLogger(__name__)

EXTENDED_SUFFIX = "_e"
PAPER_MIN_LENGTH = 4000
"""The paper keeps samples of more than 4000 words (AdaSkip, Experiments)."""

COLUMNS = {
    **{"input": "text", "context": "text", "answers": "texts", "length": "number", "dataset": "text"},
    **{"language": "text", "all_classes": "texts", "_id": "text"},
}
"""LongBench's own, and what each holds."""
_REQUIRED: dict[str, type] = {"input": str, "context": str, "answers": list, "length": int, "_id": str}


@dataclass(frozen=True)
class TaskSpec:
    """One LongBench task; the fields left out in the YAML have the defaults here."""

    name: str
    template: str
    """Prompt with `{context}` and, for most tasks, `{input}`."""
    max_new_tokens: int
    """LongBench's cap on generated tokens (the paper caps its prefill tasks at 32)."""
    metric: str
    """Key of `adaskip.benchmarks.scoring.METRICS`."""
    language: str
    """en, zh or code."""
    has_extended: bool = False
    """Whether LongBench-E has an `_e` set of this task."""
    first_line_only: bool = False
    """Only the prediction's first line is scored."""
    chat: bool = True
    """Whether a chat model's template wraps the prompt."""
    min_new_tokens: int = 0
    stop_at_newline: bool = False
    """Generation also ends at a newline token."""
    num_long: int | None = None
    """Records of the LongBench-E set with more than 4000 words, where it is known without the data."""

    def __post_init__(self) -> None:
        if "{context}" not in self.template:
            raise ConfigError(f"task {self.name}: the template has no {{context}}")
        if self.max_new_tokens < 1:
            raise ConfigError(f"task {self.name}: max_new_tokens is {self.max_new_tokens}, it must be at least 1")


def _read_tasks() -> dict[str, TaskSpec]:
    try:
        return {name: TaskSpec(name=name, **fields) for name, fields in load_yaml("longbench")["tasks"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"configs/longbench.yaml does not describe tasks: {error}") from None


TASKS: dict[str, TaskSpec] = _read_tasks()
EXTENDED_TASKS: tuple[str, ...] = tuple(name for name, task in TASKS.items() if task.has_extended)


def get_task(name: str) -> TaskSpec:
    """The task called `name`; `trec` and its LongBench-E set `trec_e` share one spec.

    Raises:
        LongBenchError: no such task; the line suggests the nearest names and lists all.
    """
    if name in TASKS:
        return TASKS[name]
    base = name.removesuffix(EXTENDED_SUFFIX)
    if base in EXTENDED_TASKS:
        return TASKS[base]
    if base in TASKS:
        raise LongBenchError(f"LongBench-E has no set of {base!r}; it has: {', '.join(EXTENDED_TASKS)}")
    close = difflib.get_close_matches(base.lower(), TASKS, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise LongBenchError(f"unknown LongBench task {name!r}.{hint} Tasks: {', '.join(TASKS)}")


def set_meant(task: str, extended: bool | None = None) -> str:
    """The set that a task's name means: of `trec` LongBench-E's `trec_e`, unless `extended` is False; of `trec_e` that.

    Raises:
        LongBenchError: no such task.
    """
    spec = get_task(task)
    takes_extended = task not in TASKS or (spec.has_extended and extended is not False)
    return spec.name + EXTENDED_SUFFIX * takes_extended


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
    """The records of a task that count, in file order; a column that a record lacks and nothing needs is None.

    Args:
        task: a LongBench task; `trec_e` means `trec` with `extended=True`.
        source: a folder of jsonl files, a zip archive, `"hub"`, or None for the local Hub cache (see
            `longbench_files.list_sets`).
        min_length: keep records of more than so many words; None keeps all.
        limit: keep the first so many of those; None keeps all.
        extended: take the LongBench-E set `<task>_e`, as the paper does (True), or the plain one (False). None: the
            LongBench-E set where the task and the source have one, else the plain one.

    Raises:
        LongBenchError: unknown task, missing or broken source, a record that lacks a field, or no record left.
    """
    if limit is not None and limit < 1:
        raise LongBenchError(f"limit is {limit}, it must be at least 1")
    spec, file = get_task(task), find_set(task, source, extended)
    if extended is None and file.set_name != (meant := set_meant(task)):
        logger.warning("%s has no %s.jsonl (LongBench-E); taking %s.jsonl", source, meant, file.set_name)
    records = (_checked(record, spec, f"{file}:{number}") for number, record in file.records())
    kept = list(islice((r for r in records if min_length is None or r["length"] > min_length), limit))
    if not kept:
        wanted = "" if min_length is None else f" of more than {min_length} words"
        raise LongBenchError(f"{file} holds no record{wanted}")
    try:
        return as_dataset(kept)
    except (ValueError, OverflowError) as error:  # half a surrogate pair in a text, a length of more than 64 bits
        raise LongBenchError(f"{file} holds what no table can: {error}") from None


def load_both_sets(
    task: str, source: str | Path | None = None, min_length: int | None = PAPER_MIN_LENGTH, limit: int | None = None
) -> Dataset:
    """`load_records` of LongBench-E's set and, behind them, of the plain one those that are not among them, by id or by
    input and context. Of a task that is named as LongBench-E's (`trec_e`), or of which there is one set, that one."""
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
    """The sets of a task that `source` has, LongBench-E's first; of `trec_e` that one.

    Raises:
        LongBenchError: unknown task, a missing or broken source, or no such set in it.
    """
    sets = list_sets(source)
    found = [name for name in dict.fromkeys((set_meant(task), task)) if name in sets]
    return tuple(found) or (find_set(task, source).set_name,)


def _text_of(record: Mapping[str, Any]) -> tuple[str, str]:
    return record["input"], record["context"]


def as_dataset(records: Sequence[Mapping[str, Any]]) -> Dataset:
    """Records in LongBench's format as a table in memory; texts stay as they are, to the last byte."""
    with optional_import():
        from datasets import Dataset, Features, List, Value
    types = {"text": Value("string"), "texts": List(Value("string")), "number": Value("int64")}
    features = Features({name: types[kind] for name, kind in COLUMNS.items()})
    return Dataset.from_list([dict(record) for record in records], features=features)


def _checked(record: dict[str, Any], spec: TaskSpec, place: str) -> dict[str, Any]:
    """The record's columns, once every field the protocol reads is there and of its type."""
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


def build_prompt_ids(
    record: Mapping[str, Any],
    task: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    chat_template: str | None = None,
) -> list[int]:
    """Token ids of a record's prompt, exactly as LongBench builds them.

    A prompt of more than `max_prompt_tokens` loses its middle. The cut is on token ids, but what goes on is the decoded
    text, wrapped and tokenised again: the result may differ from the limit by the wrapper and by tokens at the seam.

    Args:
        record: a record with the fields the task's template names.
        max_prompt_tokens: the model's limit before wrapping (llama 31500, internlm 7500, vicuna 15500).
        chat_template: text with `{prompt}`, or with `{prompt|trim}` for a wrapper that drops the white space around a
            prompt; used only if the task is wrapped at all. None: no wrapper.

    Raises:
        LongBenchError: the record lacks a field, the limit is below 2, or the chat template has no `{prompt}`.
    """
    if max_prompt_tokens < 2:
        raise LongBenchError(f"max_prompt_tokens is {max_prompt_tokens}, it must be at least 2")
    prompt = _cut_middle(_fill_template(record, task), tokenizer, max_prompt_tokens)
    if task.chat and chat_template is not None:
        prompt = _wrap(prompt, chat_template)
    return _tokenise(prompt, tokenizer)


SEAM_TOKENS = 8
"""Last tokens of a prompt that a reference answer is tokenised after."""


def build_reference_ids(
    record: Mapping[str, Any], prompt_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[int]:
    """Token ids of a record's first answer as it would follow the prompt, at most `max_tokens`; none if it is empty.

    A space stands between them unless the prompt ends in white space. The answer is tokenised together with the end of
    the prompt, since some tokenizers put a space before whatever they begin with.
    """
    answer = record["answers"][0].strip()
    if not answer:
        return []
    seam = str(tokenizer.decode(list(prompt_ids[-SEAM_TOKENS:])))
    follows = answer if seam[-1:].isspace() else f" {answer}"
    before, both = (tokenizer(text, add_special_tokens=False).input_ids for text in (seam, seam + follows))
    if both[: len(before)] != before:  # the seam became another token
        return list(tokenizer(follows, add_special_tokens=False).input_ids)[:max_tokens]
    return list(both[len(before) :])[:max_tokens]


def count_prompt_tokens(record: Mapping[str, Any], task: TaskSpec, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a record's prompt before it is cut and wrapped: what `max_prompt_tokens` limits."""
    return len(_tokenise(_fill_template(record, task), tokenizer))


def _fill_template(record: Mapping[str, Any], task: TaskSpec) -> str:
    try:
        return task.template.format(**record)
    except KeyError as error:
        name = record.get("_id", "?")
        raise LongBenchError(f"record {name} has no field {error}, which the prompt of {task.name} needs") from None


def _cut_middle(prompt: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    ids = _tokenise(prompt, tokenizer)
    if len(ids) <= max_tokens:
        return prompt
    half = max_tokens // 2
    start, end = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return f"{start}{end}"


def _wrap(prompt: str, chat_template: str) -> str:
    # Not str.format: a template may hold other braces.
    if "{prompt|trim}" in chat_template:
        return chat_template.replace("{prompt|trim}", prompt.strip())
    if "{prompt}" not in chat_template:
        raise LongBenchError(f"the chat template has no {{prompt}}: {chat_template!r}")
    return chat_template.replace("{prompt}", prompt)


def _tokenise(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, truncation=False, verbose=False).input_ids)
