"""What `eval/eval.py` shows: every budget and task of one run, scored, on the console."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from adaskip.benchmarks.scores import BucketScore
from adaskip.studies.tables import labels
from adaskip.studies.tables.runs import find_run
from adaskip.studies.tables.scores import SCORES_FILE, SampleScores, ScoredRun, ScoredTask, score_run


def evaluate(name: str, runs_dir: str | Path) -> list[ScoredRun]:
    """Score every budget of the run called `name` and save the scores beside its records."""
    return [score_run(run, fresh=True) for run in find_run(name, runs_dir)]


def print_scores(runs: Sequence[ScoredRun], console: Console) -> None:
    """One table over all budgets and tasks, one by lengths, what is wrong, and where the scores are."""
    table = _table(runs[0].run.cell.run_name, "per cent, 95 % bootstrap intervals in brackets")
    for name in ("score", "rouge_score", "samples", "empty", "errors"):
        table.add_column(name, justify="right")
    buckets = _table("by length", "per cent and number of samples, by words of the record")
    by_length = [task.buckets for scored in runs for task in scored.tasks.values() if task.buckets is not None]
    for name in dict.fromkeys(name for each in by_length for name in each):
        buckets.add_column(name, justify="right")
    for scored in runs:
        for task, scores in scored.tasks.items():
            first = (f"{scored.run.cell.sublayers} of {2 * scored.run.num_layers}", task, scores.main.metric)
            table.add_row(*first, *_cells(scores))
            if scores.buckets is not None:
                buckets.add_row(*first, *map(_bucket, scores.buckets.values()))
    console.print(table)
    if buckets.row_count:
        console.print(buckets)
    for line in _warnings(runs):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    for scored in runs:
        console.print(f"wrote {scored.run.folder / SCORES_FILE}", markup=False, highlight=False, soft_wrap=True)


def _table(title: str, caption: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, caption=caption)
    for name in ("skipped", "task", "metric"):
        table.add_column(name, no_wrap=True)
    return table


def _bucket(bucket: BucketScore) -> str:
    return "no samples" if bucket.score is None else f"{bucket.score:.2f} ({bucket.n})"


def _cells(scores: ScoredTask) -> Iterator[str]:
    records, main = scores.records, scores.main
    yield _score(main)
    yield _score(scores.rouge_score) if scores.rouge_score else ""
    yield str(len(records.records)) + ("" if records.complete else f" of {records.expected}, partial")
    yield str(main.num_empty)
    yield str(sum(main.errors.values()))


def _score(scores: SampleScores) -> str:
    """The benchmark's number and our interval."""
    if scores.mean is None:
        return "no samples"
    return f"{scores.as_printed:.2f}{labels.interval(scores.mean)}"


def _warnings(runs: Sequence[ScoredRun]) -> Iterator[str]:
    for scored in runs:
        for task, scores in scored.tasks.items():
            where, records = f"{scored.run.cell.label}/{task}", scores.records
            yield from (f"{where}: {problem}" for problem in records.problems)
            if len(records.records) < records.expected:
                yield f"{where}: partial, {len(records.records)} of {records.expected} records; run it again"
            yield from (
                f"{where}: {count} of {len(records.records)} samples score 0, {reason}"
                for reason, count in scores.main.errors.items()
            )
