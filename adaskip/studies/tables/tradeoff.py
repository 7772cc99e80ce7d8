"""Quality against measured speedup: a point per strategy and budget, and the Pareto front of the points.

Quality is the share of the full model's score that is kept, fidelity, or the loss above the full model's. Scores come
from the runs, times from result files of `adaskip bench`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from adaskip.common.intervals import Estimate, geometric_mean, mean, mean_of_means_estimate, mean_ratio_estimate
from adaskip.strategies import POP
from adaskip.strategies.names import SHORT_NAMES
from adaskip.strategies.registry import FULL
from adaskip.studies.tables.results import ROW, Results, Row
from adaskip.studies.tables.speeds import FULL_KEY, Speeds, read_speeds, speed_paths, speedup

NO_SPEED, UNFINISHED, NOT_MEASURED = "no speed", "unfinished runs", "not measured"
AT_FLOOR = "scores at their floor"


@dataclass(frozen=True)
class Quality:
    """A quality to draw against speedup. scale: for printing, 100 for per cent. sign: -1 if lower is better."""

    name: str
    title: str
    scale: float
    sign: int
    needs: tuple[str, ...]
    """The columns of the samples that it needs."""
    estimate: Callable[[Sequence[pd.DataFrame]], Estimate | None]
    """Maps the samples of each task to the mean over the tasks."""


KEPT = Quality(
    *("kept", "score kept, per cent", 100, 1, ("score", "full_score")),
    lambda tasks: mean_ratio_estimate([[*zip(task["score"], task["full_score"], strict=True)] for task in tasks]),
)
"""Only for finished runs, without tasks whose scores are at their floor."""
FIDELITY = Quality(
    *("fidelity", "fidelity, per cent", 100, 1, ("fidelity",)),
    lambda tasks: mean_of_means_estimate([[*task["fidelity"]] for task in tasks]),
)
LOSS = Quality(
    *("loss_added", "loss above the full model's, nats per token", 1, -1, ("loss_added",)),
    lambda tasks: mean_of_means_estimate([[*task["loss_added"]] for task in tasks]),
)


@dataclass(frozen=True)
class Tradeoff:
    """All points of a quality.

    points: a row for each strategy, budget, phase and model, and for the mean over all models (`model` is None), with
    `speedup`, `value`, `value_low`, `value_high`, `partial` (of an unfinished run) and `on_front`. missing: runs
    without a point, by reason.
    """

    quality: Quality
    points: pd.DataFrame
    missing: Mapping[str, tuple[str, ...]]

    def panel(self, phase: str, model: str | None) -> pd.DataFrame:
        of_model = self.points["model"].isna() if model is None else self.points["model"] == model
        return self.points[(self.points["phase"] == phase) & of_model]

    @property
    def phases(self) -> list[str]:
        return [*self.points["phase"].unique()]

    @property
    def models(self) -> list[str]:
        return [*self.points["model"].dropna().unique()]

    @property
    def strategies(self) -> list[str]:
        """In the tables' order."""
        return [name for name in SHORT_NAMES if name != FULL and name in set(self.points["strategy"])]

    @property
    def fractions(self) -> list[float]:
        return sorted(self.points.loc[self.points["strategy"] != FULL, "fraction"].unique())

    def fastest(self, phase: str, model: str | None, keeping: float) -> str | None:
        """The fastest strategy of a panel whose value is at least `keeping`; None if it is the full model."""
        kept = self.panel(phase, model).query("value >= @keeping")
        best = kept.loc[kept["speedup"].idxmax(), "strategy"] if len(kept) else FULL
        return None if best == FULL else best


@dataclass(frozen=True)
class Measured:
    """The speedup of a run, and its samples by task. partial: it or the full model's run is unfinished. source: name of
    the result with the speedup. keep_kv: whether the run skips only while the prompt is read.
    """

    speedup: float
    samples: list[pd.DataFrame]
    partial: bool
    source: str
    keep_kv: bool


def find_tradeoffs(results: Results, speed_patterns: Sequence[str], prompt_tokens: int | None = None) -> list[Tradeoff]:
    """The points of every model that was run and of their mean, for each quality in the records.

    speed_patterns: a strategy's speedup is read from the first result that timed it, with `keep_kv` as in the run, over
    the full model there.
    prompt_tokens: prompt length whose speeds are used, if the result files have several.

    Raises:
        ValueError: the speeds of a model are missing, two results have one name, or no run has both a quality and a
            speed.
    """
    run = {model for _, model, *_ in results.runs}
    models = [model for model in results.models if model in run]
    speeds: dict[str, dict[str, Speeds]] = {model: {} for model in models}
    for pattern in speed_patterns:
        for model, path in speed_paths(pattern, models).items():
            if path.stem in speeds[model]:
                raise ValueError(f"--speeds names two results {path.stem} of {model}; rename one, as tables name both")
            speeds[model][path.stem] = read_speeds(path, prompt_tokens)
    found = [_find(results, quality, models, speeds) for quality in (KEPT, FIDELITY, LOSS)]
    found = [each for each in found if each.strategies]
    if not found:
        raise ValueError(f"no strategy has both finished runs and a measured speed in {', '.join(speed_patterns)}")
    return found


