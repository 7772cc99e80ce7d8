"""Gets the profile a strategy needs: the one the user names, or one made once and kept beside the runs.

What `adaskip calibrate` makes is kept in the same place, so that a run of the same settings finds it, and the other way
round. Nothing that a search measured is deleted before its profile is on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from adaskip.benchmarks.longbench import get_task
from adaskip.calibration.divergence import OBJECTIVE
from adaskip.calibration.measure import calibrate
from adaskip.calibration.select import select
from adaskip.common.files import remove_torn
from adaskip.common.locks import exclusive
from adaskip.core.blocks import decoder_layers
from adaskip.core.hf import attn_implementation
from adaskip.core.plan import Phase, check_phase
from adaskip.models.loading import LoadedModel, weights_fingerprint
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from adaskip.runs.config import CalibrateConfig, DataConfig, RunConfig, SharedConfig
from adaskip.runs.sources import Sample, calibration_samples, fingerprint, load, prompt_ids, unscored_samples
from adaskip.strategies import needs_selection, profile_type

logger = logging.getLogger(__name__)

Profile = ImportanceProfile | SelectionProfile


@dataclass(frozen=True)
class Wanted:
    """A profile to be found beside the runs, or to be made and kept there.

    phase: of a selection; None for importance. num_samples: that it is made on. up_to: the largest set of a selection.
    batch_size: prompts that importance is measured on together.
    """

    config: DataConfig
    model: str
    loaded: LoadedModel
    phase: Phase | None
    num_samples: int
    up_to: int
    batch_size: int = 1

    @property
    def importance(self) -> Wanted:
        """AdaSkip's profile, by which a selection's candidates and scales are chosen."""
        return Wanted(self.config, self.model, self.loaded, None, self.num_samples, self.up_to, self.batch_size)

    @cached_property
    def samples(self) -> list[tuple[str, Sample]]:
        """(task, sample): what it is made on."""
        if self.phase is not None:
            return searched_samples(self.config, self.phase, self.num_samples)
        task = self.config.setup.calibration_task
        return [(task, sample) for sample in calibration_samples(self.config, self.num_samples)]

    @property
    def identity(self) -> dict[str, Any]:
        """All that it depends on."""
        loaded = self.loaded
        depends_on: dict[str, Any] = {
            "weights": weights_fingerprint(loaded.model),
            "dtype": str(loaded.model.dtype),
            "device": loaded.model.device.type,
            "attn_implementation": attn_implementation(loaded.model),
            "chat_template": loaded.spec.chat_template,
            "max_prompt_tokens": loaded.spec.max_prompt_tokens,
            "samples": fingerprint(calibration_samples(self.config, self.num_samples)),
            **({} if self.batch_size == 1 else {"batch_size": self.batch_size}),
        }
        if self.phase is not None:
            depends_on |= {
                "objective": OBJECTIVE,
                "up_to": self.up_to,
                "stop_token_ids": list(loaded.spec.stop_token_ids),
                "selection_samples": fingerprint([{"task": task, **sample} for task, sample in self.samples]),
            }
        return depends_on

    @property
    def path(self) -> Path:
        """`<output_dir>/../profiles/<model>-<first 8 digits of a hash over its identity>.json`.

        A selection's phase stands in its name: `<model>-selection-<phase>-<digits>.json`.
        """
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return self.config.runs_dir.parent / "profiles" / f"{self.stem}-{digest[:8]}.json"

    @property
    def stem(self) -> str:
        """What its file's name begins with."""
        return self.model if self.phase is None else f"{self.model}-selection-{self.phase}"


def profile_for(config: RunConfig, loaded: LoadedModel) -> tuple[Profile, Path]:
    """The profile `config` names, or the kept one of this model, made first when there is none, and its path.

    Raises:
        ValueError: the named profile is missing, of the wrong kind, or was measured on another model; other weights of
            a model of the same shape are warned of and not refused with `--allow-other-weights`.
    """
    if config.profile is None:
        return keep(wanted_by(config, loaded))
    path = Path(config.profile)
    if not path.is_file():
        raise ValueError(f"--profile {path} does not exist; `adaskip calibrate` makes one")
    kind = profile_type(config.strategy)
    assert kind is not None, "asked for only where the strategy needs one"
    return kind.load(path, loaded.model, allow_other_weights=config.allow_other_weights), path


def kept_path(config: RunConfig, loaded: LoadedModel) -> Path:
    """Where the profile that a run of `config` needs is kept."""
    return wanted_by(config, loaded).path


def wanted_by(config: RunConfig, loaded: LoadedModel) -> Wanted:
    """The profile that a run of `config` needs."""
    return Wanted(
        config,
        config.model,
        loaded,
        phase=check_phase(config.phase) if needs_selection(config.strategy) else None,
        num_samples=config.setup.calibration_samples,
        up_to=_largest(config, loaded),
    )


def _largest(config: RunConfig, loaded: LoadedModel) -> int:
    """The largest budget of the setup for a model of that depth, or the run's own if that is larger."""
    num_layers = len(decoder_layers(loaded.model))
    asked = 0 if config.skip_budget is None else config.skip_budget.num_sublayers(num_layers)
    return max(asked, *config.setup.budgets_for(num_layers))


