"""Tables 3 and 4 as Markdown: for each model our scores beside the paper's, and retention.

Also tables of fidelity and of the loss of the reference answer, with the floors of the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import pandas as pd

from adaskip.common.intervals import RESAMPLES
from adaskip.common.pipe_table import pipe_table
from adaskip.strategies.registry import FULL
from adaskip.studies.tables import labels
from adaskip.studies.tables.floors import EMPTY, FIRST_SENTENCE, MAJORITY
from adaskip.studies.tables.labels import MISSING, PARTIAL, UNKNOWN, UNPUBLISHED
from adaskip.studies.tables.results import COMPARED, PLACE, Results, estimate

Pairs = list[tuple[str, str]]
"""Headings and texts of columns of a row."""


def scores_document(results: Results, phase: str) -> str:
    """Scores and retention of one phase as a Markdown document."""
    cells, source = table_of(results, phase), results.paper.tables[phase].source
    heading = f"{source}: ours beside the paper's" if results.paper_models else f"{title(phase)}: scores"
    parts = [f"# {heading}", *_score_notes(results, cells, phase)]
    for model in results.models:
        own = cells[cells["model"] == model]
        parts += [f"## {model}", describe_model(results, phase, model), "### Scores", _lines(own, score, _speedup)]
        parts += ["### Retention: score / full model's score", _lines(own[own["strategy"] != FULL], retention)]
    return "\n\n".join(parts) + "\n"


def measures_document(results: Results, phase: str) -> str:
    """Fidelity, loss of the reference answer, and scores with their floors, of one phase, as a Markdown document."""
    cells = table_of(results, phase)
    parts = [f"# {title(phase)}: fidelity, loss and score", *_measure_notes(results, phase)]
    for model in results.models:
        own = cells[cells["model"] == model]
        parts += [f"## {model}", describe_model(results, phase, model)]
        parts += ["### Fidelity: the task's metric against the full model's answer", _lines(own, fidelity)]
        parts += ["### Loss of the reference answer, nats per token"]
        parts += [_lines(own, loss) if own["loss"].notna().any() else f"`{UNKNOWN}`: not in these records."]
        floors = _floors(results, phase, model)
        parts += ["### Score, and what trivial answers score", _lines(own, lambda cell: score(cell)[:1], below=floors)]
        parts += [at_floor_sentence(own)] if own["at_floor"].any() else []
    return "\n\n".join(parts) + "\n"


def at_floor_sentence(cells: pd.DataFrame) -> str:
    """A sentence on the tasks of a model and phase at their floor."""
    tasks = ", ".join(labels.TASKS[task] for task in cells.loc[cells["at_floor"], "task"].unique())
    return (
        f"At the floor: {tasks}. The interval of the full model's score includes the score of a trivial answer, so "
        "scores do not distinguish strategies; compare fidelity and loss on these tasks."
    )


def title(phase: str) -> str:
    return labels.PHASES[phase].capitalize()


@lru_cache(maxsize=len(labels.PHASES))
def table_of(results: Results, phase: str) -> pd.DataFrame:
    """The cells of one phase with `mark` for unfinished runs, and `score_best`, `paper_score_best`, `fidelity_best` and
    `loss_best` for the best of the four strategies, if all four runs are finished. Several documents use the frame."""
    cells = results.cells[results.cells["phase"] == phase].copy()
    cells["mark"] = (cells["score"].notna() & ~cells["final"]).map({True: PARTIAL, False: ""})
    cells["in_paper"] = cells["model"].isin(results.paper.models)
    cells["has_speedup"] = cells["in_paper"] & results.paper.tables[phase].has_speedup
    competes, published = cells["strategy"].isin(COMPARED), cells["paper_score"].notna()
    counted = {"score": cells["final"] & ~cells["at_floor"], "paper_score": published}
    for name in ("score", "paper_score", "fidelity", "loss"):
        values = cells[name].where(competes & counted.get(name, cells["final"]))
        values = values.mul(-100 if name == "loss" else 100).round(6)
        groups = values.groupby([cells[column] for column in PLACE])
        cells[f"{name}_best"] = (groups.transform("count") == len(COMPARED)) & (values == groups.transform("max"))
    return cells


def lines_of(cells: pd.DataFrame) -> Iterable[tuple[tuple[float, str], list[Any]]]:
    """Fraction and strategy of each row of a model's table, and its cells."""
    lines: dict[tuple[float, str], list[Any]] = {}
    for cell in cells.itertuples():  # once: itertuples of a small group costs as much as that of the whole frame
        lines.setdefault((cell.fraction, cell.strategy), []).append(cell)
    return lines.items()


