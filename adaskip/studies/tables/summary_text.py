"""The summary as Markdown; every number in it comes from `summary.summarise`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from adaskip.common.pipe_table import pipe_table
from adaskip.studies.tables import labels
from adaskip.studies.tables.results import COMPARED

COUNTS = {
    "compared": "cells",
    "best": "best",
    "tied": "tied",
    "beaten": "beaten",
    "interval_above": "interval above all others'",
    "paired_better": "better than all others, paired",
    "paired_worse": "worse than another, paired",
}


def to_text(summary: dict[str, Any]) -> str:
    """The document `summary.md`."""
    parts = ["# Summary", *headline(summary), "## AdaSkip against the other three strategies"]
    parts += [
        "A cell is one task of one model in one phase at one budget; it counts once all four strategies have run "
        "to their end. The last three columns use 95 % bootstrap intervals, not corrected for the number of cells: "
        "AdaSkip's lies above each other's; that of the paired difference, over the same samples, lies above zero "
        "against each other strategy, or below zero against one.",
        pipe_table(["", *COUNTS.values()], list(_tally_lines(summary))),
    ]
    if lost := [contest for contest in summary["contests"] if contest["outcome"] != "best"]:
        parts += ["Where AdaSkip is not the best:", pipe_table(_CONTEST_HEADER, list(_contest_lines(lost)))]
    parts += ["## Retention (score / full model's score), mean over models and tasks", _retention(summary)]
    if summary["online"]["runs"]:
        parts += ["## Online learning: FFN sublayers added after the window", _online(summary["online"])]
    return "\n\n".join(parts) + "\n"


def headline(summary: dict[str, Any]) -> list[str]:
    """The answers in plain sentences: ours, the paper's, and the online window's."""
    ours, paper, online = summary["ours"], summary["paper"], summary["online"]
    left_out = summary["cells"] - ours["compared"]
    lines = [
        f"Here AdaSkip {_claim(ours)}"
        + (f" {left_out} of {summary['cells']} cells are not complete." if left_out else "")
    ]
    if ours["compared"]:
        lines[0] += (
            f" Its lead over every other strategy is beyond chance (paired bootstrap) in {ours['paired_better']} "
            f"cells, and it is beyond chance behind another in {ours['paired_worse']}."
        )
    if places := summary.get("at_floor"):
        named = ", ".join(
            f"{each['model']} {labels.PHASES[each['phase']]} {labels.task(each['task'])}" for each in places
        )
        lines.append(f"At their floor, where scores do not count: {named}.")
    lines.append(f"In the paper's own tables AdaSkip {_claim(paper)}")
    if online["requests"]:
        lines.append(
            f"The online window added FFN sublayers in {online['fired']} of {online['requests']} requests "
            f"({_percent(online['fired'], online['requests'])}), {online['mean_added']:.2f} a request on average and "
            f"{online['most_added']} at most."
        )
    return lines


def _claim(tally: dict[str, Any]) -> str:
    """`is the best ... in 40 of 42 cells (95 %), tied for it in 1 and beaten in 1.`"""
    if not tally["compared"]:
        return "cannot be compared yet: no cell has all four strategies run to their end."
    share = _percent(tally["best"], tally["compared"])
    return (
        f"is the best of the four strategies in {tally['best']} of {tally['compared']} cells ({share}), "
        f"tied for the best in {tally['tied']} and beaten in {tally['beaten']}."
    )


def _tally_lines(summary: dict[str, Any]) -> Iterator[list[str]]:
    for whose in ("ours", "paper"):
        tally = summary[whose]
        yield [f"**{whose}**", *_counts(tally, whose)]
        for axis, label in (("phase", labels.PHASES.get), ("fraction", _budget), ("model", str)):
            for value, counts in tally[f"by_{axis}"].items():
                yield [f"{whose}, {label(value)}", *_counts(counts, whose)]


def _counts(tally: dict[str, int], whose: str) -> list[str]:
    """The counts as text; the paper prints no samples, so its intervals are unknown."""
    known = COUNTS if whose == "ours" else ("compared", "best", "tied", "beaten")
    return [str(tally[name]) if name in known else labels.UNPUBLISHED for name in COUNTS]


_CONTEST_HEADER = ["Phase", "Model", "Skipped", "Task", *(labels.STRATEGIES[name] for name in COMPARED), "Behind"]


def _contest_lines(contests: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for contest in contests:
        top = max(contest["scores"].values())
        scores = [(f"**{score:.1f}**" if score == top else f"{score:.1f}") for score in contest["scores"].values()]
        verdict = (
            "tied" if contest["outcome"] == "tied" else "beyond chance" if contest["paired_worse"] else "within chance"
        )
        place = [labels.PHASES[contest["phase"]], contest["model"], labels.budget(contest["fraction"])]
        yield [*place, labels.task(contest["task"]), *scores, verdict]


def _retention(summary: dict[str, Any]) -> str:
    """A row per strategy, a column per phase and budget, each cell ours / the paper's."""
    lines = summary["mean_retention"]
    columns = list(dict.fromkeys((line["phase"], line["fraction"]) for line in lines))
    header = [
        "ours / paper, per cent",
        *(f"{labels.PHASES[phase]} {labels.budget(fraction)}" for phase, fraction in columns),
    ]
    found = {(line["phase"], line["fraction"], line["strategy"]): line for line in lines}
    rows = [
        [labels.STRATEGIES[strategy], *(_ours_and_paper(found[*column, strategy]) for column in columns)]
        for strategy in dict.fromkeys(line["strategy"] for line in lines)
    ]
    return pipe_table(header, rows)


def _ours_and_paper(line: dict[str, Any]) -> str:
    ours = labels.MISSING if line["ours"] is None else f"{100 * line['ours']:.1f}"
    paper = labels.UNPUBLISHED if line["paper"] is None else f"{100 * line['paper']:.1f}"
    return f"{ours} / {paper}"


def _online(online: dict[str, Any]) -> str:
    header = ["Phase", "Model", "Skipped", "requests", "fired", "added, mean", "added when fired, mean", "added, most"]
    places = [
        [labels.PHASES[run["phase"]], run["model"], labels.budget(run["fraction"]), *_fired(run)]
        for run in online["runs"]
    ]
    return pipe_table(header, [*places, ["**all**", "", "", *_fired(online)]])


def _fired(counts: dict[str, Any]) -> list[str]:
    means = [counts["mean_added"], counts["mean_added_when_fired"]]
    return [
        str(counts["requests"]),
        f"{counts['fired']} ({_percent(counts['fired'], counts['requests'])})",
        *(labels.ratio(value) for value in means),
        labels.MISSING if counts["most_added"] is None else str(counts["most_added"]),
    ]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else labels.MISSING


def _budget(fraction: str) -> str:
    return labels.budget(float(fraction))
