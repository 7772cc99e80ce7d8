"""What a benchmark is: tasks with records, how a record becomes a prompt, and the score of an answer.

The runs do the rest: they cut, wrap and tokenise prompts, generate, save and continue. A benchmark is an immutable
value without model or tokenizer.
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
"""The `data_dir` that asks for a download; without it no benchmark touches the network."""
DEFAULT = "longbench"
"""The paper's benchmark, where none is named."""
TASK_NAME = re.compile(r"[A-Za-z0-9][\w-]*")

Record = Mapping[str, Any]


class BenchmarkError(ValueError):
    """A task, a record or a source of data is not what a benchmark asks for."""


class MissingDataError(BenchmarkError):
    """The benchmark's data is not on this machine."""


def benchmark_option(help: str, default: Any) -> Any:
    """A field of a benchmark that users may set on the command line, `--benchmark-option NAME=VALUE`.

    Its type is bool, int, float or str, or one of them and None.
    """
    return own_option(help, default)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the records of a task share."""

    name: str
    """Also that of the files of its records."""
    max_new_tokens: int
    """The cap on generated tokens."""
    metric: str
    """What the score is called."""
    template: str = ""
    """The prompt, with fields of a record in braces; empty where the benchmark overrides `prompt`."""
    chat: bool = True
    """Whether a chat model's template wraps the prompt."""
    min_new_tokens: int = 0
    stop_at_newline: bool = False
    """Generation also ends at a newline token."""
    num_records: int | None = None
    """How many are scored, where that is known without the data; for estimates."""

    def __post_init__(self) -> None:
        if not TASK_NAME.fullmatch(self.name):
            raise BenchmarkError(f"task {self.name!r} cannot be called so; allowed: {TASK_NAME.pattern}")
        if self.max_new_tokens < 1:
            raise BenchmarkError(f"task {self.name}: max_new_tokens is {self.max_new_tokens}, it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """Tasks with records. Its fields are options: each has a default, and `data_dir` is where its data is.

    A record is a dict that JSON can hold. `_id` names it within its task, `answers` is a list of at least one
    reference, `length` its number of words, which estimates count in its prompt where it has none. The rest is the
    benchmark's own.

    Class attributes:

    name: as in `--benchmark NAME`. label: as in texts, if it is written otherwise.
    tasks: the first one calibrates, and all are run in every phase, unless `configs/phases.yaml` has a protocol of it.
    kept: fields of a record that are saved beside its answer because `score` takes them.
    models: the names of the models that it brings along, all that `--model` takes then; they read bare prompts.
    in_paper: whether the paper publishes scores of it, which tables show beside ours.
    """

    name: ClassVar[str]
    label: ClassVar[str] = ""
    tasks: ClassVar[tuple[Task, ...]]
    kept: ClassVar[tuple[str, ...]] = ()
    models: ClassVar[tuple[str, ...]] = ()
    in_paper: ClassVar[bool] = False

    @abstractmethod
    def records(self, task: str, limit: int | None = None) -> Sequence[Record]:
        """The records that a run is scored on, always in the same order; at least the first `limit` of them.

        Raises:
            MissingDataError: the data is not on this machine.
        """

    @abstractmethod
    def score(self, task: str, prediction: str, references: Sequence[str], **kept: Any) -> SampleScore | float:
        """The score of one answer, in [0, 1]. kept: the record's fields that `kept` names."""

    def unscored_records(self, task: str) -> Sequence[Record]:
        """Records that no run is scored on: importance is measured on them, and `calibrated` searches on them."""
        raise BenchmarkError(
            f"benchmark {self.name} has no records that no run is scored on; --profile takes a profile made elsewhere"
        )

    def calibration_records(self, task: str, limit: int) -> Sequence[Record]:
        """What importance is measured on."""
        return self.unscored_records(task)[:limit]

    def num_records(self, task: str) -> int | None:
        """How many records of a task are scored, as known without the data."""
        return self.task(task).num_records

    @property
    def unscored_words(self) -> int | None:
        """Most words of a record that no run is scored on; None where that is not known."""
        return None

    @property
    def download_bytes(self) -> int:
        """Size of the data that `data_dir=hub` downloads, for estimates."""
        return 0

    def prompt(self, task: str, record: Record) -> str:
        """The text that a model is given, before it is cut and wrapped."""
        try:
            return self.task(task).template.format(**record)
        except KeyError as error:
            name = record.get("_id", "?")
            raise BenchmarkError(f"record {name} has no field {error}, which the prompt of {task} needs") from None

    def reference(self, task: str, record: Record) -> str:
        """The reference answer whose loss is taken, as text that follows the prompt."""
        return record["answers"][0]

    def evaluate(self, task: str, records: Sequence[Record], manifest: Mapping[str, Any]) -> Evaluation:
        """The scores of a run's records (`prediction`, `references` and what `kept` names), and of their set.

        manifest: of the run.
        """
        samples = []
        for record in records:
            score = self.score(task, record["prediction"], record["references"], **self.kept_of(record))
            if not isinstance(score, SampleScore):
                score = SampleScore(score, not record["prediction"].strip())
            samples.append(score)
        return Evaluation(TaskScore.of(task, self.task(task).metric, samples))

    def fidelity(self, task: str, prediction: str, full_answer: str, **kept: Any) -> float:
        """How alike an answer and the full model's answer to the same record are, in [0, 1]: its score with the full
        model's answer as the reference; 1 for equal answers, 0 for an empty answer and one that is not."""
        ours, full = prediction.strip(), full_answer.strip()
        if ours == full or not ours or not full:
            return float(ours == full)
        score = self.score(task, ours, [full], **kept)
        return score.score if isinstance(score, SampleScore) else score

    def contexts(self, task: str, manifest: Mapping[str, Any]) -> Mapping[str, str] | None:
        """The texts that the records of a run are about, by `_id`; None where there are none, or none at hand.

        The first sentence of each is a trivial answer, whose score is a floor.
        """
        return None

    def score_version(self) -> str | None:
        """What scores depend on besides the records; None: saved scores are never used again."""
        return None

    def kept_of(self, record: Record) -> dict[str, Any]:
        """The fields of a record that `kept` names; of an older record those that it has."""
        return {name: record[name] for name in self.kept if name in record}

    def task(self, name: str) -> Task:
        """The task called `name`; ValueError with the nearest and all names if there is none."""
        by_name = {task.name: task for task in self.tasks}
        return by_name[check_choice(f"task of {self.name}", name, by_name)]

    def check_tasks(self, names: Sequence[str]) -> None:
        """ValueError unless these tasks can be run together."""
        for name in names:
            self.task(name)

    @property
    def options(self) -> dict[str, Any]:
        """Its fields, but for `data_dir`: a run's manifest holds them, and its answers are scored with them."""
        return {name: value for name, value in asdict(self).items() if name != "data_dir"}

    def describe(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Further fields of a run's manifest."""
        return {}

    @classmethod
    def results_dir(cls) -> str:
        """Where results go if no folder is given."""
        return f"results/{cls.name}"

    @classmethod
    def checkpoint(cls, model: str) -> Path | None:
        """The weights of a model that it brings along; None of any other."""
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
    """Make a benchmark known by its name to the command line and the tables; also a decorator.

    Put it above `@dataclass(frozen=True, kw_only=True)`. To register the same class again changes nothing.

    Raises:
        ValueError: it is not a concrete, frozen dataclass derived from `Benchmark`, lacks a declaration, has a field
            without a default, or has the name of another benchmark.
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