def _lines(
    cells: pd.DataFrame,
    of_cell: Callable[[Any], Pairs],
    of_line: Callable[[Any], Pairs] = lambda cell: [],
    below: Iterable[list[str]] = (),
) -> str:
    """The table of a model. of_cell: the columns of a task; of_line: columns after all tasks; below: more rows."""
    lines: list[Pairs] = []
    for (fraction, strategy), group in lines_of(cells):
        first = [("Skipped", labels.budget(fraction)), ("Strategy", labels.STRATEGIES[strategy])]
        lines.append([*first, *(pair for cell in group for pair in of_cell(cell)), *of_line(group[0])])
    return pipe_table([head for head, _ in lines[0]], [*([text for _, text in line] for line in lines), *below])


def score(cell: Any) -> Pairs:
    """Our score, the paper's if it has the model, and Google's Rouge-L."""
    ours = labels.percent(estimate(cell, "score"), cell.mark, bold=cell.score_best)
    pairs = [(f"{labels.TASKS[cell.task]} {labels.METRICS[cell.metric]}", ours)]
    if cell.in_paper:
        pairs.append(("paper", labels.published(cell.paper_score, bold=cell.paper_score_best)))
    if cell.metric == "rouge_l":
        pairs.append(("rouge_score", labels.percent(estimate(cell, "rouge_score"))))
    return pairs


def retention(cell: Any) -> Pairs:
    """Our retention, and the paper's if it has the model."""
    kept = (labels.TASKS[cell.task], labels.percent(estimate(cell, "retention"), cell.mark))
    return [kept, *([("paper", labels.published(100 * cell.paper_retention))] if cell.in_paper else [])]


def fidelity(cell: Any) -> Pairs:
    found = estimate(cell, "fidelity")
    return [(labels.TASKS[cell.task], _if_run(cell, labels.percent(found, cell.mark, bold=cell.fidelity_best)))]


def loss(cell: Any) -> Pairs:
    """The loss, and its paired difference from the full model's."""
    ours = labels.nats(estimate(cell, "loss"), cell.mark, bold=cell.loss_best)
    added = "" if cell.strategy == FULL else _if_run(cell, labels.added_nats(estimate(cell, "loss_added")))
    return [(labels.TASKS[cell.task], _if_run(cell, ours)), ("above full", added)]


def _if_run(cell: Any, text: str) -> str:
    """`text`, or `n/a` for a cell that was run without this measure."""
    return UNKNOWN if text == MISSING and cell.score == cell.score else text


def _speedup(cell: Any) -> Pairs:
    return [("paper's speedup", labels.published(cell.paper_speedup, 2))] if cell.has_speedup else []


def _floors(results: Results, phase: str, model: str) -> Iterator[list[str]]:
    """A row for each trivial answer with a known score."""
    own = results.floors[(results.floors["phase"] == phase) & (results.floors["model"] == model)].dropna()
    for baseline in (EMPTY, MAJORITY, FIRST_SENTENCE):
        known = own[own["baseline"] == baseline].set_index("task")["score"]
        if len(known):
            scores = (f"{100 * known[t]:.1f}" if t in known else MISSING for t in results.tasks(phase))
            yield ["floor", baseline, *scores]


def _score_notes(results: Results, cells: pd.DataFrame, phase: str) -> list[str]:
    """What a reader must know to read the numbers."""
    known = bool(results.paper_models)
    paper = (
        f" Paper: {results.paper.source}. Where models and data differ from the paper's, compare retention, not scores."
    )
    lines = [
        f"Scores are per cent with 95 % bootstrap intervals in brackets ({RESAMPLES} resamples of the samples, "
        f"paired with the full model's for retention).{paper if known else ''}",
        *([subsets] if (subsets := subsets_of(results, phase)) else []),
        *([options] if (options := options_of(results, phase)) else []),
        _legend(known),
        "Our speedups are not in these tables, since runs are not timed side by side. `adaskip bench` times the full "
        "model and every strategy side by side, and `eval/tradeoff.py` shows its speedups beside scores.",
    ]
    if cells["rouge_score"].notna().any():
        lines.append(
            "Rouge-L is computed by `rouge` 1.0.1, as in LongBench and the paper; `rouge_score` is Google's rougeL of "
            "the same outputs."
        )
    return lines


