"""Writes run folders as the runner does, with answers right as often as asked: results are tested without models."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

from adaskip.runs.cells import Cell, load_setup
from adaskip.runs.folder import RunFolder

CLASSES = ["Number of something", "Food", "Date", "Individual"]
WORDS = [
    "river",
    "stone",
    "copper",
    "lantern",
    "meadow",
    "harbor",
    "winter",
    "garden",
    "silver",
    "falcon",
    "orchard",
    "bridge",
]


def write_run(
    runs_dir: Path,
    cell: Cell,
    quality: float | Mapping[str, float],
    *,
    num_samples: int = 12,
    expected: int | None = None,
    num_layers: int = 16,
    online_ffns: int = 0,
    speedup: float = 1.0,
    loss: float | None = None,
    first: int = 0,
) -> Path:
    """Write one cell's folder and return it.

    Args:
        quality: the share of right answers (of kept words, in a summary), for every task or by task.
        expected: how many records the manifest promises; `num_samples` if not given.
        online_ffns: FFNs added online to every second request.
        loss: mean `reference_loss` of a task's records; if not given, they are as records were that held none.
        first: index of the first record.
    """
    tasks = load_setup("testbed").phases[cell.phase].tasks
    folder = cell.folder(runs_dir)
    folder.mkdir(parents=True)
    for task in tasks:
        chance = quality[task] if isinstance(quality, Mapping) else quality
        added = lambda index: online_ffns if index % 2 else 0  # noqa: E731
        records = [
            {**_record(cell, task, index, chance, num_layers, added(index), speedup), **_loss(index, loss)}
            for index in range(first, first + num_samples)
        ]
        run_folder = RunFolder(folder)
        run_folder.append(task, records)
        run_folder.merge(task, [record["id"] for record in records], batch_size=1)
    manifest = _manifest(cell, dict.fromkeys(tasks, expected or num_samples), num_layers)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def _manifest(cell: Cell, tasks: dict[str, int], num_layers: int) -> dict:
    return {
        "run_name": cell.run_name,
        "model": cell.model,
        "testbed": True,
        "strategy": cell.strategy,
        "phase": cell.phase,
        "tasks": tasks,
        "num_layers": num_layers,
        "checkpoint": f"testbed/{cell.model}",
        "device": "cpu",
        "dtype": "float32",
        "finished": "2025-01-01T00:00:00+00:00",
    }


def _record(cell: Cell, task: str, index: int, chance: float, num_layers: int, added: int, speedup: float) -> dict:
    draw = random.Random(f"{task} {index}")  # the same sample of every run: answers differ by quality only
    words = draw.sample(WORDS, 8)
    luck = [draw.random() for _ in words]
    if task in ("gov_report", "multi_news"):
        reference = " ".join(words)
        prediction = " ".join(word if lot < chance else "and" for word, lot in zip(words, luck, strict=True))
    else:
        reference = draw.choice(CLASSES) if task == "trec" else " ".join(words[:2])
        prediction = reference if luck[0] < chance else ""
    return {
        "id": f"{task}-{index}",
        "task": task,
        "index": index,
        "prediction": prediction,
        "references": [reference],
        "all_classes": CLASSES if task == "trec" else None,
        "length": 700,
        "prompt_tokens": 800,
        "new_tokens": 40,
        "ttft_s": (0.2 + 0.01 * luck[1]) / speedup,
        "tpot_ms": (8 + luck[2]) / speedup,
        "kv_bytes": 1000 * (2 * num_layers - cell.sublayers),
        **_plan(cell, num_layers, added),
    }


def _loss(index: int, mean: float | None) -> dict:
    """The same spread about the mean in every run."""
    return {} if mean is None else {"reference_loss": mean + 0.1 * (index % 2) - 0.05, "reference_tokens": 7}


def _plan(cell: Cell, num_layers: int, added: int) -> dict:
    """Whole layers from the end; for AdaSkip attention from the end and FFN from the start, to be told apart."""
    count = cell.sublayers // 2
    last = list(range(num_layers - count, num_layers))
    skipped = {"attention": last, "ffn": list(range(1, 1 + count)) if cell.strategy == "adaskip" else last}
    online = list(range(6, 6 + added))
    nothing: dict[str, list[int]] = {"attention": [], "ffn": []}
    decode = {"attention": skipped["attention"], "ffn": sorted({*skipped["ffn"], *online})}
    return {
        "plan": {"prefill": nothing if cell.phase == "decode" else skipped, "decode": decode},
        "online_ffns": online,
    }
