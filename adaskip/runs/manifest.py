"""The manifest of a run: what was run, on what and with which code, so that it can be trusted and continued."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adaskip.blocks import decoder_layers
from adaskip.importance import ImportanceProfile
from adaskip.models import LoadedModel, placement, weights_fingerprint
from adaskip.runs.job import Job
from adaskip.runs.sources import chat_of, fingerprint, weight_files_of
from adaskip.selection.profile import SelectionProfile

DONE, UNFINISHED, MISSING = "done", "unfinished", "missing"


def describe_job(job: Job) -> dict[str, Any]:
    """The part of the manifest that is known before the model is loaded."""
    config, chat = job.config, chat_of(job.config, job.config.model)
    where = placement(config.device, config.dtype, config.device_map)
    return {
        "run_name": job.cell.run_name,
        "model": config.model,
        "testbed": config.testbed,
        "strategy": config.strategy,
        "strategy_options": config.strategy_options or None,
        "phase": config.phase,
        "tasks": {part.name: len(part.samples) for part in job.parts},
        "max_new_tokens": {part.name: part.max_new_tokens for part in job.parts},
        "limit": job.limit,
        "subset": job.subset,
        "batch_size": job.batch_size,
        "seed": config.seed,
        "device_map": config.device_map,
        "dtype": str(where["dtype"]).removeprefix("torch."),
        "attn_implementation": config.attn_implementation,
        **({} if chat == "template" else {"chat_template": None if chat == "none" else chat}),
        "data_fingerprint": fingerprint([sample for part in job.parts for sample in part.samples]),
    }


def describe_run(
    job: Job, loaded: LoadedModel, profile: ImportanceProfile | SelectionProfile | None, profile_path: Path | None
) -> dict[str, Any]:
    """The whole manifest but for its times."""
    sublayers, depth = job.cell.sublayers, len(decoder_layers(loaded.model))
    return {
        **describe_job(job),
        "budget": {"sublayers": sublayers, "layers": sublayers / 2, "fraction": sublayers / (2 * depth)},
        **describe_model(loaded),
        "profile": None if profile_path is None else str(profile_path),
        "profile_fingerprint": None if profile is None else _digest(profile),
    }


def describe_model(loaded: LoadedModel) -> dict[str, Any]:
    """Which weights on which machine under which code."""
    model = loaded.model
    return {
        "num_layers": len(decoder_layers(model)),
        "checkpoint": _without_home(loaded.spec.checkpoint),
        "revision": loaded.spec.revision,
        "weight_files": loaded.spec.weight_files,
        "weights_fingerprint": weights_fingerprint(model),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "chat_template": loaded.spec.chat_template,
        "attn_implementation": model.config._attn_implementation,
        "device_name": device_name(model.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "adaskip")},
        },
        "git_commit": git_commit(),
    }


def _without_home(checkpoint: str) -> str:
    """A folder of this repository as seen from its root, so that results made anywhere are alike."""
    root = Path(__file__).resolve().parents[2]
    return str(Path(checkpoint).relative_to(root)) if Path(checkpoint).is_relative_to(root) else checkpoint


def is_done(job: Job) -> bool:
    """Whether the folder's manifest says that this very job is finished."""
    return find_state(job) == DONE


def find_state(job: Job) -> str:
    """`done`, `unfinished`, `missing`, or what the run in the job's folder was made otherwise with; loads no model.

    Weights are told apart by their files, where both the run's and the job's are known.
    """
    held = job.folder.read_manifest()
    if held is None:
        return MISSING
    wanted = describe_job(job)
    files = weight_files_of(job.config, job.config.model)
    if files is not None and "weight_files" in held:
        wanted["weight_files"] = files
    for name, value in wanted.items():
        if held.get(name) != value:
            return f"other {name.replace('_', ' ')}: {json.dumps(held.get(name))}, here {json.dumps(value)}"
    return DONE if held.get("finished") else UNFINISHED


def _digest(profile: ImportanceProfile | SelectionProfile) -> str:
    """SHA-256 over the measured numbers, or over the sets chosen."""
    units = ("selected",) if isinstance(profile, SelectionProfile) else ("attention", "ffn", "layer")
    numbers = {unit: asdict(profile)[unit] for unit in units}
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of the checkout this package lies in, with `-dirty` if files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
