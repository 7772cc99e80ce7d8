"""Tables 3 and 4 as Markdown: per model the scores, ours beside the paper's, and the share kept of the full model's.

And tables of the same form of fidelity and of the loss of the reference answer, with the floors of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd

from adaskip.common.intervals import RESAMPLES
from adaskip.common.pipe_table import pipe_table
from adaskip.strategies.registry import FULL
from adaskip.studies.tables import labels
from adaskip.studies.tables.floors import EMPTY, FIRST_SENTENCE, MAJORITY
from adaskip.studies.tables.results import COMPARED, PLACE, Results, estimate

PARTIAL = "*"
Pairs = list[tuple[str, str]]
"""Column heading and text of parts of one line."""


def table_of(results: Results, phase: str) -> pd.DataFrame:
    """The cells of one phase; `score_best`, `paper_score_best`, `fidelity_best` and `loss_best` mark the best of the
    four strategies, once all have run to their end."""
    cells = results.cells[results.cells["phase"] == phase].copy()
    cells["partial"] = cells["score"].notna() & ~cells["final"]
    cells["in_paper"] = cells["model"].isin(results.paper.models)
    cells["has_speedup"] = cells["in_paper"] & results.paper.tables[phase].has_speedup
    competes, published = cells["strategy"].isin(COMPARED), cells["paper_score"].notna()
    counted = {"score": cells["final"] & ~cells["at_floor"], "paper_score": published}
    for name in ("score", "paper_score", "fidelity", "loss"):
        use = competes & counted.get(name, cells["final"])
        values = cells[name].where(use).mul(-100 if name == "loss" else 100).round(6)
        groups = values.groupby([cells[column] for column in PLACE])
        cells[f"{name}_best"] = (groups.transform("count") == len(COMPARED)) & (values == groups.transform("max"))
    return cells


def scores_document(results: Results, phase: str) -> str:
    """Scores and retention of one phase as a Markdown document."""
    cells, source = table_of(results, phase), results.paper.tables[phase].source
    title = f"{source}: ours beside the paper's" if results.paper_models else _title(phase, "scores")
    parts = [f"# {title}", *_score_notes(results, cells, phase)]
    for model in results.models:
        own = cells[cells["model"] == model]
        parts += [f"## {model}", describe_model(results, phase, model), "### Scores", _lines(own, _score, _speedup)]
        parts += ["### Retention: score / full model's score", _lines(own[own["strategy"] != FULL], _retention)]
    return "\n\n".join(parts) + "\n"


def measures_document(results: Results, phase: str) -> str:
    """Fidelity, loss of the reference answer, and scores with their floors, of one phase, as a Markdown document."""
    cells = table_of(results, phase)
    parts = [f"# {_title(phase, 'fidelity, loss and score')}", *_measure_notes(results, cells)]
    for model in results.models:
        own = cells[cells["model"] == model]
        parts += [f"## {model}", describe_model(results, phase, model)]
        parts += ["### Fidelity: the task's metric against the full model's answer", _lines(own, _fidelity)]
        parts += ["### Loss of the reference answer, nats per token"]
        parts += [_lines(own, _loss) if own["loss"].notna().any() else f"`{labels.UNKNOWN}`: these records hold none."]
        parts += ["### Score, and what trivial answers score", _lines(own, _plain_score, below=_floors(results, own))]
        parts += [at_floor_sentence(own)] if own["at_floor"].any() else []
    return "\n\n".join(parts) + "\n"


def at_floor_sentence(cells: pd.DataFrame) -> str:
    """Which tasks of a model in a phase are at their floor, and what follows."""
    tasks = ", ".join(labels.task(task) for task in cells.loc[cells["at_floor"], "task"].unique())
    return (
        f"At its floor: {tasks}. The interval of the full model's score includes what a trivial answer scores, so that "
        "scores do not tell strategies apart; these tasks count by fidelity and loss only."
    )


def _title(phase: str, what: str) -> str:
    return f"{labels.PHASES[phase].capitalize()}: {what}"


def _lines(
    cells: pd.DataFrame,
    of_cell: Callable[[Any], Pairs],
    of_row: Callable[[Any], Pairs] = lambda cell: [],
    below: Iterable[list[str]] = (),
) -> str:
    """A pipe table with a line per strategy and budget. of_cell: the columns of one task; of_row: those after all."""
    lines: list[Pairs] = []
    for (fraction, strategy), group in cells.groupby(["fraction", "strategy"], sort=False):
        row = [*group.itertuples()]
        first = [("Skipped", labels.budget(fraction)), ("Strategy", labels.STRATEGIES[strategy])]
        lines.append([*first, *(pair for cell in row for pair in of_cell(cell)), *of_row(row[0])])
    return pipe_table([head for head, _ in lines[0]], [*([text for _, text in line] for line in lines), *below])


def _score(cell: Any) -> Pairs:
    """Our score, the paper's if it ran the model, and Google's Rouge-L."""
    pairs = _plain_score(cell)
    pairs += [("paper", labels.published(cell.paper_score, bold=cell.paper_score_best))] if cell.in_paper else []
    return pairs + (
        [("rouge_score", labels.percent(estimate(cell, "rouge_score")))] if cell.metric == "rouge_l" else []
    )


def _plain_score(cell: Any) -> Pairs:
    text = labels.percent(estimate(cell, "score"), PARTIAL if cell.partial else "", bold=cell.score_best)
    return [(f"{labels.task(cell.task)} {labels.METRICS.get(cell.metric, cell.metric)}", text)]


def _retention(cell: Any) -> Pairs:
    kept = estimate(cell, "retention")
    pairs = [(labels.task(cell.task), labels.percent(kept) + (PARTIAL if cell.partial and kept else ""))]
    return pairs + ([("paper", labels.published(100 * cell.paper_retention))] if cell.in_paper else [])


def _speedup(cell: Any) -> Pairs:
    text = labels.UNPUBLISHED if math.isnan(cell.paper_speedup) else labels.ratio(cell.paper_speedup)
    return [("paper's speedup", text)] if cell.has_speedup else []


def _fidelity(cell: Any) -> Pairs:
    text = labels.percent(estimate(cell, "fidelity"), PARTIAL if cell.partial else "", bold=cell.fidelity_best)
    return [(labels.task(cell.task), _if_run(cell, "fidelity", text))]


def _loss(cell: Any) -> Pairs:
    loss = labels.nats(estimate(cell, "loss"), PARTIAL if cell.partial else "", bold=cell.loss_best)
    added = labels.nats(estimate(cell, "loss_added"), signed=True)
    return [
        (labels.task(cell.task), _if_run(cell, "loss", loss)),
        ("above full", "" if cell.strategy == FULL else _if_run(cell, "loss_added", added)),
    ]


def _if_run(cell: Any, name: str, text: str) -> str:
    """`text`; of a cell that was run and lacks this measure `n/a`."""
    return labels.UNKNOWN if math.isnan(getattr(cell, name)) and not math.isnan(cell.score) else text


def _floors(results: Results, cells: pd.DataFrame) -> Iterable[list[str]]:
    """A line for each trivial answer."""
    phase, model = cells[["phase", "model"]].iloc[0]
    known = {(f.task, f.baseline): f.score for f in results.floors.itertuples() if (f.phase, f.model) == (phase, model)}
    for baseline in (EMPTY, MAJORITY, FIRST_SENTENCE):
        scores = [known.get((task, baseline), math.nan) for task in results.tasks(phase)]
        if not all(math.isnan(score) for score in scores):
            yield ["floor", baseline, *(labels.MISSING if math.isnan(x) else f"{100 * x:.1f}" for x in scores)]


def _score_notes(results: Results, cells: pd.DataFrame, phase: str) -> list[str]:
    """What a reader must know to read the numbers."""
    known = bool(results.paper_models)
    lines = [
        f"Scores are per cent with 95 % bootstrap intervals in brackets ({RESAMPLES} resamples of the samples, "
        "paired with the full model's for retention)."
        + (
            f" Paper: {results.paper.source}. Where models and data differ from the paper's, compare retention, not "
            "scores."
            if known
            else ""
        ),
        *([subsets] if (subsets := subsets_of(results, phase)) else []),
        _legend(known),
        "No speedup of ours stands here: the times of runs are of different moments. `adaskip bench` times the full "
        "model and every strategy side by side, and `eval/tradeoff.py` shows its speedups beside scores.",
    ]
    if cells["rouge_score"].notna().any():
        lines.append(
            "Rouge-L is by `rouge` 1.0.1, as LongBench and the paper have it; `rouge_score` is Google's rougeL of the "
            "same outputs."
        )
    return lines


def _legend(known: bool) -> str:
    return (
        f"`{labels.MISSING}` not run; {f'`{labels.UNPUBLISHED}` not published; ' if known else ''}`{PARTIAL}` "
        "unfinished run, scored over the samples it has; **bold** the best of the four strategies."
    )


def _measure_notes(results: Results, cells: pd.DataFrame) -> list[str]:
    phase = cells["phase"].iloc[0]
    whose = (f"{each.label or each.name}'s" for each in results.benchmarks)
    return [
        f"95 % bootstrap intervals in brackets ({RESAMPLES} resamples of the samples). Fidelity: the task's metric of "
        "an answer against the full model's own answer to the same sample, per cent; 100 where they are equal. Loss: "
        "of the reference answer given the prompt, teacher-forced, the mean over samples of nats per token; `above "
        f"full`: the mean of paired differences to the full model. Score: {_listed(whose)}, per cent, above the scores "
        "of trivial answers to the same samples: nothing, always the most frequent class, the first sentence of the "
        "context.",
        *([subsets] if (subsets := subsets_of(results, phase)) else []),
        f"`{labels.UNKNOWN}` no such measure in these records; {_legend(known=False)}",
    ]


def subsets_of(results: Results, phase: str) -> str | None:
    """One sentence if any run of a phase is over a random subset of the samples."""
    manifests = [scored.run.manifest for (where, *_), scored in results.runs.items() if where == phase]
    draws = {(each["subset"], each["seed"]) for each in manifests if each.get("subset")}
    if not draws:
        return None
    sizes = " / ".join(f"{size} samples a task (seed {seed})" for size, seed in sorted(draws))
    return f"Scores and intervals are of a random subset of {sizes}, the same for every strategy, not of all samples."


def describe_model(results: Results, phase: str, model: str) -> str:
    """What was run here under this model's name, what the paper ran, and the budgets of both."""
    runs = [scored.run for (where, name, *_), scored in results.runs.items() if (where, name) == (phase, model)]
    ours = "Ours: not run."
    if runs:
        manifests = [run.manifest for run in runs]
        names = (
            f"the {run.benchmark.name}'s small model" if run.benchmark.models else f"`{run.manifest['checkpoint']}`"
            for run in runs
        )
        made = _listed(f"{each['dtype']} on {each['device']}" for each in manifests)
        samples = _listed(str(number) for each in manifests for number in each["tasks"].values())
        budgets = _listed(str(number) for number in sorted(run.cell.sublayers for run in runs) if number)
        depth = _listed(str(2 * run.num_layers) for run in runs)
        ours = (
            f"Ours: {_listed(names)}, {budgets or 'none'} of {depth} sublayers skipped; {made}, {samples} samples a "
            "task."
        )
    paper = results.paper
    if model not in paper.models:
        return ours
    fractions = sorted(filter(None, paper.tables[phase].by_fraction))
    budgets = _listed(f"{fraction * paper.num_sublayers:.0f}" for fraction in fractions)
    return f"{ours} The paper: {paper.models[model]}, {budgets} of {paper.num_sublayers}."


def _listed(values: Iterable[str]) -> str:
    """`4 / 6 / 8`, each value once."""
    return " / ".join(dict.fromkeys(values))
