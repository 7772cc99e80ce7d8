"""The output of `eval/eval.py`: the scores of every budget and task of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from adaskip.runs.cells import parse_run_name, run_name
from adaskip.strategies.registry import FULL
from adaskip.studies.tables import labels
from adaskip.studies.tables.results import Results, estimate
from adaskip.studies.tables.runs import find_run, has_run
from adaskip.studies.tables.scores import SCORES_FILE, SampleScores, ScoredRun, ScoredTask, score_run


def evaluate(name: str, runs_dir: str | Path, data_dir: str | None = None) -> Results:
    """Score every budget of the run called `name`, and the full model's run if there is one; save the scores beside the
    records.

    data_dir: data of the benchmark, for floors that need contexts.
    """
    model, phase, strategy = parse_run_name(name)
    name_of_full = run_name(model, phase, FULL)
    full = find_run(name_of_full, runs_dir)[0] if has_run(name_of_full, runs_dir) else None
    scored = [score_run(run, full, data_dir=data_dir, fresh=True) for run in find_run(name, runs_dir)]
    return Results(scored if full is None or strategy == FULL else [score_run(full, full, data_dir=data_dir), *scored])


def print_scores(results: Results, name: str, console: Console) -> None:
    """Print tables over all budgets and tasks (scores; fidelity, loss and floors; buckets of length), then warnings,
    and the paths of the scores."""
    model, phase, strategy = parse_run_name(name)
    title, runs = run_name(model, phase, strategy), {row: r for row, r in results.runs.items() if row[2] == strategy}
    scores = _table(title, "per cent, 95 % bootstrap intervals in brackets", "metric")
    for column in ("score", "rouge_score", "samples", "empty", "errors"):
        scores.add_column(column, justify="right")
    caption = "per cent, and nats per token: loss of the reference answer; floor: the best trivial answer's score"
    measures = _table(title, caption, "fidelity", "loss", "loss above full", "floor")
    buckets = _table("by length", "per cent and number of samples, by words of the record", "metric")
    by_length = [task.buckets or {} for scored in runs.values() for task in scored.tasks.values()]
    for column in dict.fromkeys(column for each in by_length for column in each):
        buckets.add_column(column, justify="right")
    for row, scored in runs.items():
        for task, found in scored.tasks.items():
            first = (f"{scored.run.cell.sublayers} of {2 * scored.run.num_layers}", task)
            scores.add_row(*first, found.main.metric, *_scores(found))
            measures.add_row(*first, *_measures(results, results.cell_of[*row, task]))
            if found.buckets is not None:
                texts = (
                    (f"{each.score:.2f} ({each.n})" if each.n else "no samples") for each in found.buckets.values()
                )
                buckets.add_row(*first, found.main.metric, *texts)
    for table in (scores, measures, buckets):
        if table.row_count:
            console.print(table)
    for line in _warnings(runs.values()):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    for scored in runs.values():
        console.print(f"wrote {scored.run.folder / SCORES_FILE}", markup=False, highlight=False, soft_wrap=True)


def _table(title: str, caption: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, caption=caption)
    for name in ("skipped", "task", *columns):
        table.add_column(name, no_wrap=True)
    return table


def _scores(found: ScoredTask) -> Iterator[str]:
    records, main = found.records, found.main
    yield _score(main)
    yield _score(found.rouge_score) if found.rouge_score else ""
    yield str(len(records.records)) + ("" if records.complete else f" of {records.expected}, partial")
    yield str(main.num_empty)
    yield str(sum(main.errors.values()))


def _score(scores: SampleScores) -> str:
    """The score of the benchmark and our interval."""
    if scores.mean is None:
        return "no samples"
    return " ".join([f"{scores.as_printed:.2f}", *labels.percent(scores.mean).split(" ")[1:]])


def _measures(results: Results, cell: Any) -> Iterator[str]:
    """Fidelity, loss, loss above the full model's, and the floor with its trivial answer."""
    for name, text in (("fidelity", labels.percent), ("loss", labels.nats), ("loss_added", labels.added_nats)):
        found = estimate(cell, name)
        yield labels.UNKNOWN if found is None else text(found)
    floors = results.floors.query("phase == @cell.phase and model == @cell.model and task == @cell.task").dropna()
    if floors.empty:
        yield labels.UNKNOWN
    else:
        best = floors.loc[floors["score"].idxmax()]
        at_it = ", full model is at it" if cell.at_floor else ""
        yield f"{100 * best['score']:.1f} ({best['baseline']}){at_it}"


def _warnings(runs: Iterable[ScoredRun]) -> Iterator[str]:
    for scored in runs:
        for task, found in scored.tasks.items():
            where, records = f"{scored.run.cell.label}/{task}", found.records
            yield from (f"{where}: {problem}" for problem in records.problems)
            if len(records.records) < records.expected:
                yield f"{where}: partial, {len(records.records)} of {records.expected} records; run it again"
            for reason, count in found.main.errors.items():
                yield f"{where}: {count} of {len(records.records)} samples score 0, {reason}"
        yield from scored.notes
