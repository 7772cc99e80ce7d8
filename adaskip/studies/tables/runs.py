"""Reads saved runs: a folder per run and budget with a manifest, and a JSON line per sample.

The times of samples are in separate files (`times/<task>.jsonl`) and are joined with the records; records of older runs
contain their times.

A run may be unfinished or damaged. Readable records are used; missing or invalid ones are reported, never guessed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adaskip.benchmarks.protocol import BENCHMARKS, DEFAULT, Benchmark, build_benchmark
from adaskip.common.paths import default_path
from adaskip.common.plugins import PLUGINS
from adaskip.runs.cells import Cell, parse_run_name, run_name
from adaskip.runs.folder import RunFolder

MANIFESTS = "*-sublayers/manifest.json"
"""Manifests of a run, in its folder."""
ANY = "*"
"""Matches every run name in a pattern."""
FOLDER_NAME = re.compile(r"(\d+)-sublayers")
REQUIRED_FIELDS = ("id", "index", "prediction", "references")
REQUIRED_IN_MANIFEST = ("tasks", "num_layers", "checkpoint", "dtype", "device")
PROTOCOL = (
    *("benchmark", "benchmark_options", "weights_fingerprint", "dtype", "chat_template", "max_prompt_tokens"),
    *("templates_fingerprint", "stop_token_ids", "stop_strings", "min_length", "sets", "max_new_tokens"),
)
"""Manifest fields that must be equal to compare the answers of two runs; older manifests lack some."""

Record = dict[str, Any]


class ResultsError(ValueError):
    """Saved results are missing or invalid."""


@dataclass(frozen=True)
class TaskRecords:
    """The records of one task in one run, in the order of the task's samples.

    expected: number of records of the finished run, from its manifest. problems: a line per problem with its files.
    kept: fields that the benchmark needs for scoring besides the references.
    """

    task: str
    records: tuple[Record, ...]
    expected: int
    problems: tuple[str, ...]
    kept: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not self.problems and len(self.records) == self.expected

    @cached_property
    def by_id(self) -> dict[str, Record]:
        return {record["id"]: record for record in self.records}

    @property
    def withheld(self) -> bool:
        """Whether the references are left out (null), as in records that are published without their data."""
        return any(record["references"] is None for record in self.records)

    @cached_property
    def answers_sha256(self) -> str:
        """Digest of the answers, with the ids of their samples."""
        return self._digest("id", "prediction")

    @cached_property
    def references_sha256(self) -> str:
        """Digest of the references."""
        return self._digest("references", *self.kept)

    def _digest(self, *fields: str) -> str:
        values = [[record.get(name) for name in fields] for record in self.records]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@dataclass(frozen=True)
class Run:
    """The saved results of a cell. benchmark: it provides the records and scores them."""

    folder: Path
    cell: Cell
    benchmark: Benchmark
    num_layers: int
    manifest: dict[str, Any]
    tasks: dict[str, TaskRecords]

    @property
    def fraction(self) -> float:
        """Skipped sublayers / all sublayers."""
        return self.cell.sublayers / (2 * self.num_layers)

    def other_protocol(self, other: Run) -> str | None:
        """The first protocol field that differs in `other`, with both values; None if the runs can be compared."""
        for name in PROTOCOL:
            mine, theirs = (run.manifest.get(name) for run in (self, other))
            if isinstance(mine, dict) and isinstance(theirs, dict):  # by task
                mine, theirs = ({task: each[task] for task in mine if task in theirs} for each in (mine, theirs))
            if mine != theirs and name in self.manifest and name in other.manifest:
                return f"{name.replace('_', ' ')} {theirs!r} and not {mine!r}"
        return None


def load_runs(runs_dir: str | Path) -> list[Run]:
    """All runs in `runs_dir`, ordered by name and budget; folders without a manifest are ignored.

    Raises:
        ResultsError: the folder does not exist, it contains no run, or a manifest is invalid.
    """
    root = Path(runs_dir)
    runs = [load_run(manifest.parent) for manifest in root.glob(f"*/{MANIFESTS}")]
    if not runs:
        what = f"no <run name>/{MANIFESTS} below it" if root.is_dir() else "there is no such folder"
        raise ResultsError(f"no results in {root}: {what}{_elsewhere(ANY, root)}")
    return sorted(runs, key=lambda run: (run.cell.run_name, run.cell.sublayers))


def find_run(name: str, runs_dir: str | Path) -> list[Run]:
    """All budgets of the run called `name` (e.g. `llama-EE-PREFILL`), smallest first.

    Raises:
        ResultsError: there is no such run; the message names its folder, or the runs that exist.
    """
    root, wanted = Path(runs_dir), run_name(*parse_run_name(name))
    folders = [path.parent for path in root.glob(f"{wanted}/{MANIFESTS}")]
    if folders:
        return sorted((load_run(folder) for folder in folders), key=lambda run: run.cell.sublayers)
    if elsewhere := _elsewhere(wanted, root):
        raise ResultsError(f"no run {wanted} in {root}{elsewhere}")
    present = sorted({path.parent.parent.name for path in root.glob(f"*/{MANIFESTS}")})
    close = difflib.get_close_matches(wanted, present, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ResultsError(f"no run {wanted} in {root}.{hint} Runs there: {', '.join(present) or 'none'}")


def has_run(name: str, runs_dir: str | Path) -> bool:
    """Whether `runs_dir` contains any budget of the run called `name`, as spelled in folders."""
    return any(Path(runs_dir).glob(f"{name}/{MANIFESTS}"))


def _elsewhere(name: str, root: Path) -> str:
    """A hint at a default folder, other than `root`, that contains runs called `name`; empty if there is none."""
    for benchmark in BENCHMARKS.all().values():
        other = default_path(f"{benchmark.results_dir()}/runs")
        if other.resolve() != root.resolve() and has_run(name, other):
            return f"; there {'are some' if name == ANY else 'is one'} in {other}: give --benchmark {benchmark.name}"
    return ""


def load_run(folder: Path) -> Run:
    """Read one `<run name>/<N>-sublayers` folder."""
    match = FOLDER_NAME.fullmatch(folder.name)
    if match is None:
        raise ResultsError(f"{folder} is not the folder of a run: expected <run name>/<N>-sublayers")
    path, again = folder / "manifest.json", f"delete {folder} and run it again"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON ({error}); {again}") from None
    if missing := [name for name in REQUIRED_IN_MANIFEST if name not in manifest]:
        raise ResultsError(f"{path} lacks {', '.join(missing)}; {again}")
    cell = Cell(*parse_run_name(folder.parent.name), sublayers=int(match[1]))
    benchmark = _benchmark_of(folder, manifest)
    tasks = {task: read_task(folder, task, expected, benchmark.kept) for task, expected in manifest["tasks"].items()}
    return Run(folder, cell, benchmark, int(manifest["num_layers"]), manifest, tasks)


def _benchmark_of(folder: Path, manifest: dict[str, Any]) -> Benchmark:
    """The benchmark of a run; older manifests only tell whether it is the testbed."""
    name = manifest.get("benchmark") or ("testbed" if manifest.get("testbed") else DEFAULT)
    try:
        return build_benchmark(name, **(manifest.get("benchmark_options") or {}))
    except ValueError as error:
        raise ResultsError(f"{folder}: {error}; {PLUGINS} names modules with benchmarks of other packages") from None


def read_task(folder: Path, task: str, expected: int, kept: tuple[str, ...] = ()) -> TaskRecords:
    """Read a task's records and their times, merged or still in parts.

    The first complete record of each sample is used; everything else is reported.
    """
    place = RunFolder(folder)
    path, times_path = place.records_path(task), place.times_path(task)
    files = [file for file in (path, *place.part_paths(task)) if file.exists()]
    problems = [] if files else [f"{path.name} is missing"]
    times = _read_lines(times_path, f"times/{times_path.name}", ("id",), problems) if times_path.exists() else {}
    records: dict[str, Record] = {}
    for file in files:
        records = {**_read_lines(file, file.name, REQUIRED_FIELDS, problems), **records}
    timed = [{**times.get(name, {}), **record} for name, record in records.items()]
    ordered = sorted(timed, key=lambda record: record["index"])
    return TaskRecords(task, tuple(ordered), expected, tuple(problems), kept)


def _read_lines(path: Path, name: str, required: Sequence[str], problems: list[str]) -> dict[str, Record]:
    """The records of a file by id; problems of invalid lines are added to `problems`."""
    records: dict[str, Record] = {}
    *lines, torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            problem = "is not JSON"
        else:
            problem = _problem(record, required, records)
        if problem is None:
            records[record["id"]] = record
        else:
            problems.append(f"{name}, line {number} {problem}")
    if torn:
        problems.append(f"{name}, line {len(lines) + 1} is torn (no end of line)")
    return records


def _problem(record: Any, required: Sequence[str], others: dict[str, Record]) -> str | None:
    if not isinstance(record, dict):
        return "is not a record"
    if missing := [field for field in required if field not in record]:
        return f"lacks {', '.join(missing)}"
    return f"repeats sample {record['id']!r}" if record["id"] in others else None