def keep(wanted: Wanted, *, show_progress: bool = False) -> tuple[Profile, Path]:
    """The kept profile and its path; it is made first where there is none, by one process at a time."""
    path = wanted.path
    with exclusive(path.with_suffix(".lock"), wait=True):  # whoever comes second finds the file
        remove_torn(path)
        if not path.is_file():
            if others := _others_line(wanted, path):
                logger.warning("%s", others)
            _make(wanted, path, show_progress).save(path)
        _progress_path(path).unlink(missing_ok=True)
    kind = ImportanceProfile if wanted.phase is None else SelectionProfile
    return kind.load(path, wanted.loaded.model), path


def _make(wanted: Wanted, path: Path, show_progress: bool) -> Profile:
    """Measure importance, or search where AdaSkip's own profile leads; a stopped search goes on from its progress."""
    config, loaded = wanted.config, wanted.loaded
    if wanted.phase is None:
        return measure(config, loaded, wanted.num_samples, wanted.batch_size)
    importance, _ = keep(wanted.importance)
    assert isinstance(importance, ImportanceProfile), "what strategy adaskip chooses by"
    return search(
        loaded,
        wanted.phase,
        wanted.samples,
        importance=importance,
        up_to=wanted.up_to,
        progress_path=_progress_path(path),
        show_progress=show_progress,
    )


def _progress_path(path: Path) -> Path:
    """Where a search keeps what it has measured, beside the profile it will make."""
    return path.with_suffix(".partial.jsonl")


def _others_line(wanted: Wanted, path: Path) -> str:
    """What the most alike of the kept profiles of this model was made otherwise with; empty where there is none."""
    found = []
    for other in sorted(path.parent.glob(f"{wanted.stem}-????????.json")):
        held = _read(other)
        differing = {name: held.get(name) for name, value in _told(wanted).items() if held.get(name) != value}
        if wanted.phase is not None and (largest := len(held.get("selected", ()))) != wanted.up_to:
            differing["up_to"] = largest
        found.append((len(differing), other, differing))
    if not found:
        return ""
    _, other, differing = min(found)
    what = ", ".join(name.replace("_", " ") for name in differing) or "device, prompts or stop tokens"
    usable = "" if "weights_fingerprint" in differing else "; --profile takes it as it is"
    return f"{path} is made now: {other.name} beside it was made with other {what}{usable}"


def _read(path: Path) -> dict[str, Any]:
    """The fields of a kept profile; none of a file that is not one, which whoever asks for it is told."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return held if isinstance(held, dict) else {}


def _told(wanted: Wanted) -> dict[str, Any]:
    """Of what a profile depends on, what its file tells, by the names there."""
    model = wanted.loaded.model
    return {
        "weights_fingerprint": weights_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": attn_implementation(model),
        "dataset": _dataset(wanted.samples),
        "data_ids": [sample["_id"] for _, sample in wanted.samples],
    }


def searched_samples(config: DataConfig, phase: Phase, num_samples: int) -> list[tuple[str, Sample]]:
    """(task, sample): what the selection of a phase is searched on."""
    tasks = config.tasks or config.setup.phases[phase].tasks
    return unscored_samples(config, tasks, num_samples, max_length=config.min_length, extended=config.extended)


def measure(config: SharedConfig, loaded: LoadedModel, num_samples: int, batch_size: int = 1) -> ImportanceProfile:
    """Calibrate on the first `num_samples` samples of the setup's calibration task."""
    return calibrate(loaded.model, **calibration_data(config, loaded, num_samples), batch_size=batch_size)


def search(
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
        dataset=_dataset(samples),
        data_ids=[sample["_id"] for _, sample in samples],
        importance=importance,
        progress_path=progress_path,
        show_progress=show_progress,
    )


def _dataset(samples: Sequence[tuple[str, Sample]]) -> str:
    return ", ".join(dict.fromkeys(task for task, _ in samples))


def calibration_data(config: SharedConfig, loaded: LoadedModel, num_samples: int) -> Mapping[str, Any]:
    """The first samples of the setup's calibration task as prompts, and what they are, by `calibrate`'s names."""
    samples, task = calibration_samples(config, num_samples), get_task(config.setup.calibration_task)
    prompts, ids = prompt_ids(samples, task, loaded), [sample["_id"] for sample in samples]
    return {"prompts": prompts, "model_name": loaded.spec.name, "dataset": task.name, "data_ids": ids}


def calibrate_to(config: CalibrateConfig) -> tuple[Profile, tuple[Path, ...]]:
    """`adaskip calibrate`: make a model's profile and keep it where a run looks for it, and at `config.output`, too.

    Returns the profile and where it is.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    loaded = load(config, config.model)
    wanted = Wanted(
        config,
        config.model,
        loaded,
        phase=None if config.select is None else check_phase(config.select),
        num_samples=config.samples or config.setup.calibration_samples,
        up_to=config.up_to or max(config.setup.budgets_for(len(decoder_layers(loaded.model)))),
        batch_size=config.batch_size,
    )
    profile, path = keep(wanted, show_progress=True)
    return profile, (path, *([] if config.output is None else [profile.save(config.output)]))
