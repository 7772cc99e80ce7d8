"""Tables 1 and 2: importance carried over between datasets, and from a request's first tokens to its rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from adaskip.common.configs import load_yaml
from adaskip.common.intervals import Estimate, mean_estimate
from adaskip.studies.observations.findings import Claim, Findings, Table
from adaskip.studies.observations.labels import KINDS, task_label
from adaskip.studies.observations.ranks import chance_hits, hits, paired_hits
from adaskip.studies.observations.saved import Saved
from adaskip.studies.observations.settings import Target
from adaskip.studies.tables import labels

MIN_REST = 10
"""Tokens that must follow the window for a request to count."""


@dataclass(frozen=True)
class Hit:
    """One cell: hits among the k most similar, beside a random ranking's and the paper's."""

    k: int
    ours: Estimate | None
    chance: float
    paper: float | None

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "ours": self.ours.as_dict() if self.ours else None}

    @property
    def text(self) -> str:
        if self.ours is None:
            return labels.MISSING
        interval = "" if self.ours.low is None else f" [{self.ours.low:.2f}, {self.ours.high:.2f}]"
        return f"{self.ours.value:.2f}{interval}"

    @property
    def paper_text(self) -> str:
        return labels.UNPUBLISHED if self.paper is None else f"{self.paper:.2f}"


@dataclass(frozen=True)
class Row:
    """One line: what it compares, over how many samples, and a cell per k."""

    labels: tuple[str, ...]
    samples: int
    cells: tuple[Hit, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"row": list(self.labels), "samples": self.samples, "hits": [cell.as_dict() for cell in self.cells]}


def find_offline(saved: Saved, pairs: Sequence[tuple[str, str]], stand_ins: Mapping[str, str]) -> Findings:
    """Table 1. pairs: (calibrated on, applied to), by the paper's datasets; stand_ins: what was measured for them."""
    published = _Published("offline_hit_rate")
    rows = []
    for model, kind, (first, second) in product(saved, KINDS, pairs):
        source, destination = (saved[model][Target(stand_ins.get(task, task), "prefill")] for task in (first, second))
        profile, samples = source.profile(kind), destination.similarity(kind)
        cells = [
            _hit(
                k,
                hits(profile, samples, k),
                source.num_layers,
                published.find(model, kind=kind, first=first, second=second),
            )
            for k in published.ks
        ]
        named = (_named(first, stand_ins), _named(second, stand_ins))
        rows.append(Row((model, KINDS[kind], *named), len(samples), _whole(cells, published)))
    return _findings(
        saved,
        name="table1",
        title="Table 1: importance carried from one dataset to another",
        notes=[
            "Of the k most similar sublayers by the mean over one dataset's prompts, how many are among the k most "
            "similar of a prompt of another; the mean over that one's prompts."
        ],
        header=["Model", "Kind", "Calibrated on", "Applied to", "Samples"],
        rows=rows,
        published=published,
    )


def find_online(saved: Saved, tasks: Iterable[str], windows: Iterable[int]) -> Findings:
    """Table 2: FFNs in the first tokens of an answer against its rest."""
    published = _Published("online_hit_rate")
    rows = []
    for model, task, size in product(saved, tasks, windows):
        measured = saved[model][Target(task, "decode")]
        first, rest = measured.window(size, MIN_REST)
        cells = [
            _hit(k, paired_hits(first, rest, k), measured.num_layers, published.find(model, task=task, window=size))
            for k in published.ks
        ]
        rows.append(Row((model, task_label(task), str(size)), len(first), _whole(cells, published)))
    return _findings(
        saved,
        name="table2",
        title="Table 2: importance carried from a request's first tokens to its rest",
        notes=[
            "Of the k FFNs most similar in an answer's first tokens (the window), how many are among the k most "
            f"similar in its rest, which has at least {MIN_REST} tokens; over all FFNs, on the full model."
        ],
        header=["Model", "Dataset", "Window", "Samples"],
        rows=rows,
        published=published,
    )


