"""The paper's claim by three measures: how often AdaSkip is better, as good or worse by score, fidelity and loss."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from adaskip.common.intervals import mean_of_means_estimate
from adaskip.common.pipe_table import pipe_table
from adaskip.studies.tables import labels
from adaskip.studies.tables.compare import BETTER, OUTCOMES, TIED, WORSE, comparisons, contests
from adaskip.studies.tables.documents import at_floor_sentence
from adaskip.studies.tables.results import FIDELITY, LOSS, MEASURES, Measure, Results

ALL_HEADER = ["Measure", "Phase", "cells", "best", "tied", "beaten", "better than all", "worse than one"]
EACH_HEADER = ["Measure", "Strategy", "cells", "better", "beyond chance", "tied", "worse", "beyond chance"]


def all_comparisons(results: Results) -> pd.DataFrame:
    """`comparisons` by every measure, told apart by the column `measure`."""
    found = {measure.name: comparisons(results, measure) for measure in MEASURES}
    return pd.concat(found, names=["measure"]).reset_index(level="measure").reset_index(drop=True)


def to_text(results: Results) -> str:
    """The document `claims.md`."""
    compared = all_comparisons(results)
    parts = ["# AdaSkip by score, fidelity and loss", *sentences(results, compared)]
    parts += [
        "A cell is one task of one model in one phase at one budget. Fidelity is the task's metric against the full "
        "model's own answer, loss that of the reference answer. Beyond chance: the 95 % bootstrap interval of the "
        "paired difference, over the same samples, excludes zero; not corrected for the number of cells.",
        "## Against the other three strategies of the paper",
        "Once all four have run a cell to its end. The last two columns are beyond chance.",
        pipe_table(ALL_HEADER, list(_against_all(compared))),
        "## Against each other strategy",
        "Once both have run a cell to its end. Better and worse: AdaSkip.",
        pipe_table(EACH_HEADER, list(_against_each(compared))),
    ]
    for measure, name in ((FIDELITY, "fidelity"), (LOSS, "loss_added")):
        if results.samples[measure.name].notna().any():
            parts += [f"## {TITLES[name]}, mean over models and tasks", _means(results, measure)]
    return "\n\n".join(parts) + "\n"


TITLES = {"fidelity": "Fidelity, per cent", "loss_added": "Loss above the full model's, nats per token"}


def sentences(results: Results, compared: pd.DataFrame) -> Iterator[str]:
    """The claim by each measure, and which tasks are at their floor."""
    for measure in MEASURES:
        found = contests(compared[compared["measure"] == measure.name])
        if not len(found):
            yield f"By {measure.name} AdaSkip cannot be compared yet: no cell has all four strategies run to their end."
            continue
        best, tied, beaten = ((found["outcome"] == outcome).sum() for outcome in OUTCOMES.values())
        yield (
            f"By {measure.name} AdaSkip is the best of the four strategies in {best} of {len(found)} cells "
            f"({100 * best / len(found):.0f} %), tied for the best in {tied} and beaten in {beaten}; beyond chance it "
            f"is better than every other in {found['paired_better'].sum()} and worse than another in "
            f"{found['paired_worse'].sum()}."
        )
    for (phase, model), cells in results.cells.groupby(["phase", "model"], sort=False):
        if cells["at_floor"].any():
            yield f"{model}, {labels.PHASES[phase]}: {at_floor_sentence(cells)}"


def _against_all(compared: pd.DataFrame) -> Iterator[list[str]]:
    for measure in MEASURES:
        found = contests(compared[compared["measure"] == measure.name])
        groups = [("all", found), *((labels.PHASES[phase], part) for phase, part in found.groupby("phase", sort=False))]
        for name, part in groups if len(found) else ():
            outcomes = [(part["outcome"] == outcome).sum() for outcome in OUTCOMES.values()]
            counts = [len(part), *outcomes, part["paired_better"].sum(), part["paired_worse"].sum()]
            yield [f"**{measure.name}**" if name == "all" else measure.name, name, *map(str, counts)]


def _against_each(compared: pd.DataFrame) -> Iterator[list[str]]:
    for (measure, other), part in compared.groupby(["measure", "other"], sort=False):
        better, tied, worse = ((part["verdict"] == verdict).sum() for verdict in (BETTER, TIED, WORSE))
        counts = [len(part), better, (part["low"] > 0).sum(), tied, worse, (part["high"] < 0).sum()]
        yield [measure, labels.STRATEGIES[other], *map(str, counts)]


def _means(results: Results, measure: Measure) -> str:
    """A line per strategy, a column per phase and budget; `-` where a task has not come to its end."""
    samples = results.samples.assign(loss_added=results.samples["loss"] - results.samples["full_loss"])
    name = "loss_added" if measure is LOSS else measure.name
    cells = results.cells.groupby(["phase", "fraction", "strategy"])["final"].all()
    groups = samples.groupby(["phase", "fraction", "strategy"], sort=False)
    found = {
        key: mean_of_means_estimate(
            [[*task[name].dropna()] for _, task in group.groupby(["model", "task"], sort=False)]
        )
        for key, group in groups
        if cells.get(key, False) and group.groupby(["model", "task"])[name].count().all()
    }
    columns = [(phase, fraction) for phase in results.paper.tables for fraction in results.fractions()]
    columns = [(phase, fraction) for phase, fraction in columns if any(key[:2] == (phase, fraction) for key in found)]
    text = labels.percent if measure is FIDELITY else lambda estimate: labels.nats(estimate, signed=True)
    rows = [
        [labels.STRATEGIES[strategy], *(text(found.get((phase, fraction, strategy))) for phase, fraction in columns)]
        for strategy in results.skipping
    ]
    return pipe_table(["", *(f"{labels.PHASES[phase]} {labels.budget(f)}" for phase, f in columns)], rows)
