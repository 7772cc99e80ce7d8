"""Measures IO similarity sample by sample and saves it, a folder per model, task and phase, continuing after a kill.

All observations share these measurements: what one script has measured, the next one finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from adaskip.benchmarks.protocol import Benchmark
from adaskip.calibration.measure import UNITS, Measurement, measure
from adaskip.common.errors import RunError
from adaskip.models.loading import LoadedModel
from adaskip.runs.folder import RunFolder
from adaskip.runs.loading import find_loading
from adaskip.runs.manifest import describe_model
from adaskip.runs.records import Sample, find_records, fingerprint, prompt_ids
from adaskip.runs.runner import stop_token_ids
from adaskip.studies.observations.settings import MEASUREMENTS, ObserveConfig, Target

DIGITS = 6
"""Decimals that are saved; float32 sums have no more."""
SIMILARITY, SCALE = 0, 1


def measure_targets(config: ObserveConfig, targets: Iterable[Target]) -> None:
    """Measure every target on every chosen model; what is finished is passed over without loading the model.

    Raises:
        ValueError: the configuration cannot be run, or a folder holds other measurements or is in use.
        RunError: measuring failed half-way.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    targets = list(dict.fromkeys(targets))
    for model in config.chosen_models:
        for target in targets:
            _measure_target(config, model, target)


def _measure_target(config: ObserveConfig, model: str, target: Target) -> None:
    folder = RunFolder(config.out_dir / MEASUREMENTS / config.label(model) / target.folder_name)
    records = find_records(config)
    samples = records.scored(target.task, config.limit or config.observations.limit)
    description = _describe(config, model, target, samples)
    loading = find_loading(config, model)
    with folder.lock():
        folder.check({**description, **loading.source.model_files})
        if (held := folder.read_manifest()) is not None and held["finished"]:
            return
        loaded = loading.load()
        folder.start({**description, **describe_model(loaded), **loading.source.model_files})
        _fill(folder, records.benchmark, target, samples, loaded, description)
        folder.finish()


def _describe(config: ObserveConfig, model: str, target: Target, samples: Sequence[Sample]) -> dict[str, Any]:
    """The part of the manifest that is known before the model is loaded."""
    decode, cap = target.phase == "decode", None
    if decode:
        task = config.find_benchmark().task(target.task)
        cap = config.max_new_tokens or config.setup.phases["decode"].cap(task)
    return {
        "measured": "IO similarity and scale",
        "model": model,
        "label": config.label(model),
        "benchmark": config.benchmark,
        "given_checkpoint": config.checkpoint,
        "task": target.task,
        "phase": target.phase,
        "samples": len(samples),
        "batch_size": config.batch_size or config.observations.batch_size,
        "max_new_tokens": cap,
        "windows": list(config.observations.windows) if decode else [],
        "max_prompt_tokens": config.max_prompt_tokens,
        "seed": config.seed,
        "data_fingerprint": fingerprint(samples),
    }


def _fill(
    folder: RunFolder,
    benchmark: Benchmark,
    target: Target,
    samples: Sequence[Sample],
    loaded: LoadedModel,
    description: dict[str, Any],
) -> None:
    """Measure what is missing, batch by batch."""
    size = description["batch_size"]
    ids = [sample["_id"] for sample in samples]
    missing = folder.merge(target.task, ids, size)
    done = len(samples) - sum(len(samples[start : start + size]) for start in missing)
    label = f"{description['label']} {target.task} {target.phase}"
    with tqdm(total=len(samples), initial=done, desc=label, unit="sample", disable=None) as bar:
        for start in missing:
            batch = samples[start : start + size]
            try:
                folder.append(target.task, _measure_batch(benchmark, target, start, batch, loaded, description))
            except (RuntimeError, MemoryError, OSError) as error:
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                raise RunError(
                    f"{label} stopped at samples {start} to {start + len(batch) - 1}: {reason}; "
                    "those made before are kept and the same command continues"
                ) from error
            bar.update(len(batch))
    folder.merge(target.task, ids, size)


def _measure_batch(
    benchmark: Benchmark,
    target: Target,
    start: int,
    batch: Sequence[Sample],
    loaded: LoadedModel,
    description: dict[str, Any],
) -> list[dict[str, Any]]:
    prompts = prompt_ids(benchmark, target.task, batch, loaded, description["max_prompt_tokens"])
    answers: dict[str, Any] = {}
    if target.phase == "decode":
        ends = stop_token_ids(benchmark.task(target.task), loaded)
        answers = {
            **{"max_new_tokens": description["max_new_tokens"], "eos_token_ids": ends},
            "windows": description["windows"],
        }
    measured = list(measure(loaded.model, prompts, phase=target.phase, batch_size=len(batch), **answers))
    return [
        {
            "id": sample["_id"],
            "index": start + offset,
            "prompt_tokens": len(prompts[offset]),
            **_as_record(measured[offset] if measured else None),  # none if every answer was empty
        }
        for offset, sample in enumerate(batch)
    ]


def _as_record(measured: Measurement | None) -> dict[str, Any]:
    """Token means of one sample, rounded; of windows only the FFNs, and only where tokens follow the window."""
    tokens = 0 if measured is None else int(measured.tokens)
    if measured is None or tokens == 0:
        return {"tokens": 0, **dict.fromkeys(UNITS), "windows": {}}
    means = measured.means()
    units = {
        unit: {"similarity": _rounded(means[i, :, SIMILARITY]), "scale": _rounded(means[i, :, SCALE])}
        for i, unit in enumerate(UNITS)
    }
    windows = {
        str(size): _split_ffns(measured, first)
        for size, first in measured.windows.items()
        if int(first.tokens) < tokens
    }
    return {"tokens": tokens, **units, "windows": windows}


def _split_ffns(whole: Measurement, first: Measurement) -> dict[str, list[float]]:
    """FFN similarity in the window and in the rest of the answer. Paper: Table 2."""
    rest = Measurement(whole.sums.double() - first.sums.double(), whole.tokens - first.tokens)
    ffn = UNITS.index("ffn")
    return {name: _rounded(part.means()[ffn, :, SIMILARITY]) for name, part in (("first", first), ("rest", rest))}


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]
