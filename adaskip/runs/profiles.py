"""Gets the importance profile a strategy needs: the one the user names, or one measured once and kept by the runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from adaskip.calibration import calibrate
from adaskip.importance import ImportanceProfile
from adaskip.locks import exclusive
from adaskip.longbench import build_prompt_ids, get_task
from adaskip.models import LoadedModel, weights_fingerprint
from adaskip.runs.config import CalibrateConfig, RunConfig, SharedConfig
from adaskip.runs.sources import calibration_samples, fingerprint, load


def profile_for(config: RunConfig, loaded: LoadedModel) -> tuple[ImportanceProfile, Path]:
    """The profile `config` names, or the kept one of this model, measured first when there is none, and its path.

    Raises:
        ValueError: the named profile is missing or was measured on another model.
    """
    if config.profile is not None:
        path = Path(config.profile)
        if not path.is_file():
            raise ValueError(f"--profile {path} does not exist; `adaskip calibrate` makes one")
    else:
        path = kept_path(config, loaded)
        with exclusive(path.with_suffix(".lock"), wait=True):  # whoever comes second finds the file
            if not path.is_file():
                measure(config, loaded, config.setup.calibration_samples).save(path)
    return ImportanceProfile.load(path, loaded.model), path


def kept_path(config: RunConfig, loaded: LoadedModel) -> Path:
    """`<output_dir>/../profiles/<model>-<first 8 digits of a hash over all the profile depends on>.json`."""
    samples = calibration_samples(config, config.setup.calibration_samples)
    depends_on = {
        "weights": weights_fingerprint(loaded.model),
        "dtype": str(loaded.model.dtype),
        "device": loaded.model.device.type,
        "attn_implementation": loaded.model.config._attn_implementation,
        "chat_template": loaded.spec.chat_template,
        "samples": fingerprint(samples),
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return config.runs_dir.parent / "profiles" / f"{config.model}-{digest[:8]}.json"


def measure(config: SharedConfig, loaded: LoadedModel, num_samples: int, batch_size: int = 1) -> ImportanceProfile:
    """Calibrate on the first `num_samples` samples of the setup's calibration task."""
    samples, spec = calibration_samples(config, num_samples), loaded.spec
    task = get_task(config.setup.calibration_task)
    prompts = [
        torch.tensor(build_prompt_ids(sample, task, loaded.tokenizer, spec.max_prompt_tokens, spec.chat_template))
        for sample in samples
    ]
    ids = [sample["_id"] for sample in samples]
    about = {"model_name": spec.name, "dataset": task.name, "data_ids": ids}
    return calibrate(loaded.model, prompts, **about, batch_size=batch_size)


def calibrate_to(config: CalibrateConfig) -> ImportanceProfile:
    """`adaskip calibrate`: measure a model's profile and write it to `config.output`."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    num_samples = config.samples or config.setup.calibration_samples
    profile = measure(config, load(config, config.model), num_samples, config.batch_size)
    profile.save(config.output)
    return profile
