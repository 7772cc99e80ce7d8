"""Gets the profile a strategy needs: the one the user names, or one made once and kept by the runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adaskip.calibration import calibrate
from adaskip.importance import ImportanceProfile
from adaskip.locks import exclusive
from adaskip.longbench import get_task
from adaskip.models import LoadedModel, weights_fingerprint
from adaskip.plan import Phase, check_phase
from adaskip.runs.config import CalibrateConfig, RunConfig, SharedConfig
from adaskip.runs.sources import calibration_samples, fingerprint, load, prompt_ids
from adaskip.selection.profile import SelectionProfile
from adaskip.selection.select import select
from adaskip.strategies import CalibratedSkip

Profile = ImportanceProfile | SelectionProfile


def profile_for(config: RunConfig, loaded: LoadedModel) -> tuple[Profile, Path]:
    """The profile `config` names, or the kept one of this model, made first when there is none, and its path.

    Raises:
        ValueError: the named profile is missing, of the wrong kind, or was measured on another model.
    """
    selects = config.strategy == CalibratedSkip.name
    if config.profile is not None:
        path = Path(config.profile)
        if not path.is_file():
            raise ValueError(f"--profile {path} does not exist; `adaskip calibrate` makes one")
    else:
        path = kept_path(config, loaded)
        with exclusive(path.with_suffix(".lock"), wait=True):  # whoever comes second finds the file
            if not path.is_file():
                samples, phase = config.setup.calibration_samples, check_phase(config.phase)
                made = search(config, loaded, samples, phase) if selects else measure(config, loaded, samples)
                made.save(path)
    return (SelectionProfile if selects else ImportanceProfile).load(path, loaded.model), path


def kept_path(config: RunConfig, loaded: LoadedModel) -> Path:
    """`<output_dir>/../profiles/<model>-<first 8 digits of a hash over all the profile depends on>.json`.

    A selection is of one phase, which stands in its name: `<model>-selection-<phase>-<digits>.json`.
    """
    samples = calibration_samples(config, config.setup.calibration_samples)
    depends_on: dict[str, Any] = {
        "weights": weights_fingerprint(loaded.model),
        "dtype": str(loaded.model.dtype),
        "device": loaded.model.device.type,
        "attn_implementation": loaded.model.config._attn_implementation,
        "chat_template": loaded.spec.chat_template,
        "samples": fingerprint(samples),
    }
    name = config.model
    if config.strategy == CalibratedSkip.name:
        name += f"-selection-{config.phase}"
        depends_on["up_to"] = max(config.setup.budgets)
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return config.runs_dir.parent / "profiles" / f"{name}-{digest[:8]}.json"


def measure(config: SharedConfig, loaded: LoadedModel, num_samples: int, batch_size: int = 1) -> ImportanceProfile:
    """Calibrate on the first `num_samples` samples of the setup's calibration task."""
    return calibrate(loaded.model, **calibration_data(config, loaded, num_samples), batch_size=batch_size)


def search(
    config: SharedConfig, loaded: LoadedModel, num_samples: int, phase: Phase, up_to: int | None = None
) -> SelectionProfile:
    """Choose the sets of strategy calibrated on the same samples, up to the setup's largest budget or `up_to`."""
    tokenizer: Any = loaded.tokenizer
    return select(
        loaded.model,
        **calibration_data(config, loaded, num_samples),
        phase=phase,
        up_to=up_to or max(config.setup.budgets),
        eos_token_ids=loaded.spec.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
    )


def calibration_data(config: SharedConfig, loaded: LoadedModel, num_samples: int) -> Mapping[str, Any]:
    """The first samples of the setup's calibration task as prompts, and what they are, by `calibrate`'s names."""
    samples, task = calibration_samples(config, num_samples), get_task(config.setup.calibration_task)
    prompts, ids = prompt_ids(samples, task, loaded), [sample["_id"] for sample in samples]
    return {"prompts": prompts, "model_name": loaded.spec.name, "dataset": task.name, "data_ids": ids}


def calibrate_to(config: CalibrateConfig) -> Profile:
    """`adaskip calibrate`: make a model's profile and write it to `config.output`."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    num_samples = config.samples or config.setup.calibration_samples
    loaded = load(config, config.model)
    if config.select is None:
        profile = measure(config, loaded, num_samples, config.batch_size)
    else:
        profile = search(config, loaded, num_samples, check_phase(config.select), config.up_to)
    profile.save(config.output)
    return profile
