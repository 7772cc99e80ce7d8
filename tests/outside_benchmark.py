"""The source of a package outside that brings a benchmark of its own, as its author would write it."""

from __future__ import annotations

from pathlib import Path

MODULE, NAME = "outside_tasks", "outside"
SOURCE = f'''
"""A benchmark of another package: which words come back."""

from dataclasses import dataclass
from random import Random

from adaskip import Benchmark, Task, benchmark_option, register_benchmark

WORDS = [f"w{{number}}" for number in range(60)]


@register_benchmark
@dataclass(frozen=True, kw_only=True)
class OutsideTasks(Benchmark):
    """Lists of words, asked for again."""

    name = "{NAME}"
    tasks = (
        Task(name="repeat", template="{{words}} {{asked}}", max_new_tokens=6, metric="words"),
        Task(name="first-words", template="{{asked}} {{words}}", max_new_tokens=3, metric="words"),
    )
    kept = ("asked",)

    size: int = benchmark_option("words of a list", 5)

    def records(self, task, limit=None):
        return [self._record(task, number) for number in range(4)]

    def unscored_records(self, task):
        return [self._record(task, number) for number in range(4, 30)]

    def score(self, task, prediction, references, asked):
        said = prediction.split()
        return sum(word in said for word in references) / len(references)

    def _record(self, task, number):
        words = Random(f"{{task}} {{number}}").sample(WORDS, self.size)
        return {{"_id": f"{{task}}-{{number}}", "answers": words, "words": " ".join(words), "asked": words[0]}}
'''


def write_module(folder: Path) -> Path:
    """Write the module into `folder`, from which it can be imported."""
    folder.mkdir(exist_ok=True)
    (folder / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
    return folder


def install(folder: Path) -> Path:
    """The same as a package with an entry point, as pip would leave it in a folder of packages."""
    write_module(folder)
    info = folder / "outside_tasks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-tasks\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[adaskip.benchmarks]\nany = {MODULE}:OutsideTasks\n", encoding="utf-8")
    return folder
