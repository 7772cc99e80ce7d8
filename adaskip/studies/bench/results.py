"""A benchmark's result file: a manifest, and one record for each cell and round. Whole rounds only.

The file is written whole after every round, so that an interrupted run loses at most the round it was in, and the
same command continues behind the last one saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaskip.common.files import write_text_atomic
from adaskip.studies.bench.cells import Cell, Workload

FORMAT = "adaskip-bench/1"
Record = dict[str, Any]


@dataclass
class Result:
    """What is known of one benchmark.

    manifest: `identity` (what must not change), and what describes model, machine and code. records: each with
    workload, cell, round and what the cell measured, or `error` if its memory was not enough. limits: least times of
    cells on the device's measured ceilings. entries: medians over the rounds, made from the records.
    """

    path: Path
    manifest: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    limits: list[Record] = field(default_factory=list)
    entries: list[Record] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def device(self) -> str:
        return self.path.parent.name

    @property
    def study(self) -> str:
        return self.manifest["identity"]["study"]

    def rounds_of(self, workload: Workload) -> int:
        """How many rounds of `workload` are saved."""
        return max((record["round"] for record in self.of(workload)), default=0)

    def of(self, workload: Workload, cell: Cell | None = None) -> list[Record]:
        """The good records of a workload, or of one cell of it, by round."""
        return [
            record
            for record in self.records
            if "error" not in record
            and record["workload"] == vars(workload)
            and (cell is None or record["cell"] == cell.to_dict())
        ]

    def failure(self, workload: Workload) -> Record | None:
        """Which cell in which round lacked memory; None if none did."""
        errors = (record for record in self.records if "error" in record)
        return next((record for record in errors if record["workload"] == vars(workload)), None)

    def failed(self, workload: Workload) -> bool:
        """Whether the memory was not enough for `workload`; whole rounds before that still count."""
        return self.failure(workload) is not None

    @property
    def workloads(self) -> list[Workload]:
        """Those with records, in order."""
        return list(dict.fromkeys(Workload(**record["workload"]) for record in self.records))

    def cells(self, workload: Workload) -> list[Cell]:
        """The cells with good records, in the order of the first round."""
        return list(dict.fromkeys(Cell(**record["cell"]) for record in self.of(workload)))

    def limit(self, workload: Workload, cell: Cell) -> Record | None:
        """`ttft_s` and `tpot_s` at the measured ceilings, where they are known."""
        same = {"workload": vars(workload), "cell": cell.to_dict()}
        return next((entry for entry in self.limits if same.items() <= entry.items()), None)

    def save(self) -> None:
        parts = {
            "manifest": json.dumps(self.manifest, indent=1),
            **{name: _lines(getattr(self, name)) for name in ("entries", "limits", "records")},
        }
        body = ",\n".join(f'"{name}": {text}' for name, text in parts.items())
        write_text_atomic(self.path, f'{{"format": "{FORMAT}",\n{body}}}\n')


def open_result(path: Path, manifest: Mapping[str, Any], *, fresh: bool) -> Result:
    """The saved result at `path` to go on with, or a new one.

    Raises ValueError if what is saved there was measured in another way.
    """
    if fresh or not path.is_file():
        return Result(path, dict(manifest))
    saved = load_result(path)
    asked, found = (json.loads(json.dumps(m["identity"])) for m in (manifest, saved.manifest))
    if different := sorted(name for name in asked.keys() | found.keys() if asked.get(name) != found.get(name)):
        name = different[0]
        raise ValueError(
            f"{path} holds a measurement with another {', '.join(different)} (there {found.get(name)!r}, now "
            f"{asked.get(name)!r}): give --name for a result of its own or --fresh to measure anew"
        )
    commits = [*saved.manifest["git_commits"], *manifest["git_commits"]]
    saved.manifest = {**saved.manifest, **manifest, "git_commits": list(dict.fromkeys(commits))}
    return saved


def load_result(path: Path) -> Result:
    """Read one result; ValueError if the file is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not a benchmark's result: its format is not {FORMAT}")
    return Result(path, **content)


def load_results(folder: Path) -> list[Result]:
    """Every benchmark result in the device folders below `folder`, by device and name; other files are passed over."""
    begin = f'{{"format": "{FORMAT}"'
    paths = sorted(folder.glob("*/*.json"))
    return [load_result(path) for path in paths if path.read_text(encoding="utf-8").startswith(begin)]


def _lines(records: Iterable[Record]) -> str:
    """A JSON list with one record a line."""
    return "[\n" + ",\n".join(json.dumps(record, allow_nan=False) for record in records) + "\n]"
