"""Score kept against measured speedup: every strategy and budget a point, and the Pareto front of the points.

Scores come from the runs, times from a benchmark's result file, which is read by its format alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaskip.common.intervals import Estimate, geometric_mean, mean, mean_ratio_estimate
from adaskip.strategies.names import SHORT_NAMES
from adaskip.studies.tables.scoreboard import Row, Scoreboard

BENCH_FORMAT = "adaskip-bench/1"
FULL = "full"
NO_SPEED, UNFINISHED = "no speed", "unfinished runs"

Pairs = list[tuple[float, float]]
"""Of each sample: its score, and the full model's."""


@dataclass(frozen=True)
class Point:
    """One strategy at one budget in one phase, on one model or as the mean over all of them (`model` is None)."""

    phase: str
    model: str | None
    strategy: str
    fraction: float
    """Skipped sublayers / all sublayers."""
    speedup: float
    """Full model's time / this one's: TTFT in prefill, TPOT in decode, the whole request end to end."""
    kept: Estimate
    """Score / full model's score, the mean over the phase's tasks."""
    on_front: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "kept": self.kept.as_dict()}


@dataclass(frozen=True)
class Tradeoff:
    """All points of all panels. `missing`: runs without a point, by reason."""

    points: tuple[Point, ...]
    missing: Mapping[str, tuple[str, ...]]

    def panel(self, phase: str, model: str | None) -> list[Point]:
        return [point for point in self.points if (point.phase, point.model) == (phase, model)]

    @property
    def phases(self) -> list[str]:
        return list(dict.fromkeys(point.phase for point in self.points))

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(point.model for point in self.points if point.model is not None))

    @property
    def strategies(self) -> list[str]:
        """In the tables' order."""
        return [name for name in SHORT_NAMES if name != FULL and any(point.strategy == name for point in self.points)]

    def fastest(self, phase: str, model: str | None, keeping: float) -> Point | None:
        """The fastest strategy of a panel that keeps at least so much of the score; None if the full model is."""
        kept = [point for point in self.panel(phase, model) if point.kept.value >= keeping]
        best = max(kept, key=lambda point: point.speedup, default=None)
        return None if best is None or best.strategy == FULL else best


def speed_paths(pattern: str, models: Iterable[str]) -> dict[str, Path]:
    """The result file of each model: `pattern` with its name for {model}.

    Raises:
        ValueError: a file does not exist; the line names the command that makes it.
    """
    paths = {model: Path(pattern.format(model=model)) for model in models}
    absent = [path for path in paths.values() if not path.is_file()]
    if absent:
        commands = " && ".join(f"adaskip bench --figure {path.stem}" for path in absent)
        raise ValueError(f"no measured speeds: {', '.join(map(str, absent))} not found; make them with: {commands}")
    return paths


