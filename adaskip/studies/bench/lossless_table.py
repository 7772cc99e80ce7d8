"""What the saved answers of `speed/lossless.py` show: differing tokens, acceptance, speedup, break-even."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from adaskip.common.intervals import ratio_estimate
from adaskip.common.pipe_table import pipe_table
from adaskip.speculative.draft_length import break_even_acceptance, expected_speedup
from adaskip.speculative.statistics import DraftStatistics

FULL_MODEL = "full"
HEADER = (
    "model",
    "draft",
    "attention + FFN skipped",
    "answers",
    "differing",
    "acceptance a",
    "tokens per verification",
    "cost c of a drafted token",
    "break-even a",
    "speedup expected from a and c",
    "speedup measured",
)
NOTES = """# Lossless mode against the full model

Greedy answers, decode time after the first token, full model / lossless, ratio of means with a 95 % bootstrap interval
over prompts. c: what drafting and verifying a token takes beyond one decode step of the full model a round, in such
steps, host time included. A round of g drafted tokens yields (1 - a^(g+1)) / (1 - a) tokens in the time of 1 + g c
steps; below break-even it is slower than the full model."""


def render(paths: Sequence[Path]) -> str:
    """The table of all saved files as Markdown."""
    saved = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    lines = [line for each in saved for line in _rows(each)]
    compared, differing = (sum(int(line[i]) for line in lines) for i in (3, 4))
    total = f"{compared} answers compared with stock `generate`, {differing} differing."
    return "\n\n".join([NOTES, total, *dict.fromkeys(map(_where, saved)), pipe_table(list(HEADER), lines)]) + "\n"


def _where(saved: dict[str, Any]) -> str:
    of = saved["manifest"]
    versions = ", ".join(f"{name} {of['versions'][name]}" for name in ("torch", "transformers"))
    return f"{of['device_name']} ({of['device']}), {of['threads']} CPU threads, {of['dtype']}, {versions}."


def _rows(saved: dict[str, Any]) -> Iterator[list[str]]:
    """One line of the table per draft of a saved file."""
    answers = [record["answers"] for record in saved["records"]]
    full_s = [each[FULL_MODEL]["decode_s"] for each in answers]
    steps = sum(len(each[FULL_MODEL]["tokens"]) - 1 for each in answers)
    step_s = sum(full_s) / steps
    for draft in saved["manifest"]["drafts"]:
        mine = [each[draft] for each in answers]
        seen = DraftStatistics()
        for each in mine:
            seen += DraftStatistics(**{field.name: each[field.name] for field in fields(DraftStatistics)})
        differing = sum(each[draft]["tokens"] != each[FULL_MODEL]["tokens"] for each in answers)
        plan = saved["manifest"]["plans"][draft]
        speedup = ratio_estimate(full_s, [each["decode_s"] for each in mine])
        assert speedup is not None, "every answer takes time"
        yield [
            saved["manifest"]["model"],
            draft,
            f"{len(plan['attention'])} + {len(plan['ffn'])}",
            str(len(mine)),
            str(differing),
            *_costs(seen, step_s),
            f"{speedup.value:.3f} [{speedup.low:.3f}, {speedup.high:.3f}]",
        ]


def _costs(seen: DraftStatistics, step_s: float) -> list[str]:
    """Acceptance, tokens per verification, cost of a drafted token, break-even acceptance, expected speedup."""
    if not seen.draft_forwards or seen.acceptance_rate is None or seen.tokens_per_verify is None:
        return ["n/a"] * 5
    drafted = seen.draft_forwards / seen.verify_forwards
    cost = (seen.draft_s + seen.verify_s - seen.verify_forwards * step_s) / seen.draft_forwards / step_s
    length = max(1, round(drafted))
    even = break_even_acceptance(cost, length)
    return [
        f"{seen.acceptance_rate:.3f}",
        f"{seen.tokens_per_verify:.2f}",
        f"{cost:.3f}",
        "none" if even is None else f"{even:.3f}",
        f"{expected_speedup(seen.acceptance_rate, length, cost):.3f}",
    ]
