"""The paper's claim by three measures: how often AdaSkip is better, as good or worse by score, fidelity and loss."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from adaskip.common.intervals import mean_of_means_estimate
from adaskip.common.pipe_table import pipe_table
from adaskip.studies.tables import labels
from adaskip.studies.tables.compare import (
    BETTER,
    TIED,
    WORSE,
    beyond_chance,
    claim,
    comparisons,
    contests,
    tally,
)
from adaskip.studies.tables.documents import at_floor_sentence
from adaskip.studies.tables.results import MEASURES, Results

ALL_HEADER = ["Measure", "Phase", "cells", "best", "tied", "beaten", "better than all", "worse than one"]
EACH_HEADER = ["Measure", "Strategy", "cells", "better", "significantly", "tied", "worse", "significantly"]
MEANS = {
    "fidelity": ("Fidelity, per cent", labels.percent),
    "loss_added": ("Loss above the full model's, nats per token", labels.added_nats),
}


def all_comparisons(results: Results) -> pd.DataFrame:
    """`comparisons` of every measure, with the column `measure`."""
    found = {measure.name: comparisons(results, measure) for measure in MEASURES}
    return pd.concat(found, names=["measure"]).reset_index(level="measure").reset_index(drop=True)


def to_text(results: Results) -> str:
    """The document `claims.md`."""
    compared = all_comparisons(results)
    tallies = {m.name: tally(contests(compared[compared["measure"] == m.name])) for m in MEASURES}
    parts = ["# AdaSkip by score, fidelity and loss"]
    parts += [f"By {name} AdaSkip {claim(counts)}{beyond_chance(counts)}" for name, counts in tallies.items()]
    for (phase, model), cells in results.cells.groupby(["phase", "model"], sort=False):
        parts += [f"{model}, {labels.PHASES[phase]}: {at_floor_sentence(cells)}"] if cells["at_floor"].any() else []
    parts += [
        "A cell is one task of one model in one phase at one budget. Fidelity is the task's metric against the full "
        "model's own answer, loss that of the reference answer. Significant: the 95 % bootstrap interval of the paired "
        "difference, over the same samples, excludes zero; not corrected for the number of cells.",
        "## Against the other three strategies of the paper",
        "Cells with finished runs of all four strategies. The last two columns count significant differences.",
        pipe_table(ALL_HEADER, [line for name in tallies for line in _against_all(name, tallies[name])]),
        "## Against each other strategy",
        "Cells with finished runs of both strategies. Better, worse: AdaSkip is better or worse than the other.",
        pipe_table(EACH_HEADER, list(_against_each(compared))),
    ]
    for name, (title, _) in MEANS.items():
        if results.cells[name].notna().any():
            parts += [f"## {title}, mean over models and tasks", _means(results, name)]
    return "\n\n".join(parts) + "\n"


def _against_all(measure: str, counts: dict) -> Iterator[list[str]]:
    columns = ("compared", "best", "tied", "beaten", "paired_better", "paired_worse")
    yield [f"**{measure}**", "all", *(str(counts[name]) for name in columns)]
    for phase, part in counts["by_phase"].items():
        yield [measure, labels.PHASES[phase], *(str(part[name]) for name in columns)]


def _against_each(compared: pd.DataFrame) -> Iterator[list[str]]:
    for (measure, other), part in compared.groupby(["measure", "other"], sort=False):
        better, tied, worse = ((part["verdict"] == verdict).sum() for verdict in (BETTER, TIED, WORSE))
        counts = [len(part), better, (part["low"] > 0).sum(), tied, worse, (part["high"] < 0).sum()]
        yield [measure, labels.STRATEGIES[other], *map(str, counts)]


def _means(results: Results, name: str) -> str:
    """A row per strategy, a column per phase and budget; `-` if a cell is not finished."""
    places = ["phase", "fraction", "strategy"]
    whole = results.cells.groupby(places)["final"].all()
    samples = results.samples.dropna(subset=[name])
    found = {
        key: mean_of_means_estimate([[*task] for _, task in group.groupby(["model", "task"], sort=False)[name]])
        for key, group in samples.groupby(places)
        if whole[key]
    }
    columns = [(phase, fraction) for phase in results.paper.tables for fraction in results.fractions()]
    columns = [column for column in columns if any(key[:2] == column for key in found)]
    shown = MEANS[name][1]
    rows = [[labels.STRATEGIES[s], *(shown(found.get((*place, s))) for place in columns)] for s in results.skipping]
    return pipe_table(["", *(f"{labels.PHASES[phase]} {labels.budget(f)}" for phase, f in columns)], rows)
