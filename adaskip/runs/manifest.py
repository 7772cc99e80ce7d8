"""The manifest of a run: configuration, model, machine and code version, for checking and continuing the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from adaskip.calibration.compensation import SCALE
from adaskip.common.paths import as_seen_from_root
from adaskip.common.provenance import device_name, git_commit, versions
from adaskip.core.blocks import decoder_layers
from adaskip.core.hf import attn_implementation
from adaskip.models.checkpoints import has_weights
from adaskip.models.companion_files import FIELDS
from adaskip.models.loading import LoadedModel, template_wrapper
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from adaskip.runs.folder import ENVIRONMENT, JOURNAL
from adaskip.runs.job import Job
from adaskip.runs.loading import Loading
from adaskip.runs.records import fingerprint

DONE, UNFINISHED, MISSING = "done", "unfinished", "missing"
NEWER = (
    *(
        "benchmark",
        "benchmark_options",
        "protocol",
        "sets",
        "min_length",
        "max_prompt_tokens",
        "stop_token_ids",
        "stop_strings",
        "templates_fingerprint",
    ),
    *("profile_given", "weight_files", *FIELDS),
)
"""Fields that older runs may lack."""
SIZE = ("tasks", "limit", "subset", "data_fingerprint")
"""Fields that change if a run continues with more samples of each task."""
LOADED = (
    *JOURNAL,
    *ENVIRONMENT,
    *("budget", "num_layers", "revision", "weights_fingerprint", "device", "chat_template", "stop_token_ids"),
    *("profile_fingerprint", "profile_given", "versions", *FIELDS),
)
"""Fields that do not follow from the configuration alone: of the loaded model, the machine, and the times."""


def describe_job(job: Job) -> dict[str, Any]:
    """The fields of the manifest that are known before the model is loaded."""
    loading, records, limit = job.loading, job.records, job.loading.limit
    return {
        "run_name": job.cell.run_name,
        "model": job.cell.model,
        "protocol": job.protocol,
        "strategy": job.strategy,
        "strategy_options": {**job.strategy_options, **_compensation(job)} or None,
        **({"selection": "searched with keep_kv"} if job.searches_kept_kv else {}),
        **({} if (digest := compensation_samples(job)) is None else {"compensation_samples": digest}),
        "phase": job.phase,
        "tasks": {part.name: len(part.samples) for part in job.parts},
        "max_new_tokens": {part.name: part.max_new_tokens for part in job.parts},
        "limit": job.limit,
        "subset": job.subset,
        "batch_size": job.batch_size,
        "seed": job.seed,
        "device_map": loading.device_map,
        "dtype": str(loading.placement["dtype"]).removeprefix("torch."),
        "attn_implementation": loading.attn_implementation,
        **_chat_template(loading),
        "max_prompt_tokens": loading.max_prompt_tokens,
        **({} if limit is None or records.benchmark.models else {"given_max_prompt_tokens": limit}),
        "stop_strings": list(loading.source.stop_strings),
        "templates_fingerprint": _digest({part.name: part.template for part in job.parts}),
        **records.describe([part.name for part in job.parts]),
        "data_fingerprint": fingerprint([sample for part in job.parts for sample in part.samples]),
        **({} if job.calibration is None else {"profile_given": job.profile_name is not None}),
    }


def _chat_template(loading: Loading) -> dict[str, str | None]:
    """The wrapper of prompts; empty if it is in a tokenizer that is not on this machine."""
    if loading.chat != "template":
        return {"chat_template": None if loading.chat == "none" else loading.chat}
    folder = loading.source.here
    return {} if folder is None or not has_weights(folder) else {"chat_template": template_wrapper(folder)}


def _compensation(job: Job) -> dict[str, str]:
    return {} if job.compensation == SCALE else {"compensation": job.compensation}


def compensation_samples(job: Job) -> str | None:
    """Digest of the samples that the compensation is fitted on; None for the scales of the profile."""
    if job.compensation == SCALE:
        return None
    assert job.calibration is not None, "only strategies with a profile have this option"
    return fingerprint(job.calibration.samples)


def describe_run(
    job: Job, loaded: LoadedModel, profile: ImportanceProfile | SelectionProfile | None, profile_path: Path | None
) -> dict[str, Any]:
    """All fields of the manifest except its times."""
    sublayers, depth = job.cell.sublayers, len(decoder_layers(loaded.model))
    return {
        **describe_job(job),
        "budget": {"sublayers": sublayers, "layers": sublayers / 2, "fraction": sublayers / (2 * depth)},
        **describe_model(loaded),
        **job.loading.source.model_files,
        "max_prompt_tokens": loaded.spec.max_prompt_tokens,
        "stop_token_ids": list(loaded.spec.stop_token_ids),
        "stop_strings": list(loaded.spec.stop_strings),
        "profile": None if profile_path is None else as_seen_from_root(profile_path),
        "profile_fingerprint": None if profile is None else profile_fingerprint(profile),
    }


def describe_model(loaded: LoadedModel) -> dict[str, Any]:
    """The fields of the manifest that describe the weights, the machine and the code."""
    model = loaded.model
    return {
        "num_layers": len(decoder_layers(model)),
        "checkpoint": as_seen_from_root(loaded.spec.checkpoint),
        "revision": loaded.spec.revision,
        "weight_files": loaded.spec.weight_files,
        "weights_fingerprint": loaded.weights_fingerprint,
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "chat_template": loaded.spec.chat_template,
        "attn_implementation": attn_implementation(model),
        "device_name": device_name(model.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def is_done(job: Job) -> bool:
    """Whether the manifest in the job's folder says that exactly this job is finished."""
    return run_state(job) == DONE


