"""Strategy calibrated compared with the best of the other four for each model: mean scores, paired difference."""

from __future__ import annotations

import pandas as pd

from adaskip.common.intervals import Estimate, mean, mean_of_means_estimate
from adaskip.common.pipe_table import pipe_table
from adaskip.studies.tables import labels
from adaskip.studies.tables.compare import FEWEST_PAIRS
from adaskip.studies.tables.results import COMPARED, Results

CALIBRATED = "calibrated"
STRATEGIES = (*COMPARED, CALIBRATED)
VERDICTS = BETTER, EQUAL, WORSE = "better than", "equal to", "worse than"


def matches(results: Results) -> pd.DataFrame:
    """A row for each phase, fraction and model in which all tasks of all five strategies are finished.

    Tasks at their floor are left out, and rows without any other.

    Columns: the mean score of each strategy over the tasks, per cent; `best_other`; and `difference`, `low`, `high`:
    calibrated minus the best other, the mean over tasks of the mean over common samples; no interval if a task has
    fewer than `FEWEST_PAIRS`.
    """
    cells = results.cells[results.cells["strategy"].isin(STRATEGIES)]
    telling = cells[~cells["at_floor"]].groupby(["phase", "model"])["task"].unique()
    whole = cells.groupby(["phase", "fraction", "model"])["final"].all()
    rows = []
    for phase in results.paper.tables:
        for fraction in results.fractions():
            for model in results.models:
                tasks = telling.get((phase, model), ())
                if not whole.get((phase, fraction, model), False) or not len(tasks):
                    continue
                ours = (phase, model, CALIBRATED, fraction)
                if any(results.other_protocol((phase, model, name, fraction), ours) for name in COMPARED):
                    continue
                found = {
                    name: [results.samples_of[phase, model, name, fraction, task]["score"] for task in tasks]
                    for name in STRATEGIES
                }
                means = {name: 100 * mean([mean([*each]) for each in of]) for name, of in found.items()}
                best = max(COMPARED, key=means.__getitem__)
                pairs = zip(found[CALIBRATED], found[best], strict=True)
                gaps = [[*(100 * (a - b.reindex(a.index))).dropna()] for a, b in pairs]
                if not all(gaps):  # no common sample
                    continue
                gap = mean_of_means_estimate(gaps)
                if min(map(len, gaps)) < FEWEST_PAIRS:
                    gap = Estimate(gap.value)
                difference = round(gap.value, 6) + 0.0  # + 0.0: no minus before a zero
                rows.append((phase, fraction, model, *means.values(), best, difference, gap.low, gap.high))
    columns = ["phase", "fraction", "model", *STRATEGIES, "best_other", "difference", "low", "high"]
    found = pd.DataFrame(rows, columns=columns).astype({"difference": float, "low": float, "high": float})
    found["verdict"] = found["difference"].map(lambda gap: BETTER if gap > 0 else EQUAL if gap == 0 else WORSE)
    found["beyond_chance"] = (found["low"] > 0) | (found["high"] < 0)
    return found


def to_text(found: pd.DataFrame) -> str:
    """The document `selection.md`."""
    header = [
        *("Phase", "Skipped", "Model"),
        *(labels.STRATEGIES[name] for name in STRATEGIES),
        *("Difference", "Verdict"),
    ]
    parts = [
        "# Calibrated against the best of the other four",
        sentence(found),
        "Mean score over the phase's tasks, without those at their floor, per cent. Difference: calibrated minus the "
        "best of the other four, the mean over tasks of paired differences, with its 95 % bootstrap interval over "
        "samples, not corrected for the number of rows. Significant: the interval excludes zero.",
        pipe_table(header, [_row(match) for match in found.to_dict("records")]),
    ]
    return "\n\n".join(parts) + "\n"


def sentence(found: pd.DataFrame) -> str:
    """A sentence on how often calibrated is at least as good as the best of the other four."""
    count = {verdict: int((found["verdict"] == verdict).sum()) for verdict in VERDICTS}
    beyond = {verdict: int(((found["verdict"] == verdict) & found["beyond_chance"]).sum()) for verdict in VERDICTS}
    return (
        f"In {len(found) - count[WORSE]} of {len(found)} combinations of model, phase and budget, calibrated scores at "
        f"least as much as the best of Early Exit, SkipDecode, Unified Skipping and AdaSkip: more in {count[BETTER]} "
        f"({beyond[BETTER]} significantly), the same in {count[EQUAL]}. It scores less in {count[WORSE]} "
        f"({beyond[WORSE]} significantly)."
    )


def _row(match: dict) -> list[str]:
    verdict = f"**{match['verdict']}**" if match["verdict"] == WORSE else match["verdict"]
    known = match["low"] == match["low"]
    return [
        *(labels.PHASES[match["phase"]], labels.budget(match["fraction"]), match["model"]),
        *(f"{match[name]:.1f}" for name in STRATEGIES),
        f"{match['difference']:+.1f}" + (f" [{match['low']:+.1f}, {match['high']:+.1f}]" if known else ""),
        f"{verdict} {labels.STRATEGIES[match['best_other']]}{', significant' * match['beyond_chance']}",
    ]
