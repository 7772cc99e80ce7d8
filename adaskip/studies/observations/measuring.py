"""Measures IO similarity sample by sample and saves it, a folder per model, task and phase.

All observations share these measurements. A stopped measurement continues.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm

from adaskip.calibration.measure import Measurement, measure
from adaskip.models.loading import LoadedModel
from adaskip.profiles.importance import UNITS
from adaskip.runs.folder import RunFolder
from adaskip.runs.job import Job, resolve
from adaskip.runs.loading import prepare_torch
from adaskip.runs.manifest import describe_model
from adaskip.runs.records import fingerprint, prompt_ids
from adaskip.runs.runner import failure_as_run_error, stop_token_ids
from adaskip.studies.observations.saved import MEASUREMENTS
from adaskip.studies.observations.settings import ObserveConfig, Target

DIGITS = 6
"""Decimals that are saved; float32 sums are not more exact."""
SIMILARITY, SCALE = 0, 1


def measure_targets(config: ObserveConfig, targets: Iterable[Target]) -> None:
    """Measure every target on every model; finished ones are skipped without loading the model.

    Raises:
        ValueError: the configuration is invalid, or a folder contains other measurements or is in use.
        RunError: measuring failed half-way.
    """
    prepare_torch(config)
    for model in config.models:
        for target in dict.fromkeys(targets):
            _measure_target(config, model, target)


def _measure_target(config: ObserveConfig, model: str, target: Target) -> None:
    options = {"limit": config.num_samples, "max_new_tokens": config.max_new_tokens}
    job = resolve(config.run_config(model, phase=target.phase, tasks=(target.task,), **options))
    (part,), source, decode = job.parts, job.loading.source, target.phase == "decode"
    described = {
        "measured": "IO similarity and scale",
        "model": source.name,
        "label": config.label(model),
        "benchmark": config.benchmark,
        "given_checkpoint": config.checkpoint,
        "task": target.task,
        "phase": target.phase,
        "samples": len(part.samples),
        "batch_size": config.batch_size or config.defaults["batch_size"],
        "max_new_tokens": part.max_new_tokens if decode else None,
        "windows": list(config.defaults["windows"]) if decode else [],
        "max_prompt_tokens": config.max_prompt_tokens,
        "seed": config.seed,
        "data_fingerprint": fingerprint(part.samples),
        **source.model_files,
    }
    folder = RunFolder(config.out_dir / MEASUREMENTS / described["label"] / target.folder_name)
    with folder.lock():
        folder.check(described)
        if (held := folder.read_manifest()) is not None and held["finished"]:
            return
        loaded = job.loading.load()
        folder.start({**described, **describe_model(loaded)})
        _fill(folder, job, loaded, described)
        folder.finish()


def _fill(folder: RunFolder, job: Job, loaded: LoadedModel, described: dict[str, Any]) -> None:
    """Measure the missing batches."""
    (part,), size = job.parts, described["batch_size"]
    missing = folder.merge(part.name, part.ids, size)
    done = len(part.samples) - sum(len(part.samples[start : start + size]) for start in missing)
    label = f"{described['label']} {part.name} {job.phase}"
    with tqdm(total=len(part.samples), initial=done, desc=label, unit="sample", disable=None) as bar:
        for start in missing:
            end = min(start + size, len(part.samples))
            with failure_as_run_error(
                f"{label} stopped at samples {start} to {end - 1}",
                "earlier samples are kept; run the same command again to continue",
            ):
                folder.append(part.name, _measure_batch(job, start, end, loaded, described))
            bar.update(end - start)
    folder.merge(part.name, part.ids, size)


def _measure_batch(
    job: Job, start: int, end: int, loaded: LoadedModel, described: dict[str, Any]
) -> list[dict[str, Any]]:
    (part,) = job.parts
    batch = part.samples[start:end]
    prompts = prompt_ids(job.records.benchmark, part.name, batch, loaded)
    answers: dict[str, Any] = {}
    if job.phase == "decode":
        answers = {name: described[name] for name in ("max_new_tokens", "windows")}
        answers["eos_token_ids"] = stop_token_ids(part.task, loaded)
    measured = list(measure(loaded.model, prompts, phase=described["phase"], batch_size=len(batch), **answers))
    records = []
    for i, (sample, prompt, sums) in enumerate(zip(batch, prompts, measured, strict=True)):
        about = {"id": sample["_id"], "index": start + i, "prompt_tokens": len(prompt)}
        records.append({**about, **_as_record(sums)})
    return records


def _as_record(measured: Measurement) -> dict[str, Any]:
    """Token means of one sample, rounded; of windows only FFNs, and only if tokens follow the window."""
    tokens = int(measured.tokens)
    if tokens == 0:
        return {"tokens": 0, **dict.fromkeys(UNITS), "windows": {}}
    record: dict[str, Any] = {"tokens": tokens}
    for unit, means in zip(UNITS, measured.means(), strict=True):
        record[unit] = {"similarity": _rounded(means[:, SIMILARITY]), "scale": _rounded(means[:, SCALE])}
    record["windows"] = {}
    for size, first in measured.windows.items():
        if int(first.tokens) < tokens:
            rest = Measurement(measured.sums.double() - first.sums.double(), measured.tokens - first.tokens)
            parts = {"first": first, "rest": rest}
            ffn = UNITS.index("ffn")
            split = {name: _rounded(part.means()[ffn, :, SIMILARITY]) for name, part in parts.items()}
            record["windows"][str(size)] = split
    return record


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]