def _find(
    results: Results, quality: Quality, models: Sequence[str], speeds: Mapping[str, Mapping[str, Speeds]]
) -> Tradeoff:
    missing: dict[str, list[str]] = {}
    rows = []
    for phase in results.paper.tables:
        found: dict[tuple[str, float], list[Measured]] = {}
        for model in models:
            for row, scored in results.runs.items():
                if row[:2] == (phase, model):
                    measured = _measure(results, quality, row, speeds[model])
                    if isinstance(measured, str):
                        missing.setdefault(measured, []).append(scored.run.cell.label)
                    else:
                        rows.append((*row, *_point(quality, [measured])))
                        found.setdefault(row[2:], []).append(measured)
        shared = {
            key: of_models
            for key, of_models in found.items()
            if len(of_models) == len(models) and len({each.keep_kv for each in of_models}) == 1
        }
        rows += [(phase, None, *key, *_point(quality, of_models)) for key, of_models in shared.items()]
    columns = [*ROW, "speedup", "value", "value_low", "value_high", "partial", "source", "keep_kv"]
    points = pd.DataFrame(rows, columns=columns).astype({"value_low": float, "value_high": float, "partial": bool})
    panels = [panel for _, panel in points.groupby(["phase", "model"], dropna=False)]
    points["on_front"] = pd.concat([_on_front(panel, quality.sign) for panel in panels]) if panels else False
    return Tradeoff(quality, points, {reason: tuple(runs) for reason, runs in missing.items()})


def _measure(results: Results, quality: Quality, row: Row, speeds: Mapping[str, Speeds]) -> Measured | str:
    """The data of a run's point, or the reason why it has none."""
    phase, model, strategy, _ = row
    full = (phase, model, FULL, 0.0)
    cells = {task: results.cell_of[*row, task] for task in results.tasks(phase)}
    final = all(cell.final and results.cell_of[*full, task].final for task, cell in cells.items())
    tasks = [task for task, cell in cells.items() if not (quality is KEPT and cell.at_floor)]
    samples = [results.samples_of[*row, task] for task in tasks if (*row, task) in results.samples_of]
    known = [each.dropna(subset=list(quality.needs)) for each in samples]
    key = FULL_KEY if strategy == FULL else (phase, strategy, results.runs[row].run.cell.sublayers)
    if len(samples) < len(tasks) or (quality is KEPT and not final):
        return UNFINISHED
    if not tasks:
        return AT_FLOOR
    if any(each.empty for each in known):
        return NOT_MEASURED
    if quality.estimate(known) is None:
        return AT_FLOOR
    kept = bool((results.runs[row].run.manifest.get("strategy_options") or {}).get("keep_kv"))
    same = strategy in (FULL, POP.name)  # whether `keep_kv` changes nothing
    having = (name for name, each in speeds.items() if key in each and (same or each[key]["keep_kv"] == kept))
    if (source := next(having, None)) is None:
        return NO_SPEED
    timed = speeds[source]
    answers = [results.samples_of[*full, task]["new_tokens"] for task in cells if (*full, task) in results.samples_of]
    steps = mean([*pd.concat(answers)]) - 1 if answers else 0.0
    return Measured(speedup(phase, timed[key], steps), known, not final, source, kept)


def _point(quality: Quality, of_models: Sequence[Measured]) -> tuple[Any, ...]:
    """The mean over models: geometric for speedups; for the quality over all tasks of all models."""
    fast = geometric_mean([each.speedup for each in of_models]) if len(of_models) > 1 else of_models[0].speedup
    estimate = quality.estimate([task for each in of_models for task in each.samples])
    assert estimate is not None, "where the full model scores nothing, scores are at their floor"
    about = any(each.partial for each in of_models), of_models[0].source, of_models[0].keep_kv
    return fast, estimate.value, estimate.low, estimate.high, *about


def _on_front(panel: pd.DataFrame, sign: int) -> pd.Series:
    """Whether each point of a panel is on its Pareto front: no other is at least as good in both and better in one."""
    points = [(point.speedup, sign * point.value) for point in panel.itertuples()]
    dominated = [any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points) for p in points]
    return pd.Series([not each for each in dominated], index=panel.index)
