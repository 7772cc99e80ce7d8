"""The result file of a benchmark, and the numbers reported from it.

The file has a manifest and the records of each round in the order in which its cells ran, one a cell, several of the
full model. It is written after every round, so that a stopped run loses at most its current round. Reported are medians
over the rounds, and medians of the ratios of each round, with a 95 % bootstrap interval over the rounds. The ideal time
is the full model's time without the skipped sublayers' share, which is measured in the same run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaskip.common.files import write_text_atomic
from adaskip.common.intervals import Estimate, median_estimate
from adaskip.strategies import FULL
from adaskip.strategies.adaskip import LEARNING_WINDOW
from adaskip.studies.bench.settings import BREAKDOWN, COMPARISONS, EAGER, WINDOWLESS, Cell, Workload, weights_of

FORMAT = "adaskip-bench/1"
GENERATION_TOKENS = 256
"""Length of the generation for which the cost of the learning window is reported."""
WINDOW_STEPS = LEARNING_WINDOW + 1
"""Decode steps that the window affects: its own, and the one after it."""
NAMES = {"prefill": "ttft_s", "decode": "tpot_s"}
Record = dict[str, Any]


@dataclass
class Result:
    """One benchmark.

    manifest: `identity` (what must not change), and a description of model, machine and code. records: workload, cell,
    round and the measurements, or `error` if memory was insufficient. limits: minimum times of cells at the measured
    ceilings of the device. entries: medians over the rounds, made from the records.
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
    def identity(self) -> dict[str, Any]:
        return self.manifest["identity"]

    @property
    def weights(self) -> str:
        """`random`, `testbed` or `checkpoint`."""
        return weights_of(self.identity)

    @property
    def study(self) -> str:
        return self.identity["study"]

    @property
    def keep_kv(self) -> bool:
        """Whether every strategy skips only while the prompt is read."""
        return self.identity.get("keep_kv", False)

    @property
    def workloads(self) -> list[Workload]:
        """The workloads with records, in order."""
        return list(dict.fromkeys(Workload(**record["workload"]) for record in self.records))

    def of(self, workload: Workload, cell: Cell | None = None) -> list[Record]:
        """The valid records of a workload, or of one of its cells, by round."""
        wanted = {"workload": vars(workload), **({} if cell is None else {"cell": vars(cell)})}
        return [record for record in self.records if "error" not in record and wanted.items() <= record.items()]

    def cells(self, workload: Workload) -> list[Cell]:
        """The cells with valid records, in the order of the first round."""
        return list(dict.fromkeys(Cell(**record["cell"]) for record in self.of(workload)))

    def rounds_of(self, workload: Workload) -> int:
        """Number of saved rounds of `workload`."""
        return max((record["round"] for record in self.of(workload)), default=0)

    def has(self, workload: Workload, rounds: int) -> bool:
        """Whether nothing is left to measure: all rounds are saved, or the workload ran out of memory."""
        return self.failure(workload) is not None or self.rounds_of(workload) >= rounds

    def failure(self, workload: Workload) -> Record | None:
        """The record of the cell and round that ran out of memory; None if none did. Earlier rounds count."""
        failed = (r for r in self.records if "error" in r and r["workload"] == vars(workload))
        return next(failed, None)

    def limit(self, workload: Workload, cell: Cell) -> Record | None:
        """`ttft_s` and `tpot_s` at the measured ceilings; None if unknown."""
        same = {"workload": vars(workload), "cell": vars(cell)}
        return next((entry for entry in self.limits if same.items() <= entry.items()), None)

    def save(self) -> None:
        """Make the entries and write the file: JSON with one record per line."""
        self.entries = entries_of(self)
        parts = {"manifest": json.dumps(self.manifest, indent=1)}
        for name in ("entries", "limits", "records"):
            lines = ",\n".join(json.dumps(record, allow_nan=False) for record in getattr(self, name))
            parts[name] = f"[\n{lines}\n]"
        body = ",\n".join(f'"{name}": {text}' for name, text in parts.items())
        write_text_atomic(self.path, f'{{"format": "{FORMAT}",\n{body}}}\n')