def _measure_notes(results: Results, phase: str) -> list[str]:
    whose = (f"{each.label or each.name}'s" for each in results.benchmarks)
    return [
        f"95 % bootstrap intervals in brackets ({RESAMPLES} resamples of the samples). Fidelity: the task's metric of "
        "an answer against the full model's own answer to the same sample, per cent; 100 where they are equal. Loss: "
        "of the reference answer given the prompt, teacher-forced, mean over samples, nats per token; `above "
        f"full`: the mean of paired differences to the full model. Score: {_listed(whose)}, per cent, above the scores "
        "of trivial answers to the same samples: nothing, always the most frequent class, the first sentence of the "
        "context.",
        *([subsets] if (subsets := subsets_of(results, phase)) else []),
        *([options] if (options := options_of(results, phase)) else []),
        f"`{UNKNOWN}` not in these records; {_legend(known=False)}",
    ]


def _legend(known: bool) -> str:
    return (
        f"`{MISSING}` not run; {f'`{UNPUBLISHED}` not published; ' if known else ''}`{PARTIAL}` unfinished run, scored "
        "over the samples it has; **bold** the best of the four strategies."
    )


def subsets_of(results: Results, phase: str) -> str | None:
    """A sentence if any run of a phase is over a random subset of the samples, else None."""
    manifests = [scored.run.manifest for (where, *_), scored in results.runs.items() if where == phase]
    draws = {(each["subset"], each["seed"]) for each in manifests if each.get("subset")}
    if not draws:
        return None
    sizes = " / ".join(f"{size} samples a task (seed {seed})" for size, seed in sorted(draws))
    return (
        f"Scores and intervals are over a random subset of {sizes}, the same for every strategy, not over all samples."
    )


def options_of(results: Results, phase: str) -> str | None:
    """A sentence if any run of a phase had options of its strategy, else None."""
    found: dict[str, None] = {}
    for (where, *_), scored in results.runs.items():
        if where == phase and (given := scored.run.manifest.get("strategy_options")):
            told = ", ".join(f"{name}={value}" for name, value in sorted(given.items()))
            found[f"{labels.STRATEGIES[scored.run.cell.strategy]} with {told}"] = None
    return f"Options of strategies: {'; '.join(found)}." if found else None


def describe_model(results: Results, phase: str, model: str) -> str:
    """The model and budgets that were run here, and those of the paper."""
    runs = [scored.run for (where, name, *_), scored in results.runs.items() if (where, name) == (phase, model)]
    ours = "Ours: not run."
    if runs:
        manifests = [run.manifest for run in runs]
        names = (
            f"the {run.benchmark.name}'s small model" if run.benchmark.models else f"`{run.manifest['checkpoint']}`"
            for run in runs
        )
        made = _listed(f"{each['dtype']} on {each['device']}" for each in manifests)
        samples = _listed(number for each in manifests for number in each["tasks"].values())
        budgets = _listed(sorted(run.cell.sublayers for run in runs if run.cell.sublayers))
        depth = _listed(2 * run.num_layers for run in runs)
        ours = f"Ours: {_listed(names)}, {budgets or 'none'} of {depth} sublayers skipped"
        ours += f"; {made}, {samples} samples a task."
    paper = results.paper
    if model not in paper.models:
        return ours
    budgets = _listed(f"{f * paper.num_sublayers:.0f}" for f in sorted(paper.tables[phase].by_fraction) if f)
    return f"{ours} The paper: {paper.models[model]}, {budgets} of {paper.num_sublayers}."


def _listed(values: Iterable[Any]) -> str:
    """`4 / 6 / 8`, each value once."""
    return " / ".join(dict.fromkeys(map(str, values)))