class _Published:
    """One of the paper's tables of hits, in `configs/paper.yaml`."""

    def __init__(self, name: str):
        paper = load_yaml("paper")
        self.num_layers, block = paper["num_layers"], paper[name]
        self.source, self.model, self.ks, self._rows = block["source"], block["model"], block["k"], block["rows"]

    def find(self, model: str, **wanted: Any) -> dict[int, float]:
        """Hits by k of the row with these values; empty if the paper has no such row, or not of this model."""
        for row in self._rows if model == self.model else ():
            if all(row[name] == value for name, value in wanted.items()):
                return dict(zip(self.ks, row["hits"], strict=True))
        return {}


def _hit(k: int, counts: Sequence[float], num_layers: int, paper: Mapping[int, float]) -> Hit | None:
    """None where a model has no k layers to leave any out."""
    if k >= num_layers:
        return None
    return Hit(k, mean_estimate(counts), chance_hits(k, num_layers), paper.get(k))


def _whole(cells: Sequence[Hit | None], published: _Published) -> tuple[Hit, ...]:
    """The cells, those a model is too shallow for as missing."""
    return tuple(cell or Hit(k, None, float(k), None) for cell, k in zip(cells, published.ks, strict=True))


def _named(task: str, stand_ins: Mapping[str, str]) -> str:
    if task not in stand_ins:
        return task_label(task)
    return f"{task_label(stand_ins[task])} (for {task_label(task)})"


def _findings(
    saved: Saved, name: str, title: str, notes: list[str], header: list[str], rows: list[Row], published: _Published
) -> Findings:
    chance = {model: next(iter(parts.values())).num_layers for model, parts in saved.items()}
    depths = " and ".join(str(depth) for depth in dict.fromkeys(chance.values()))
    notes = [
        *notes,
        "Hits with 95 % bootstrap intervals over samples. Chance is a random ranking's hits, k * k / M, with "
        f"M = {depths} layers. The paper ({published.source}): {published.model}, M = {published.num_layers}, "
        "so its chance is "
        f"{', '.join(f'{chance_hits(k, published.num_layers):.2f}' for k in published.ks)}.",
    ]
    for k in published.ks:
        header = [*header, f"k = {k}", "chance", "paper"]
    cells = [
        [text for cell in row.cells for text in (cell.text, f"{cell.chance:.2f}", cell.paper_text)] for row in rows
    ]
    return Findings(
        name=name,
        title=title,
        notes=notes,
        claims=[_above_chance(rows)],
        table=Table(header, [[*row.labels, str(row.samples), *line] for row, line in zip(rows, cells, strict=True)]),
        numbers=[row.as_dict() for row in rows],
        sources={model: {t.folder_name: m.provenance for t, m in parts.items()} for model, parts in saved.items()},
        has_figure=False,
    )


def _above_chance(rows: Sequence[Row]) -> Claim:
    cells = [cell for row in rows for cell in row.cells if cell.ours is not None]
    holding = sum(_surely_above(cell) for cell in cells)
    shares = [cell.ours.value / cell.k for cell in cells if cell.ours is not None]
    mean = f"{100 * sum(shares) / len(shares):.0f} %" if shares else "nothing"
    least = f"{100 * min(shares):.0f} %" if shares else "nothing"
    by_chance = f"{100 * sum(cell.chance / cell.k for cell in cells) / len(cells):.0f} %" if cells else "nothing"
    evidence = f"On average {mean} of the k are hit (at least {least}), by chance {by_chance}."
    return Claim("The ranking carries over better than chance", holding, len(cells), evidence)


def _surely_above(cell: Hit) -> bool:
    """The whole interval lies above chance; where there is none, the value."""
    assert cell.ours is not None
    return (cell.ours.value if cell.ours.low is None else cell.ours.low) > cell.chance