def open_result(path: Path, manifest: Mapping[str, Any], workloads: Iterable[Workload], *, fresh: bool) -> Result:
    """The saved result at `path`, to be continued, or a new one.

    Raises ValueError if the saved result has another configuration. One with all rounds of the `workloads`, to which
    nothing is added, may be older and say less of it.
    """
    if fresh or not path.is_file():
        return Result(path, dict(manifest))
    saved = load_result(path)
    asked, found = (json.loads(json.dumps(m["identity"])) for m in (manifest, saved.manifest))
    if all(saved.has(workload, manifest["rounds"]) for workload in workloads) and _says_part_of(found, asked):
        return saved
    if different := sorted(name for name in asked.keys() | found.keys() if asked.get(name) != found.get(name)):
        name = different[0]
        raise ValueError(
            f"{path} holds a measurement with another {', '.join(different)} (there {found.get(name)!r}, now "
            f"{asked.get(name)!r}): give another --name, or --fresh to measure again"
        )
    commits = [*saved.manifest["git_commits"], *manifest["git_commits"]]
    saved.manifest = {**saved.manifest, **manifest, "git_commits": list(dict.fromkeys(commits))}
    return saved


def _says_part_of(found: Any, asked: Any) -> bool:
    """Whether everything that the configuration `found` says is in `asked`."""
    if isinstance(found, dict) and isinstance(asked, dict):
        return all(name in asked and _says_part_of(value, asked[name]) for name, value in found.items())
    return found == asked


def what_failed(record: Record) -> str:
    """The cell, or number of cells at once, for which the memory was not enough."""
    return f"{record['in_turns']} cells in turns" if "in_turns" in record else Cell(**record["cell"]).label


