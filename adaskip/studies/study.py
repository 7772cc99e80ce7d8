"""What all studies share: options, and the steps from measurements to findings, tables and figures.

A study measures and saves what is missing; findings, tables and figures are made from the saved files alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pandas import DataFrame

from adaskip.benchmarks.protocol import BENCHMARKS
from adaskip.common.commands import study
from adaskip.common.files import write_text_atomic
from adaskip.common.options import option
from adaskip.common.paths import given_or_default
from adaskip.common.pipe_table import pipe_table
from adaskip.runs.cells import MODELS
from adaskip.runs.config import MODEL_HELP, DataConfig, RunConfig, check_model
from adaskip.strategies import FULL

ALL = "all"
"""Stands for the paper's three models."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig(DataConfig):
    """The options of every study of models and tasks.

    Class attributes: `folder`, the default output folder, in the folder of the benchmark's results unless it contains a
    `/`; `extra_models`, further names that `--models` accepts.
    """

    models: tuple[str, ...] = option(f"{MODEL_HELP}; {ALL}: {', '.join(MODELS)}", MODELS, aliases=["--model"])
    output_dir: str | None = option("output folder; default: a folder of the study in results/")
    draw_only: bool = option("run no model; make tables and figures of the saved results", False)

    folder: ClassVar[str]
    extra_models: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [name for given in self.models for name in (MODELS if given == ALL else (given,))]
        object.__setattr__(self, "models", tuple(dict.fromkeys(names)))
        for name in self.models:
            if name not in self.extra_models:
                check_model(self, name)
        if self.checkpoint is not None and (len(self.models) != 1 or self.models[0] in self.extra_models):
            raise ValueError("--checkpoint needs exactly one model in --models")

    @property
    def out_dir(self) -> Path:
        results = BENCHMARKS.find(str(self.benchmark)).results_dir()
        return given_or_default(self.output_dir, self.folder if "/" in self.folder else f"{results}/{self.folder}")

    def run_config(self, model: str, *, phase: str, strategy: str = FULL, **options: Any) -> RunConfig:
        """The configuration of a run of one model: the options of the study, overridden by those given here."""
        shared = {field.name: getattr(self, field.name) for field in fields(DataConfig)}
        shared |= {"output_dir": str(self.out_dir / "runs")}
        return RunConfig(**{**shared, **options}, model=model, phase=phase, strategy=strategy)


def read_json(path: Path) -> dict[str, Any]:
    """A saved JSON object; empty if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_saved(path: Path) -> dict[str, Any]:
    """A saved JSON object; ValueError if there is none."""
    if not (saved := read_json(path)):
        raise ValueError(f"{path} does not exist; leave out --draw-only")
    return saved


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], fields: Iterable[str], where: object) -> None:
    """Raise ValueError if the results in `where` were measured on what differs in one of the `fields`."""
    if other := [name for name in fields if saved.get(name) != now[name]]:
        raise ValueError(f"{where} was measured with other {', '.join(other)}; give another --output-dir")


@dataclass(frozen=True)
class Claim:
    """A claim, and the number of tested cases in which it holds."""

    text: str
    holding: int
    cases: int
    evidence: str

    @property
    def verdict(self) -> str:
        if self.cases == 0:
            return "not tested"
        if self.holding == self.cases:
            return "holds"
        return "does not hold" if self.holding == 0 else f"holds in {self.holding} of {self.cases} cases"

    @property
    def sentence(self) -> str:
        return f"{self.text}: {self.verdict}. {self.evidence}"


@dataclass(frozen=True)
class Findings:
    """The findings of a study: claims, and a table of text cells.

    numbers: those of the table, unrounded. sources: what they were measured on. summary: a line printed after the
    claims. closing: paragraphs below the table. kinds: the files to write, into `subfolder` of the output folder.
    """

    name: str
    title: str
    notes: Sequence[str]
    claims: Sequence[Claim]
    table: DataFrame
    numbers: Any = None
    sources: dict[str, Any] = field(default_factory=dict)
    has_figure: bool = True
    summary: str = ""
    closing: Sequence[str] = ()
    kinds: Sequence[str] = ("md", "csv", "json")
    subfolder: str = ""

    def as_markdown(self) -> str:
        claims = "\n".join(f"- **{c.text}: {c.verdict}.** {c.evidence}" for c in self.claims)
        figure = f"![{self.title}]({self.name}.png)" if self.has_figure else ""
        table = pipe_table(list(self.table.columns), self.table.to_numpy().tolist())
        parts = [f"# {self.title}", *self.notes, figure, claims, table, *self.closing]
        return "\n\n".join(filter(None, parts)) + "\n"

    def as_json(self) -> str:
        claims = [{**vars(claim), "verdict": claim.verdict} for claim in self.claims]
        content = {"name": self.name, "title": self.title, "claims": claims}
        content |= {"numbers": self.numbers, "sources": self.sources}
        return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, out_dir: Path) -> list[Path]:
        """Write `<name>.md`, `.csv` and `.json`, as far as `kinds` contains them."""
        texts = {
            "md": self.as_markdown,
            "csv": lambda: self.table.to_csv(index=False, lineterminator="\n"),
            "json": self.as_json,
        }
        folder = out_dir / self.subfolder
        return [write_text_atomic(folder / f"{self.name}.{kind}", texts[kind]()) for kind in self.kinds]


Config = TypeVar("Config", bound=Any)
Saved = TypeVar("Saved")


@dataclass(frozen=True)
class Study(Generic[Config, Saved]):
    """The steps of a study; `run` calls them in order.

    measure: measures and saves what is missing; a stopped study continues. read: reads the saved files; ValueError if
    there are none. find, draw: make findings and figures of what was read.
    """

    config: type[Config]
    measure: Callable[[Config], None]
    read: Callable[[Config], Saved]
    find: Callable[[Saved, Config], list[Findings]]
    draw: Callable[[Saved, Config], list[Path]] = lambda saved, config: []

    def main(self, doc: str | None) -> int:
        """Run the study as a script; returns the exit code. doc: the docstring of the script."""
        return study(doc, self.config, self.run)

    def run(self, config: Config) -> int:
        if not config.draw_only:
            if config.threads is not None:
                torch.set_num_threads(config.threads)
            self.measure(config)
        found, written = self.write(config)
        for findings in found:
            lines = [findings.title, *(f"- {claim.sentence}" for claim in findings.claims), findings.summary]
            print("\n".join(filter(None, lines)) if findings.claims else findings.as_markdown())
        print("wrote " + ", ".join(path.name for path in written) + f" to {config.out_dir}")
        return 0

    def write(self, config: Config) -> tuple[list[Findings], list[Path]]:
        """Make findings and figures of the saved files; returns the findings and all written paths."""
        saved = self.read(config)
        found = self.find(saved, config)
        return found, [path for findings in found for path in findings.write(config.out_dir)] + self.draw(saved, config)


def span(values: Sequence[float]) -> str:
    """`0.31 (0.02 to 0.58)`: mean and range."""
    if not len(values):
        return "none"
    mean = sum(values) / len(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"