def read_speeds(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """(phase, strategy, sublayers) -> entry of a benchmark's result, of uncompiled runs of one prompt at a time.

    Raises:
        ValueError: the file is no benchmark's result, lacks the full model, or has a cell at several prompt lengths.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != BENCH_FORMAT:
        raise ValueError(f"{path} is not a benchmark's result: its format is not {BENCH_FORMAT}")
    wanted = [entry for entry in content["entries"] if (entry["mode"], entry["batch_size"]) == ("eager", 1)]
    speeds = {(entry["phase"], entry["strategy"], entry["budget"]): entry for entry in wanted}
    if len(speeds) < len(wanted):
        raise ValueError(f"{path} has cells at several prompt lengths: give a result with one")
    if _FULL_KEY not in speeds:
        raise ValueError(f"{path} has no entry of the full model; finish it with: adaskip bench --figure {path.stem}")
    return speeds


_FULL_KEY = ("", FULL, 0)


def find_tradeoff(board: Scoreboard, speed_pattern: str) -> Tradeoff:
    """The points of every model that was run, and of their mean.

    Raises:
        ValueError: a model's speeds are missing, or nothing has both a score and a speed.
    """
    phases = list(board.paper.tables)
    models = [model for model in board.models if any(row.model == model for row in board.runs)]
    speeds = {model: read_speeds(path) for model, path in speed_paths(speed_pattern, models).items()}
    points: list[Point] = []
    missing: dict[str, list[str]] = {NO_SPEED: [], UNFINISHED: []}
    for phase in phases:
        found: dict[tuple[str, float], dict[str, tuple[float, list[Pairs]]]] = {}
        for model in models:
            panel = _measured(board, phase, model, speeds[model], missing)
            points += _with_front([_point(phase, model, *key, speed, kept) for key, (speed, kept) in panel.items()])
            for key, measured in panel.items():
                found.setdefault(key, {})[model] = measured
        shared = {key: each for key, each in found.items() if len(each) == len(models)}
        points += _with_front([_mean_point(phase, *key, list(each.values())) for key, each in shared.items()])
    if not any(point.strategy != FULL for point in points):
        raise ValueError(f"no strategy has both finished runs and a measured speed in {speed_pattern}")
    return Tradeoff(tuple(points), {reason: tuple(labels) for reason, labels in missing.items() if labels})


def _measured(
    board: Scoreboard, phase: str, model: str, speeds: Mapping[tuple[str, str, int], dict[str, Any]], missing: Any
) -> dict[tuple[str, float], tuple[float, list[Pairs]]]:
    """(strategy, fraction) -> speedup, and scores by task, of one panel; what lacks either is noted in `missing`."""
    full = Row(phase, model, FULL, 0.0)
    steps = _decode_steps(board, full)
    measured: dict[tuple[str, float], tuple[float, list[Pairs]]] = {}
    for row, scored in board.runs.items():
        if (row.phase, row.model) != (phase, model):
            continue
        key = _FULL_KEY if row == full else (phase, row.strategy, scored.run.cell.sublayers)
        pairs = [_pairs(board, row, task) for task in board.tasks(phase)]
        complete = [each for each in pairs if each]
        if len(complete) < len(pairs):
            missing[UNFINISHED].append(scored.run.cell.label)
        elif key not in speeds:
            missing[NO_SPEED].append(scored.run.cell.label)
        else:
            measured[row.strategy, row.fraction] = SPEEDUPS[phase](speeds[_FULL_KEY], speeds[key], steps), complete
    return measured


def _pairs(board: Scoreboard, row: Row, task: str) -> Pairs | None:
    """The scores of one task; None unless it and the full model's have come to their end."""
    ours, full = board.scored(row, task), board.scored(row.full, task)
    if ours is None or full is None or not (ours.records.complete and full.records.complete):
        return None
    return [(score, full.main.by_id[name]) for name, score in ours.main.by_id.items() if name in full.main.by_id]


def _decode_steps(board: Scoreboard, full: Row) -> float:
    """Decode steps of a request: the full model's mean answer."""
    run = board.runs.get(full)
    tokens = [record["new_tokens"] for task in run.tasks.values() for record in task.records.records] if run else []
    return mean(tokens) - 1 if tokens else 0.0


def _request_s(entry: Mapping[str, Any], steps: float) -> float:
    return entry["ttft_s"] + steps * entry["tpot_s"]


SPEEDUPS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], float], float]] = {
    "prefill": lambda full, ours, steps: ours["speedup_prefill"],
    "decode": lambda full, ours, steps: ours["speedup_decode"],
    "e2e": lambda full, ours, steps: _request_s(full, steps) / _request_s(ours, steps),
}


def _point(
    phase: str, model: str | None, strategy: str, fraction: float, speedup: float, kept: Sequence[Pairs]
) -> Point:
    estimate = mean_ratio_estimate(kept)
    assert estimate is not None, "the full model scores above zero in every task"
    return Point(phase, model, strategy, fraction, speedup, estimate)


def _mean_point(phase: str, strategy: str, fraction: float, of_models: Sequence[tuple[float, list[Pairs]]]) -> Point:
    """The geometric mean of the speedups, and what is kept over all tasks of all models."""
    speedup = geometric_mean([speed for speed, _ in of_models])
    return _point(phase, None, strategy, fraction, speedup, [task for _, kept in of_models for task in kept])


def _with_front(points: Sequence[Point]) -> list[Point]:
    """The points of a panel, told which are on its Pareto front: no other is as good in both and better in one."""
    return [Point(**{**vars(point), "on_front": not any(_dominates(q, point) for q in points)}) for point in points]


def _dominates(one: Point, other: Point) -> bool:
    mine, theirs = (one.speedup, one.kept.value), (other.speedup, other.kept.value)
    return mine != theirs and mine[0] >= theirs[0] and mine[1] >= theirs[1]
