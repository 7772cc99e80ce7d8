"""Tables of what `speed/lossless.py` saved: each way to answer beside stock `generate`, by model, dtype and task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pandas import DataFrame

from adaskip.common.intervals import Estimate, mean_ratio_estimate, ratio_estimate
from adaskip.common.pipe_table import pipe_table
from adaskip.models.stories import STORIES
from adaskip.runs.cells import MODELS
from adaskip.speculative.statistics import DraftStatistics
from adaskip.studies.study import Findings

FULL_MODEL = "full"
"""Stock `generate`."""
NOTE = """\
Greedy answers, decode time after the first forward, stock `generate` / each way, for the same number of tokens: ratio
of means with a 95 % bootstrap interval over batches of prompts. The first forward of assisted generation reads the
prompt and verifies its first draft, so its decode time lacks that draft."""
Record = Mapping[str, Any]
Saved = dict[str, list[dict[str, Any]]]
"""By device's folder, the contents of its files in the order in which they are shown."""


def read_saved(out_dir: Path) -> Saved:
    """Everything saved; ValueError if nothing is."""
    files = [(path.parent.name, json.loads(path.read_text("utf-8"))) for path in out_dir.glob("*/lossless-*.json")]
    if not files:
        raise ValueError(f"nothing is saved in {out_dir}; leave out --draw-only")
    names = (*MODELS, STORIES)

    def place(file: tuple[str, dict[str, Any]]) -> tuple[int, str, str, int]:
        manifest = file[1]["manifest"]
        known = names.index(manifest["model"]) if manifest["model"] in names else len(names)
        return known, manifest["model"], manifest["dtype"], manifest["rows"]

    files.sort(key=place)
    return {folder: [saved for at, saved in files if at == folder] for folder in sorted({at for at, _ in files})}


def find(saved: Saved) -> list[Findings]:
    """Differing tokens, acceptance and speedup of every way, device by device."""
    found = []
    for folder, files in saved.items():
        rows = [_row(each, way) for each in files for way in _ways(each)]
        compared, differing = (sum(int(row[name]) for row in rows) for name in ("answers", "differing"))
        total = f"{compared} answers compared with stock `generate`, {differing} differing."
        where = dict.fromkeys(_where(each["manifest"]) for each in files)
        found.append(
            Findings(
                name="lossless",
                title="Lossless mode against the full model",
                notes=[NOTE, total, *where],
                claims=[],
                table=DataFrame(rows),
                has_figure=False,
                closing=_closing(files),
                kinds=["md"],
                subfolder=folder,
            )
        )
    return found


def _ways(saved: Record) -> list[str]:
    return [way for way in saved["records"][0]["answers"] if way != FULL_MODEL]


def _where(manifest: Record) -> str:
    versions = ", ".join(f"{name} {manifest['versions'][name]}" for name in ("torch", "transformers"))
    device = f"{manifest['device_name']} ({manifest['device']}), {manifest['threads']} CPU threads"
    clock = f", {manifest['clock']} time" if "clock" in manifest else ""
    return f"{device}, {manifest['dtype']}, {versions}{clock}."


def _row(saved: Record, way: str) -> dict[str, str]:
    """One line of the table: one way of a saved file."""
    records, manifest = saved["records"], saved["manifest"]
    plan = manifest["plans"].get(way)
    row = {
        "model": manifest["model"],
        "dtype": manifest["dtype"],
        "rows": str(manifest["rows"]),
        "way": way,
        "attention + FFN skipped": "" if plan is None else f"{len(plan['attention'])} + {len(plan['ffn'])}",
        "answers": str(sum(len(record["ids"]) for record in records)),
        "differing": str(sum(len(record["answers"][way]["differences"]) for record in records)),
    }
    return {
        **row,
        **_drafting(records, way),
        "speedup": _speedup(records, way),
    }


def _drafting(records: Sequence[Record], way: str) -> dict[str, str]:
    names = ("drafted by the skipped model", "from n-grams", "acceptance", "tokens per verification")
    if "verify_forwards" not in records[0]["answers"][way]:
        return dict.fromkeys(names, "")
    seen = DraftStatistics()
    for record in records:
        mine = record["answers"][way]
        seen += DraftStatistics(**{field.name: mine.get(field.name, 0) for field in fields(DraftStatistics)})
    a, tokens = seen.acceptance_rate, seen.tokens_per_verify
    rates = ("n/a" if a is None else f"{a:.3f}", "n/a" if tokens is None else f"{tokens:.2f}")
    return dict(zip(names, (str(seen.draft_forwards), str(seen.copied), *rates), strict=True))


def _times(records: Sequence[Record], way: str) -> list[tuple[float, float]]:
    """Per batch with more than one token, seconds of stock and of `way` for as many steps of one token as the longest
    answer of stock has."""
    times = []
    for record in records:
        full, mine = (record["answers"][name] for name in (FULL_MODEL, way))
        steps, own = (max(map(len, each["tokens"])) - 1 for each in (full, mine))
        if steps and own:
            times.append((full["decode_s"], mine["decode_s"] * steps / own))
    return times


def _speedup(records: Sequence[Record], way: str) -> str:
    times = _times(records, way)
    return _text(ratio_estimate([full for full, _ in times], [mine for _, mine in times]))


def _text(speedup: Estimate | None) -> str:
    if speedup is None:
        return "n/a"
    return f"{speedup.value:.3f}" + ("" if speedup.low is None else f" [{speedup.low:.3f}, {speedup.high:.3f}]")


def _closing(files: Sequence[Record]) -> list[str]:
    """By task, where assisted generation was measured beside, and every answer that differs."""
    compared = [each for each in files if len(_ways(each)) > len(each["manifest"]["plans"])]
    parts = [part for each in compared for part in ("## " + _name(each), _by_task(each))]
    rows = [row for each in files for row in _differing(each)]
    if rows:
        header = ["model and dtype", "way", "task", "id", "token", "two highest logits", "numbers between them"]
        parts += ["## Answers that differ, and the full model's two highest logits there", pipe_table(header, rows)]
    return parts


def _name(saved: Record) -> str:
    model, dtype, rows = (saved["manifest"][name] for name in ("model", "dtype", "rows"))
    return f"{model}, {dtype}" + ("" if rows == 1 else f", {rows} rows")


def _by_task(saved: Record) -> str:
    """Speedups by task; the last line is the mean over tasks."""
    ways, tasks = _ways(saved), list(dict.fromkeys(record["task"] for record in saved["records"]))
    groups = {task: [record for record in saved["records"] if record["task"] == task] for task in tasks}
    rows = [[task, str(len(of)), *(_speedup(of, way) for way in ways)] for task, of in groups.items()]
    means = [_text(mean_ratio_estimate([_times(of, way) for of in groups.values()])) for way in ways]
    return pipe_table(["task", "answers", *ways], [*rows, ["mean of the tasks", str(len(saved["records"])), *means]])


def _differing(saved: Record) -> list[list[str]]:
    rows = []
    for record in saved["records"]:
        for way in _ways(saved):
            for found in record["answers"][way]["differences"]:
                (first, second), spacing = found["logits"], found["spacing"]
                where = [_name(saved), way, record["task"], record["ids"][found["row"]], str(found["at"])]
                rows.append([*where, f"{first:.5g}, {second:.5g}", f"{(first - second) / spacing:.3g}"])
    return rows