def run_state(job: Job) -> str:
    """`done`, `unfinished`, `missing`, or the first field in which the run in the job's folder differs from the job.

    Loads no model. Weights, configuration, end tokens and tokenizer are compared by their files, if those of both the
    run and the job are known. A kept profile depends only on these and on the calibration data, so it is not compared.
    """
    held = job.folder.read_manifest()
    if held is None:
        return MISSING
    wanted = without_growth({**describe_job(job), **job.loading.source.model_files}, job, held)
    if (files := job.loading.source.weight_files) is not None:
        wanted["weight_files"] = files
    if (profile := job.given_profile) is not None:
        wanted["profile_fingerprint"] = profile_fingerprint(profile)
    for name, value in comparable(wanted, held).items():
        if held.get(name) != value:
            return f"other {name.replace('_', ' ')}: {json.dumps(held.get(name))}, here {json.dumps(value)}"
    return DONE if held.get("finished") and SIZE[0] in wanted else UNFINISHED


def without_growth(wanted: Mapping[str, Any], job: Job, held: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of `wanted`, without those of size where the job goes on with more samples than the run `held`."""
    grows = held is not None and _goes_on_from(job, held)
    return {name: value for name, value in wanted.items() if not (grows and name in SIZE)}


def _goes_on_from(job: Job, held: Mapping[str, Any]) -> bool:
    """Whether the run `held` has the first samples of each of the job's tasks, fewer of some, in the same batches."""
    asked, before = job.num_wanted, held.get("subset") or held.get("limit")
    same_kind = bool(job.subset) == bool(held.get("subset"))
    if not same_kind or not before or (asked is not None and asked <= before):
        return False
    smaller = replace(job, limit=held.get("limit"), subset=held.get("subset"))
    cut = any(
        len(few.samples) < len(many.samples) and len(few.samples) % job.batch_size
        for few, many in zip(smaller.parts, job.parts, strict=True)
    )
    described = describe_job(smaller)
    return not cut and all(described[name] == held.get(name) for name in SIZE)


def comparable(wanted: Mapping[str, Any], held: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields in which the manifest `held` must agree with `wanted`: all except newer ones that `held` lacks.

    A field of the configuration that only `held` has must be None. Whether a profile was given counts if none is given
    now; else its numbers are compared.
    """
    if held is None:
        return dict(wanted)
    gone = dict.fromkeys(held.keys() - wanted.keys() - {*SIZE, *LOADED})
    known = {name: value for name, value in wanted.items() if name in held or name not in NEWER}
    if known.get("profile_given"):
        del known["profile_given"]
    return {**known, **gone}


def profile_fingerprint(profile: ImportanceProfile | SelectionProfile) -> str:
    """SHA-256 over the measured numbers of a profile, or over the sets of a selection."""
    units = ("selected",) if isinstance(profile, SelectionProfile) else ("attention", "ffn", "layer")
    return _digest({unit: asdict(profile)[unit] for unit in units})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
