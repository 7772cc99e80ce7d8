"""The importance check: skip the most and the least similar whole layers and see what the task's metric says.

Runs are cells like any other, so they continue where they were stopped. Their scores are kept in one JSON file, of
which table and figure are made. The paper had a GPT judge score the answers.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from adaskip.common.files import write_text_atomic
from adaskip.common.locks import exclusive
from adaskip.runs.config import RunConfig, SharedConfig
from adaskip.runs.job import resolve
from adaskip.runs.manifest import is_done
from adaskip.runs.runner import run
from adaskip.strategies import LeastSkip, MostSkip
from adaskip.studies.observations.saved import NotMeasuredError, drawing_order
from adaskip.studies.observations.settings import CheckSpec, ObserveConfig
from adaskip.studies.tables.runs import load_run
from adaskip.studies.tables.scores import score_run

SCORES_FILE = "importance_scores.json"
STRATEGIES = (MostSkip.name, LeastSkip.name)
PROVENANCE = (
    "checkpoint",
    "weights_fingerprint",
    "dtype",
    "device",
    "batch_size",
    "data_fingerprint",
    "profile_fingerprint",
)


def measure_check(config: ObserveConfig) -> None:
    """Run and score the check on every chosen model and keep the scores.

    Raises:
        ValueError: a run cannot be, or its folder holds another or is in use.
        RunError: a run failed half-way.
    """
    if config.max_prompt_tokens is not None:
        raise ValueError("--max-prompt-tokens is for measuring; the importance check runs whole cells: leave it out")
    spec = config.observations.check
    for model in config.chosen_models:
        full = _ensure(config, spec, model, "full", 0)
        depth = load_run(full).num_layers
        entry: dict[str, Any] = {"num_layers": depth, "phase": spec.phase, "full": _scores(full)}
        for strategy in STRATEGIES:
            folders = {n: _ensure(config, spec, model, strategy, n) for n in spec.layers if n < depth}
            entry[strategy] = {str(n): _scores(folder) for n, folder in folders.items()}
            entry["sources"] = _sources(next(iter(folders.values()), full))
        _keep(config.out_dir / SCORES_FILE, config.label(model), entry)


def load_check(out_dir: Path) -> dict[str, Any]:
    """What `measure_check` kept, by model, in the order in which they are drawn."""
    path = out_dir / SCORES_FILE
    try:
        check = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotMeasuredError(f"{path} does not exist; leave out --draw-only") from None
    return {model: check[model] for model in sorted(check, key=drawing_order)}


def _ensure(config: ObserveConfig, spec: CheckSpec, model: str, strategy: str, layers: int) -> Path:
    """The finished folder of one run; loads no model where it is already there."""
    shared = {field.name: getattr(config, field.name) for field in fields(SharedConfig)}
    job_config = RunConfig(
        **shared,
        model=model,
        phase=spec.phase,
        strategy=strategy,
        skip_full_layer_num=None if strategy == "full" else layers,
        tasks=config.tasks or spec.tasks,
        limit=config.limit or spec.limit,
        batch_size=config.batch_size or config.observations.batch_size,
        max_new_tokens=config.max_new_tokens,
        output_dir=str(config.out_dir / "runs"),
    )
    job = resolve(job_config)
    if not is_done(job):
        run(job_config, show_progress=True)
    return job.folder.path


def _scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Metric and each sample's score, by task."""
    return {
        task: {"metric": scored.main.metric, "scores": list(scored.main.by_id.values())}
        for task, scored in score_run(load_run(folder)).tasks.items()
    }


def _sources(folder: Path) -> dict[str, Any]:
    manifest = load_run(folder).manifest
    return {name: manifest[name] for name in (*PROVENANCE, "max_new_tokens", "versions") if name in manifest}


def _keep(path: Path, label: str, entry: dict[str, Any]) -> None:
    """Put one model's scores into the file beside the others', which may come at the same time."""
    with exclusive(path.with_suffix(".lock"), wait=True):
        held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        text = json.dumps({**held, label: entry}, ensure_ascii=False, allow_nan=False)
        write_text_atomic(path, text + "\n")