def load_result(path: Path) -> Result:
    """Read a result; ValueError if the file is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not a benchmark's result: its format is not {FORMAT}")
    return Result(path, **content)


def load_results(folder: Path) -> list[Result]:
    """All benchmark results in the device folders of `folder`, by device and name; other files are ignored."""
    begin = f'{{"format": "{FORMAT}"'
    paths = sorted(folder.glob("*/*.json"))
    return [load_result(path) for path in paths if path.read_text(encoding="utf-8").startswith(begin)]


def time_of(record: Record, phase: str) -> float:
    """Time to the first token (or of the prefill, if nothing is decoded), or mean time of a decode step."""
    if phase == "decode":
        return statistics.fmean(record["steps_s"])
    return record["prefill_s"] if "prefill_s" in record else record["ttft_s"]


def ratio(result: Result, workload: Workload, one: Cell, other: Cell, phase: str = "prefill") -> Estimate:
    """The median over the rounds of the time of `one` / that of `other`."""
    return median_of_rounds((number, a / b) for number, a, b in _times(result, workload, one, other, phase))


def slowdown(result: Result, workload: Workload, cell: Cell, phase: str) -> Estimate:
    """The median over the rounds of the time of `cell` / that of the full model beside it."""
    times = _times(result, workload, full_of(cell), cell, phase)
    return median_of_rounds((number, ours / full) for number, full, ours in times)


def _times(
    result: Result, workload: Workload, one: Cell, other: Cell, phase: str
) -> Iterator[tuple[int, float, float]]:
    """(round, time of `one`, time of `other`) for each run of `other`.

    The time of `one` is the mean of its last run before and its first after that of `other` in the same round.
    """
    places: dict[tuple[int, Cell], list[tuple[int, float]]] = {}
    for place, record in enumerate(result.of(workload)):
        if (cell := Cell(**record["cell"])) in (one, other):
            places.setdefault((record["round"], cell), []).append((place, time_of(record, phase)))
    for (number, cell), runs in places.items():
        beside = places[number, one]
        for at, time in runs if cell == other else ():
            before, after = [t for place, t in beside if place <= at], [t for place, t in beside if place >= at]
            yield number, statistics.fmean([*before[-1:], *after[:1]]), time


def median_of_rounds(values: Iterable[tuple[int, float]]) -> Estimate:
    """The median over the rounds of (round, value); a round with several values has their mean."""
    rounds: dict[int, list[float]] = {}
    for number, value in values:
        rounds.setdefault(number, []).append(value)
    estimate = median_estimate([statistics.fmean(each) for each in rounds.values()])
    assert estimate is not None, "there are rounds"
    return estimate


def ideal_share(result: Result, workload: Workload, cell: Cell, phase: str) -> float | None:
    """The share of the full model's time that the sublayers skipped by a cell take; None without a breakdown.

    For decoding, medians over the steps are used, as in the breakdown.
    """
    timed = result.of(workload, Cell(BREAKDOWN))
    if not timed or cell.mode != EAGER:
        return None
    if (skipped := result.of(workload, cell)[0].get(f"{phase}_shares")) is None:
        return 0.0
    shares = []
    for record in timed:
        spent = record[f"{phase}_sublayers_s"]
        saved = sum(share * s for kind in spent for share, s in zip(skipped[kind], spent[kind], strict=True))
        whole = record["ttft_s"] if phase == "prefill" else statistics.median(record["steps_s"])
        shares.append(saved / whole)
    return statistics.median(shares)


def realised(result: Result, workload: Workload, cell: Cell, phase: str) -> Estimate | None:
    """Saving / ideal saving; None if nothing is skipped, or the times of sublayers are unknown."""
    if not (share := ideal_share(result, workload, cell, phase)):
        return None
    times = _times(result, workload, full_of(cell), cell, phase)
    return median_of_rounds((number, (1 - ours / full) / share) for number, full, ours in times)


def full_of(cell: Cell) -> Cell:
    """The full model in the same mode."""
    return Cell(FULL, mode=cell.mode)


def entries_of(result: Result) -> list[Record]:
    """The reported numbers of each cell of a study of strategies; by workload, the full model first."""
    cells = [] if result.study not in COMPARISONS else [(w, cell) for w in result.workloads for cell in result.cells(w)]
    entries = [_entry(result, workload, cell) for workload, cell in cells if cell.name != BREAKDOWN]
    names = ("batch_size", "prompt_tokens", "mode", "is_full", "phase", "strategy", "budget")
    return sorted(entries, key=lambda e: [{**e, "is_full": e["strategy"] != FULL}[name] for name in names])


def _entry(result: Result, workload: Workload, cell: Cell) -> Record:
    limit, records = result.limit(workload, cell) or {}, result.of(workload, cell)
    seconds = {phase: statistics.median(time_of(record, phase) for record in records) for phase in NAMES}
    entry: Record = {
        **{"phase": cell.phase, "strategy": cell.name, "budget": cell.sublayers, "mode": cell.mode},
        **{**vars(workload), "rounds": result.rounds_of(workload)},
        **{"ttft_s": seconds["prefill"], "tpot_s": seconds["decode"]},
        "prefill_tokens_per_s": workload.batch_size * workload.prompt_tokens / seconds["prefill"],
        "decode_tokens_per_s": workload.batch_size / seconds["decode"],
        **{name: records[-1][name] for name in ("kv_bytes", "peak_memory_bytes")},
    }
    for phase, name in NAMES.items():
        speedup, saved = ratio(result, workload, full_of(cell), cell, phase), realised(result, workload, cell, phase)
        share = ideal_share(result, workload, cell, phase)
        entry[f"speedup_{phase}"] = speedup.value
        entry[f"speedup_{phase}_interval"] = [speedup.low, speedup.high]
        entry[f"ideal_{name}"] = None if share is None else seconds[phase] * speedup.value * (1 - share)
        entry[f"realised_{phase}"] = None if saved is None else saved.value
        entry[f"realised_{phase}_interval"] = None if saved is None else [saved.low, saved.high]
        entry[f"limit_{name}"] = limit.get(name)
    return entry


def window_cost(result: Result, workload: Workload, cell: Cell) -> Estimate | None:
    """The relative time that the learning window adds to decoding 256 tokens; None if the answers are shorter than the
    window.

    The bookkeeping of the window ends with the step after it. Only these steps are compared, and the added time is
    divided by 255 mean steps, so that noise in the other steps does not hide it.
    """
    if workload.decode_steps < WINDOW_STEPS:
        return None
    without = Cell(WINDOWLESS, cell.phase, cell.sublayers, cell.mode)
    costs = []
    for ours, plain in zip(result.of(workload, cell), result.of(workload, without), strict=True):
        added = sum(ours["steps_s"][:WINDOW_STEPS]) - sum(plain["steps_s"][:WINDOW_STEPS])
        costs.append((ours["round"], added / (time_of(plain, "decode") * (GENERATION_TOKENS - 1))))
    return median_of_rounds(costs)
