"""Fidelity: the task's metric of an answer against the full model's own answer to the same sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from adaskip.benchmarks import scoring
from adaskip.benchmarks.longbench import get_task


def fidelity(task: str, records: Iterable[Mapping[str, Any]], full_answers: Mapping[str, str]) -> dict[str, float]:
    """By record id, in [0, 1]; a record without an answer of the full model has none.

    What the task's metric reads of both answers is compared, for some tasks the first line. Equal answers, empty ones
    too, have fidelity 1, whatever the metric makes of them; an empty answer and one that is not have 0.

    full_answers: the full model's predictions by record id.
    """
    found: dict[str, float] = {}
    pairs = []
    for record in records:
        if record["id"] not in full_answers:
            continue
        ours, full = (_read(task, answer) for answer in (record["prediction"], full_answers[record["id"]]))
        if ours == full or not ours or not full:
            found[record["id"]] = float(ours == full)
        elif record["all_classes"]:
            found[record["id"]] = _same_classes(task, ours, full, tuple(record["all_classes"]))
        else:
            found[record["id"]] = 0.0  # its place in the order; the score follows
            pairs.append({**record, "prediction": ours, "references": [full]})
    scored = scoring.score_samples(task, pairs).per_sample
    return found | dict(zip((pair["id"] for pair in pairs), scored, strict=True))


def _read(task: str, answer: str) -> str:
    """What the task's metric reads of an answer."""
    return (answer.lstrip("\n").split("\n")[0] if get_task(task).first_line_only else answer).strip()


def _same_classes(task: str, ours: str, full: str, classes: Sequence[str]) -> float:
    """Classes that both answers name / classes that either names.

    The full model's answer is seldom a bare class name, as the metric demands of a reference. Where it names one class,
    this is what the metric gives for that class as the reference. An answer that names no class has 0.
    """
    mine, theirs = (_named(task, answer, tuple(classes)) for answer in (ours, full))
    return len(mine & theirs) / len(mine | theirs) if mine | theirs else 0.0


@lru_cache(maxsize=4096)
def _named(task: str, answer: str, classes: tuple[str, ...]) -> frozenset[str]:
    """The classes that an answer names, as the metric finds them."""
    samples = [{"prediction": answer, "references": [name], "all_classes": classes} for name in classes]
    scores = scoring.score_samples(task, samples).per_sample
    return frozenset(name for name, score in zip(classes, scores, strict=True) if score > 0)
