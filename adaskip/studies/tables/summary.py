"""The summary: in how many cells AdaSkip is best by score, retention, and how often online learning added FFNs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from adaskip.common.intervals import mean, mean_if_whole
from adaskip.common.pipe_table import pipe_table
from adaskip.studies.tables import labels
from adaskip.studies.tables.compare import (
    OURS,
    beyond_chance,
    claim,
    comparisons,
    contests,
    paper_contests,
    tally,
)
from adaskip.studies.tables.results import COMPARED, SCORE, Results

ONLINE_PHASES = ("decode", "e2e")
COUNTS = {
    "compared": "cells",
    "best": "best",
    "tied": "tied",
    "beaten": "beaten",
    "interval_above": "interval above all others'",
    "paired_better": "better than all others, paired",
    "paired_worse": "worse than another, paired",
}
CONTEST_HEADER = ["Phase", "Model", "Skipped", "Task", *(labels.STRATEGIES[name] for name in COMPARED), "Behind"]


def summarise(results: Results) -> dict[str, Any]:
    """All numbers of the summary, as plain data."""
    ours, cells = contests(comparisons(results, SCORE)), results.cells
    at_floor = cells.loc[cells["at_floor"], ["phase", "model", "task"]].drop_duplicates()
    return {
        "cells": int(((cells["strategy"] == OURS) & ~cells["at_floor"]).sum()),
        "ours": tally(ours),
        "paper": tally(paper_contests(results.paper)),
        "mean_retention": _mean_retention(results),
        "online": _online_learning(results),
        "contests": ours.to_dict("records"),
        **({"at_floor": at_floor.to_dict("records")} if len(at_floor) else {}),
    }


def _mean_retention(results: Results) -> list[dict[str, Any]]:
    """For each phase, fraction and strategy the mean over models (only the paper's, if any was run) and tasks.

    `ours` and `paper` are None if a cell is missing; tasks at their floor are left out.
    """
    cells = results.cells[results.cells["model"].isin(results.paper_models or results.models)]
    cells = cells[~cells["at_floor"]].assign(ours=cells["retention"].where(cells["final"]))
    found = dict(iter(cells.groupby(["phase", "fraction", "strategy"])))
    lines = []
    for phase in results.paper.tables:
        for fraction in results.fractions():
            for strategy in results.skipping:
                group = found.get((phase, fraction, strategy), cells[:0])
                line = {"phase": phase, "fraction": fraction, "strategy": strategy, "cells": len(group)}
                for name, column in (("ours", "ours"), ("paper", "paper_retention")):
                    line[name] = mean_if_whole([None if x != x else x for x in group[column]])
                lines.append(line)
    return lines


def _online_learning(results: Results) -> dict[str, Any]:
    """How often AdaSkip's learning window added FFNs, and how many, over its decode and end-to-end runs."""
    samples = results.samples[(results.samples["strategy"] == OURS) & results.samples["phase"].isin(ONLINE_PHASES)]
    added = {place: [*group] for place, group in samples.groupby(["phase", "model", "fraction"])["added_online"]}
    lines = [
        {"phase": phase, "model": model, "fraction": fraction, **_fired(added[phase, model, fraction])}
        for phase in ONLINE_PHASES
        for model in results.models
        for fraction in results.fractions(model)
        if (phase, model, fraction) in added
    ]
    return {**_fired([*samples["added_online"]]), "runs": lines}


def _fired(added: Sequence[int]) -> dict[str, Any]:
    fired = [count for count in added if count > 0]
    return {
        "requests": len(added),
        "fired": len(fired),
        "mean_added": mean(added) if added else None,
        "mean_added_when_fired": mean(fired) if fired else None,
        "most_added": max(added, default=None),
    }


def to_text(summary: dict[str, Any]) -> str:
    """The document `summary.md`."""
    parts = ["# Summary", *headline(summary), "## AdaSkip against the other three strategies"]
    parts += [
        "A cell is one task of one model in one phase at one budget; it counts if the runs of all four strategies are "
        "finished. The last three columns use 95 % bootstrap intervals, not corrected for the number of cells: "
        "AdaSkip's interval is above those of all others; the interval of the paired difference, over the same "
        "samples, is above zero against every other strategy, or below zero against one.",
        pipe_table(["", *COUNTS.values()], list(_tally_lines(summary))),
    ]
    if lost := [contest for contest in summary["contests"] if contest["outcome"] != "best"]:
        parts += ["Where AdaSkip is not the best:", pipe_table(CONTEST_HEADER, [_contest_line(each) for each in lost])]
    parts += ["## Retention (score / full model's score), mean over models and tasks", _retention(summary)]
    if summary["online"]["runs"]:
        parts += ["## Online learning: FFN sublayers added after the window", _online(summary["online"])]
    return "\n\n".join(parts) + "\n"


def headline(summary: dict[str, Any]) -> list[str]:
    """The main results in sentences: ours, the paper's, and online learning."""
    ours, online = summary["ours"], summary["online"]
    left_out = summary["cells"] - ours["compared"]
    incomplete = f" {left_out} of {summary['cells']} cells are not complete." if left_out else ""
    lines = [f"Here AdaSkip {claim(ours)}{incomplete}{beyond_chance(ours)}"]
    if places := summary.get("at_floor"):
        each = (f"{p['model']} {labels.PHASES[p['phase']]} {labels.TASKS[p['task']]}" for p in places)
        lines.append(f"Left out, since their scores are at the floor: {', '.join(each)}.")
    if summary["paper"]["compared"]:
        lines.append(f"In the paper's own tables AdaSkip {claim(summary['paper'])}")
    if online["requests"]:
        lines.append(
            f"The learning window added FFN sublayers in {online['fired']} of {online['requests']} requests "
            f"({_share(online)}), {online['mean_added']:.2f} per request on average and {online['most_added']} at most."
        )
    return lines


def _tally_lines(summary: dict[str, Any]) -> Iterator[list[str]]:
    """Rows of the tallies; the paper has no samples, so its intervals are unknown."""
    for whose, known in (("ours", len(COUNTS)), ("paper", 4)):
        found = summary[whose]
        lines = {f"**{whose}**": found}
        lines |= {f"{whose}, {labels.PHASES[phase]}": counts for phase, counts in found["by_phase"].items()}
        lines |= {f"{whose}, {labels.budget(float(f))}": counts for f, counts in found["by_fraction"].items()}
        lines |= {f"{whose}, {model}": counts for model, counts in found["by_model"].items()}
        for name, counts in lines.items():
            numbers = [str(counts[column]) for column in COUNTS]
            yield [name, *numbers[:known], *[labels.UNPUBLISHED] * (len(COUNTS) - known)]


def _contest_line(contest: dict[str, Any]) -> list[str]:
    top = max(contest["scores"].values())
    scores = [f"**{score:.1f}**" if score == top else f"{score:.1f}" for score in contest["scores"].values()]
    behind = "significantly" if contest["paired_worse"] else "not significantly"
    place = [labels.PHASES[contest["phase"]], contest["model"], labels.budget(contest["fraction"])]
    return [*place, labels.TASKS[contest["task"]], *scores, "tied" if contest["outcome"] == "tied" else behind]


def _retention(summary: dict[str, Any]) -> str:
    """A table with a row per strategy and a column per phase and budget: ours / the paper's."""
    rows: dict[str, dict[str, str]] = {}
    for line in summary["mean_retention"]:
        ours, paper = (None if line[name] is None else f"{100 * line[name]:.1f}" for name in ("ours", "paper"))
        column = f"{labels.PHASES[line['phase']]} {labels.budget(line['fraction'])}"
        row = rows.setdefault(line["strategy"], {"ours / paper, per cent": labels.STRATEGIES[line["strategy"]]})
        row[column] = f"{ours or labels.MISSING} / {paper or labels.UNPUBLISHED}"
    return pipe_table(list(next(iter(rows.values()))), [[*row.values()] for row in rows.values()])


def _online(online: dict[str, Any]) -> str:
    header = ["Phase", "Model", "Skipped", "requests", "fired", "added, mean", "added when fired, mean", "added, most"]
    places = [
        [labels.PHASES[run["phase"]], run["model"], labels.budget(run["fraction"]), *_fired_texts(run)]
        for run in online["runs"]
    ]
    return pipe_table(header, [*places, ["**all**", "", "", *_fired_texts(online)]])


def _fired_texts(counts: dict[str, Any]) -> list[str]:
    means = (labels.ratio(counts[name]) for name in ("mean_added", "mean_added_when_fired"))
    most = labels.MISSING if counts["most_added"] is None else str(counts["most_added"])
    return [str(counts["requests"]), f"{counts['fired']} ({_share(counts)})", *means, most]


def _share(counts: dict[str, Any]) -> str:
    return f"{100 * counts['fired'] / counts['requests']:.0f} %" if counts["requests"] else labels.MISSING
