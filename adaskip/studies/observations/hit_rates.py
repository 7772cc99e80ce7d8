"""Tables 1 and 2: does importance carry over between datasets, and from the first tokens of a request to the rest?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from pandas import DataFrame

from adaskip.common.configs import load_yaml
from adaskip.common.intervals import mean_estimate
from adaskip.studies.observations.saved import Saved, most_similar, sources
from adaskip.studies.observations.settings import KINDS, Target
from adaskip.studies.study import Claim, Findings
from adaskip.studies.tables import labels

MIN_REST = 10
"""Tokens that must follow the window for a request to count."""
Row = dict[str, Any]
"""`row`: what is compared. `samples`: their number. `hits`: for each k the mean hits (`ours`), those of a random
ranking (`chance`) and the paper's."""


def find_offline(saved: Saved, pairs: Sequence[tuple[str, str]], stand_ins: Mapping[str, str]) -> Findings:
    """Table 1. pairs: (calibrated on, applied to) of the paper's datasets; stand_ins: tasks measured instead."""

    def named(task: str) -> str:
        label = Target(task, "prefill").label
        return label if task not in stand_ins else f"{Target(stand_ins[task], 'prefill').label} (for {label})"

    published, rows = load_yaml("paper")["offline_hit_rate"], []
    for model, kind, (first, second) in product(saved, KINDS, pairs):
        source, applied = (saved[model][Target(stand_ins.get(task, task), "prefill")] for task in (first, second))
        ranking, samples = source.profile(kind), applied.similarity(kind)
        paper = _published(published, model, kind=kind, first=first, second=second)
        compared = (model, KINDS[kind], named(first), named(second))
        rows.append(_row(compared, ranking, samples, published["k"], paper))
    note = (
        "Of the k most similar sublayers by the mean over one dataset's prompts, how many are among the k most "
        "similar of a prompt of another; the mean over that one's prompts."
    )
    title = "Table 1: importance carried from one dataset to another"
    return _findings("table1", title, note, ["Model", "Kind", "Calibrated on", "Applied to"], saved, rows, published)


def find_online(saved: Saved, tasks: Iterable[str], windows: Iterable[int]) -> Findings:
    """Table 2: FFNs in the first tokens of an answer, and in the rest."""
    published, rows = load_yaml("paper")["online_hit_rate"], []
    for model, task, size in product(saved, tasks, windows):
        target = Target(task, "decode")
        first, rest = saved[model][target].window(size, MIN_REST)
        paper = _published(published, model, task=task, window=size)
        rows.append(_row((model, target.label, str(size)), first, rest, published["k"], paper))
    note = (
        "Of the k FFNs most similar in an answer's first tokens (the window), how many are among the k most "
        f"similar in its rest, which has at least {MIN_REST} tokens; over all FFNs, on the full model."
    )
    title = "Table 2: importance carried from a request's first tokens to its rest"
    return _findings("table2", title, note, ["Model", "Dataset", "Window"], saved, rows, published)


def _published(table: Mapping[str, Any], model: str, **wanted: Any) -> list[float | None]:
    """The paper's hits for each k in the row with these values; None if it has no such row, or none of this model."""
    for row in table["rows"] if model == table["model"] else ():
        if all(row[name] == value for name, value in wanted.items()):
            return row["hits"]
    return [None] * len(table["k"])


def _row(
    compared: tuple[str, ...], ones: np.ndarray, others: np.ndarray, ks: Sequence[int], paper: Sequence[float | None]
) -> Row:
    """Hits among the k highest of `ones`, [M] or [N, M], and of `others`, [N, M]; none for a model of at most k layers,
    where every layer would be a hit."""
    depth, found = others.shape[1], []
    for k, printed in zip(ks, paper, strict=True):
        ours = mean_estimate(hits(ones, others, k)) if k < depth else None
        hit = {"k": k, "ours": ours and ours.as_dict(), "chance": chance_hits(k, depth) if k < depth else float(k)}
        found.append({**hit, "paper": printed if k < depth else None})
    return {"row": list(compared), "samples": len(others), "hits": found}


def hits(ones: np.ndarray, others: np.ndarray, k: int) -> list[float]:
    """For each row, how many of the k most similar in `ones`, [M] or [N, M], are among the k of `others`, [N, M]."""
    pairs = zip(np.broadcast_to(ones, others.shape), others, strict=True)
    return [float(len(set(most_similar(one, k)) & set(most_similar(other, k)))) for one, other in pairs]


def chance_hits(k: int, num_layers: int) -> float:
    """Hits of a random ranking: k * k / M."""
    return k * k / num_layers


def _findings(
    name: str, title: str, note: str, header: list[str], saved: Saved, rows: list[Row], published: Mapping[str, Any]
) -> Findings:
    depths = dict.fromkeys(next(iter(parts.values())).num_layers for parts in saved.values())
    ks, depth = published["k"], load_yaml("paper")["num_layers"]
    about = (
        "Hits with 95 % bootstrap intervals over samples. Chance is a random ranking's hits, k * k / M, with "
        f"M = {' and '.join(map(str, depths))} layers. The paper ({published['source']}): {published['model']}, M = "
        f"{depth}, so its chance is {', '.join(f'{chance_hits(k, depth):.2f}' for k in ks)}."
    )
    columns = [*header, "Samples", *(text for k in ks for text in (f"k = {k}", "chance", "paper"))]
    lines = [[*row["row"], str(row["samples"]), *(text for hit in row["hits"] for text in _texts(hit))] for row in rows]
    return Findings(
        name=name,
        title=title,
        notes=[note, about],
        claims=[_above_chance(rows)],
        table=DataFrame(lines, columns=columns),
        numbers=rows,
        sources=sources(saved),
        has_figure=False,
    )


def _texts(hit: dict[str, Any]) -> list[str]:
    ours, paper = hit["ours"], hit["paper"]
    interval = "" if ours is None or ours["low"] is None else f" [{ours['low']:.2f}, {ours['high']:.2f}]"
    text = labels.MISSING if ours is None else f"{ours['value']:.2f}{interval}"
    return [text, f"{hit['chance']:.2f}", labels.UNPUBLISHED if paper is None else f"{paper:.2f}"]


def _above_chance(rows: Sequence[Row]) -> Claim:
    """It holds if the whole interval is above chance or, without an interval, the value."""
    cells = [hit for row in rows for hit in row["hits"] if hit["ours"] is not None]
    least = [hit["ours"]["value"] if hit["ours"]["low"] is None else hit["ours"]["low"] for hit in cells]
    holding = sum(low > hit["chance"] for low, hit in zip(least, cells, strict=True))
    evidence = "On average nothing of the k are hit (at least nothing), by chance nothing."
    if cells:
        shares = [hit["ours"]["value"] / hit["k"] for hit in cells]
        by_chance = 100 * sum(hit["chance"] / hit["k"] for hit in cells) / len(cells)
        evidence = (
            f"On average {100 * sum(shares) / len(shares):.0f} % of the k are hit (at least "
            f"{100 * min(shares):.0f} %), by chance {by_chance:.0f} %."
        )
    return Claim("The ranking carries over better than chance", holding, len(cells), evidence)
