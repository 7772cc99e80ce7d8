"""The Benchmark protocol: tasks with records, the prompt of a record, and the score of an answer.

Runs do the rest: they cut, wrap and tokenise prompts, generate, save and continue. A benchmark is an immutable value
without a model or tokenizer.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from adaskip.benchmarks.scores import Evaluation, SampleScore, TaskScore
from adaskip.common.choices import check_choice
from adaskip.common.own_options import own_option
from adaskip.common.plugins import Registry

HUB = "hub"
"""The `data_dir` for downloading the data; without it no benchmark uses the network."""
DEFAULT = "longbench"
"""The benchmark of the paper."""
TASK_NAME = re.compile(r"[A-Za-z0-9][\w-]*")

Record = Mapping[str, Any]


class BenchmarkError(ValueError):
    """A task, a record or the source of data is invalid."""


class MissingDataError(BenchmarkError):
    """The benchmark's data is not on this machine."""


def benchmark_option(help: str, default: Any) -> Any:
    """A field of a benchmark that users may set on the command line, `--benchmark-option NAME=VALUE`.

    Its type is bool, int, float or str, or one of them and None.
    """
    return own_option(help, default)


@dataclass(frozen=True, kw_only=True)
class Task:
    """The settings of a task."""

    name: str
    """As in `--tasks`; the files of its saved records have it, too."""
    max_new_tokens: int
    """Maximum number of generated tokens."""
    metric: str
    """The name of the score."""
    template: str = ""
    """The prompt, with fields of a record in braces; empty if the benchmark overrides `prompt`."""
    chat: bool = True
    """Whether the chat template of a model wraps the prompt."""
    min_new_tokens: int = 0
    stop_at_newline: bool = False
    """Generation also ends at a newline token."""
    num_records: int | None = None
    """Number of scored records if it is known without the data; for estimates."""

    def __post_init__(self) -> None:
        if not TASK_NAME.fullmatch(self.name):
            raise BenchmarkError(f"task {self.name!r} has an invalid name; allowed: {TASK_NAME.pattern}")
        if self.max_new_tokens < 1:
            raise BenchmarkError(f"task {self.name}: max_new_tokens is {self.max_new_tokens}, it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """Tasks with records. Its fields are options: each has a default; `data_dir` is the place of its data.

    A record is a dict that can be written as JSON, with `_id` (unique in its task), `answers` (a list of references),
    optionally `length` (words, for estimates; without it those of the prompt are counted), and any other fields.

    Class attributes:

    name: as in `--benchmark NAME`. label: its spelling in texts; empty: the name.
    tasks: without a protocol in `configs/phases.yaml` every phase runs all of them, and the first one calibrates.
    kept: fields of a record that are saved with its answer as arguments of `score`.
    models: names of small models that come with it; `--model` then takes only these, and prompts are not wrapped.
    in_paper: whether the paper has scores of it, which tables show beside ours.
    """

    name: ClassVar[str]
    label: ClassVar[str] = ""
    tasks: ClassVar[tuple[Task, ...]]
    kept: ClassVar[tuple[str, ...]] = ()
    models: ClassVar[tuple[str, ...]] = ()
    in_paper: ClassVar[bool] = False

    @abstractmethod
    def records(self, task: str, limit: int | None = None) -> Sequence[Record]:
        """The records that runs are scored on, in a fixed order: all, or at least the first `limit`.

        Raises:
            MissingDataError: the data is not on this machine.
        """

    @abstractmethod
    def score(self, task: str, prediction: str, references: Sequence[str], **kept: Any) -> SampleScore | float:
        """The score of one answer, in [0, 1]. kept: the fields of the record named by the attribute `kept`."""

    def unscored_records(self, task: str) -> Sequence[Record]:
        """Records that no run is scored on, for measuring importance and for the search of strategy `calibrated`."""
        raise BenchmarkError(
            f"benchmark {self.name} has no records that no run is scored on; --profile takes a profile made elsewhere"
        )

    def calibration_records(self, task: str, limit: int) -> Sequence[Record]:
        """The records that importance is measured on, at least the first `limit`."""
        return self.unscored_records(task)[:limit]

    def num_records(self, task: str) -> int | None:
        """Number of scored records of a task if it is known without the data."""
        return self.task(task).num_records

    @property
    def unscored_words(self) -> int | None:
        """Maximum number of words of a record that no run is scored on; None if unknown."""
        return None

    @property
    def download_bytes(self) -> int:
        """Size of the data that `data_dir=hub` downloads, for estimates."""
        return 0

    def prompt(self, task: str, record: Record) -> str:
        """The text of the prompt, before it is cut and wrapped."""
        try:
            return self.task(task).template.format(**record)
        except KeyError as error:
            name = record.get("_id", "?")
            raise BenchmarkError(f"record {name} has no field {error}, which the prompt of {task} needs") from None

    def reference(self, task: str, record: Record) -> str:
        """The answer whose loss is measured, as text that follows the prompt."""
        return record["answers"][0]

    def evaluate(self, task: str, records: Sequence[Record], manifest: Mapping[str, Any]) -> Evaluation:
        """Score the saved records of a run: `prediction`, `references` and the `kept` fields. manifest: of the run."""
        samples = []
        for record in records:
            score = self.score(task, record["prediction"], record["references"], **self.kept_of(record))
            if not isinstance(score, SampleScore):
                score = SampleScore(score, not record["prediction"].strip())
            samples.append(score)
        return Evaluation(TaskScore.of(task, self.task(task).metric, samples))

    def fidelity(self, task: str, prediction: str, full_answer: str, **kept: Any) -> float:
        """Similarity, in [0, 1], of an answer and the full model's answer to the same record: the score with the full
        model's answer as the reference; 1 for equal answers, 0 if only one is empty."""
        ours, full = prediction.strip(), full_answer.strip()
        if ours == full or not ours or not full:
            return float(ours == full)
        score = self.score(task, ours, [full], **kept)
        return score.score if isinstance(score, SampleScore) else score

    def contexts(self, task: str, manifest: Mapping[str, Any]) -> Mapping[str, str] | None:
        """The context of each record of a run by `_id`, whose first sentence is a trivial answer; None if unknown."""
        return None

    def score_version(self) -> str | None:
        """Identifies the code of the score; None: unknown, so that saved scores are not reused."""
        return None

    def kept_of(self, record: Record) -> dict[str, Any]:
        """The `kept` fields of a record; records of older runs may lack some."""
        return {name: record[name] for name in self.kept if name in record}

    def task(self, name: str) -> Task:
        """The task called `name`; a ValueError suggests the nearest name and lists all."""
        by_name = {task.name: task for task in self.tasks}
        return by_name[check_choice(f"task of {self.name}", name, by_name)]

    def check_tasks(self, names: Sequence[str]) -> None:
        """Raise ValueError unless these tasks can be run together."""
        for name in names:
            self.task(name)

    @property
    def options(self) -> dict[str, Any]:
        """Its fields except `data_dir`: they are saved in the manifest of a run, and used to score its answers."""
        return {name: value for name, value in asdict(self).items() if name != "data_dir"}

    def describe(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Further fields of the manifest of a run."""
        return {}

    @classmethod
    def results_dir(cls) -> str:
        """Default folder of results."""
        return f"results/{cls.name}"

    @classmethod
    def checkpoint(cls, model: str) -> Path | None:
        """The weights of one of `models`; None for any other model."""
        return None


def _check(cls: type[Benchmark]) -> None:
    tasks = getattr(cls, "tasks", None)
    if not isinstance(tasks, tuple) or not tasks or not all(isinstance(task, Task) for task in tasks):
        raise ValueError(f"{cls.__name__} must declare tasks, a tuple of at least one Task; got {tasks!r}")
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"{cls.__name__} names a task twice: {', '.join(task.name for task in tasks)}")
    if bare := [each.name for each in fields(cls) if each.default is MISSING and each.default_factory is MISSING]:
        raise ValueError(f"{cls.__name__}: fields of a benchmark have defaults; {', '.join(bare)} has none")


BENCHMARKS = Registry(
    "benchmark",
    "adaskip.benchmarks",
    Benchmark,
    _check,
    unique=("name",),
    own=("adaskip.benchmarks.longbench", "adaskip.testbed.benchmark"),
)
B = TypeVar("B", bound=type[Benchmark])


def register_benchmark(cls: B) -> B:
    """Register a benchmark class for the command line and the tables; can be used as a decorator.

    Put it above `@dataclass(frozen=True, kw_only=True)`. Registering the same class again changes nothing.

    Raises:
        ValueError: the class is not a concrete, frozen dataclass derived from `Benchmark`, a declaration is missing or
            invalid, a field has no default, or its name is already taken.
    """
    return BENCHMARKS.register(cls)


def build_benchmark(name: str, **options: Any) -> Benchmark:
    """The benchmark of that name with these options.

    Raises:
        ValueError: there is no such benchmark, or no such option of it.
    """
    cls = BENCHMARKS.find(name)
    known = [each.name for each in fields(cls)]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"benchmark {name} has no option {', '.join(unknown)}; allowed: {', '.join(known) or 'none'}")
    return cls(**options)
