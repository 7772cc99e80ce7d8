"""Gets the profile a strategy needs: the one the user names, or one made once and kept by the runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adaskip.blocks import decoder_layers
from adaskip.calibration import calibrate
from adaskip.importance import ImportanceProfile
from adaskip.locks import exclusive
from adaskip.longbench import PAPER_MIN_LENGTH, get_task
from adaskip.models import LoadedModel, weights_fingerprint
from adaskip.plan import Phase, check_phase
from adaskip.runs.config import CalibrateConfig, RunConfig, SharedConfig
from adaskip.runs.sources import Sample, calibration_samples, fingerprint, load, prompt_ids, unscored_samples
from adaskip.selection.divergence import OBJECTIVE
from adaskip.selection.profile import SelectionProfile
from adaskip.selection.select import select
from adaskip.strategies import AdaSkip, CalibratedSkip

Profile = ImportanceProfile | SelectionProfile


def profile_for(config: RunConfig, loaded: LoadedModel) -> tuple[Profile, Path]:
    """The profile `config` names, or the kept one of this model, made first when there is none, and its path.

    Raises:
        ValueError: the named profile is missing, of the wrong kind, or was measured on another model; other weights of
            a model of the same shape are warned of and not refused with `--allow-other-weights`.
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
                made = _selection_of(config, loaded, path) if selects else _importance_of(config, loaded)
                made.save(path)
    kind = SelectionProfile if selects else ImportanceProfile
    return kind.load(path, loaded.model, allow_other_weights=config.allow_other_weights), path


def _importance_of(config: RunConfig, loaded: LoadedModel) -> ImportanceProfile:
    return measure(config, loaded, config.setup.calibration_samples)


def _selection_of(config: RunConfig, loaded: LoadedModel, path: Path) -> SelectionProfile:
    """Search where AdaSkip's own profile leads; a stopped search goes on from what lies beside `path`."""
    as_adaskip = replace(config, strategy=AdaSkip.name, target_speedup=None, speedup_on=None)
    importance, _ = profile_for(as_adaskip, loaded)
    assert isinstance(importance, ImportanceProfile), "what strategy adaskip chooses by"
    return search(
        config,
        loaded,
        check_phase(config.phase),
        searched_samples(config),
        importance=importance,
        up_to=_largest(config, loaded),
        progress_path=path.with_suffix(".partial.jsonl"),
    )


def searched_samples(config: RunConfig) -> list[tuple[str, Sample]]:
    """(task, sample): what a run's selection is searched on."""
    tasks = config.tasks or config.setup.phases[config.phase].tasks
    count = config.setup.calibration_samples
    return unscored_samples(config, tasks, count, max_length=config.min_length, extended=config.extended)


def _largest(config: RunConfig, loaded: LoadedModel) -> int:
    """The largest budget of the setup for a model of that depth, or the run's own if that is larger."""
    num_layers = len(decoder_layers(loaded.model))
    asked = 0 if config.skip_budget is None else config.skip_budget.num_sublayers(num_layers)
    return max(asked, *config.setup.budgets_for(num_layers))


def kept_path(config: RunConfig, loaded: LoadedModel) -> Path:
    """`<output_dir>/../profiles/<model>-<first 8 digits of a hash over all the profile depends on>.json`.

    A selection is of one phase, which stands in its name: `<model>-selection-<phase>-<digits>.json`.
    """
    depends_on: dict[str, Any] = {
        "weights": weights_fingerprint(loaded.model),
        "dtype": str(loaded.model.dtype),
        "device": loaded.model.device.type,
        "attn_implementation": loaded.model.config._attn_implementation,
        "chat_template": loaded.spec.chat_template,
        "max_prompt_tokens": loaded.spec.max_prompt_tokens,
        "samples": fingerprint(calibration_samples(config, config.setup.calibration_samples)),
    }
    name = config.model
    if config.strategy == CalibratedSkip.name:
        name += f"-selection-{config.phase}"
        depends_on |= {
            "objective": OBJECTIVE,
            "up_to": _largest(config, loaded),
            "stop_token_ids": list(loaded.spec.stop_token_ids),
            "selection_samples": fingerprint([{"task": task, **sample} for task, sample in searched_samples(config)]),
        }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return config.runs_dir.parent / "profiles" / f"{name}-{digest[:8]}.json"


def measure(config: SharedConfig, loaded: LoadedModel, num_samples: int, batch_size: int = 1) -> ImportanceProfile:
    """Calibrate on the first `num_samples` samples of the setup's calibration task."""
    return calibrate(loaded.model, **calibration_data(config, loaded, num_samples), batch_size=batch_size)


def search(
    config: SharedConfig,
    loaded: LoadedModel,
    phase: Phase,
    samples: Sequence[tuple[str, Sample]],
    *,
    importance: ImportanceProfile,
    up_to: int,
    progress_path: Path,
    show_progress: bool = False,
) -> SelectionProfile:
    """Choose the sets of strategy calibrated. samples: (task, sample), none of which is scored."""
    tokenizer: Any = loaded.tokenizer
    return select(
        loaded.model,
        [prompt_ids([sample], get_task(task), loaded)[0] for task, sample in samples],
        phase,
        up_to=up_to,
        eos_token_ids=loaded.spec.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
        model_name=loaded.spec.name,
        dataset=", ".join(dict.fromkeys(task for task, _ in samples)),
        data_ids=[sample["_id"] for _, sample in samples],
        importance=importance,
        progress_path=progress_path,
        show_progress=show_progress,
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
    profile: Profile = measure(config, loaded, num_samples, config.batch_size)
    if config.select is not None:
        phase, num_layers = check_phase(config.select), len(decoder_layers(loaded.model))
        samples = unscored_samples(config, config.setup.phases[phase].tasks, num_samples, max_length=PAPER_MIN_LENGTH)
        profile = search(
            config,
            loaded,
            phase,
            samples,
            importance=profile,
            up_to=config.up_to or max(config.setup.budgets_for(num_layers)),
            progress_path=Path(config.output).with_suffix(".partial.jsonl"),
            show_progress=True,
        )
    profile.save(config.output)
    return profile
