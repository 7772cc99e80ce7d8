"""Provides the profile that a strategy needs: the one given by the user, or one made once and kept beside the runs.

`adaskip calibrate` and runs keep profiles in the same place, so each finds those of the other with the same settings.
The measurements of a search are deleted only after its profile is on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaskip.calibration.compensation import SCALE, FittedCompensation, fit_compensation
from adaskip.calibration.divergence import OBJECTIVE_VERSION
from adaskip.calibration.measure import calibrate
from adaskip.calibration.peers import counts_of, settings_of
from adaskip.calibration.select import select
from adaskip.common.files import check_writable, remove_torn
from adaskip.common.locks import exclusive
from adaskip.core.config_identity import config_fingerprint
from adaskip.core.hf import attn_implementation
from adaskip.core.plan import Phase, check_phase
from adaskip.models.loading import LoadedModel
from adaskip.profiles.fields import ProfileError
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import METHODS, SEARCH, SelectionProfile
from adaskip.runs.calibrate_config import CalibrateConfig
from adaskip.runs.calibration import Calibration, find_calibration
from adaskip.runs.job import Job, Profile, find_profile
from adaskip.runs.loading import find_loading, prepare_torch
from adaskip.runs.records import Sample, find_records, fingerprint
from adaskip.runs.ties import TiesByTime, find_ties

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A profile that is kept beside the runs, or that will be made and kept there.

    phase: of a selection; None for an importance profile. counts: numbers of sublayers of its sets. batch_size: number
    of prompts per forward when importance is measured. method, settings, keep_kv: what makes a selection; see `select`.
    ties: what decides the ties of a search; None if the least divergence does.
    """

    loaded: LoadedModel
    calibration: Calibration
    phase: Phase | None
    counts: Sequence[int] = ()
    batch_size: int = 1
    method: str = SEARCH
    settings: Mapping[str, float] = field(default_factory=dict)
    keep_kv: bool = False
    ties: TiesByTime | None = None

    @property
    def importance(self) -> Wanted:
        """The importance profile from which a selection takes its candidates and scales."""
        return replace(self, phase=None, method=SEARCH, keep_kv=False, ties=None)

    @property
    def samples(self) -> list[tuple[str, Sample]]:
        """The calibration samples, as (task, sample)."""
        if self.phase is not None:
            return self.calibration.searched
        return [(self.calibration.task, sample) for sample in self.calibration.samples]

    @property
    def identity(self) -> dict[str, Any]:
        """All that the profile depends on."""
        loaded = self.loaded
        depends_on: dict[str, Any] = {
            "weights": loaded.weights_fingerprint,
            "dtype": str(loaded.model.dtype),
            "device": loaded.model.device.type,
            "attn_implementation": attn_implementation(loaded.model),
            "chat_template": loaded.spec.chat_template,
            "max_prompt_tokens": loaded.spec.max_prompt_tokens,
            "samples": fingerprint(self.calibration.samples),
            **({} if self.batch_size == 1 else {"batch_size": self.batch_size}),
        }
        if self.phase is not None:
            depends_on |= {
                "objective": OBJECTIVE_VERSION,
                "up_to": max(self.counts),
                **({} if (cut := self.calibration.search_prompt_tokens) is None else {"search_prompt_tokens": cut}),
                "stop_token_ids": list(loaded.spec.stop_token_ids),
                "selection_samples": fingerprint([{"task": task, **sample} for task, sample in self.samples]),
            }
        if self.method != SEARCH:
            depends_on |= {"method": self.method, "counts": list(self.counts), "settings": dict(self.settings)}
        if self.keep_kv:
            depends_on["keep_kv"] = True
        if self.ties is not None:
            depends_on |= self.ties.identity(loaded)
        return depends_on

    @property
    def path(self) -> Path:
        """`<output_dir>/../profiles/<model>-<first 8 digits of a hash over its identity>.json`.

        For a selection: `<model>-selection-<phase>-<digits>.json`, with `-keep-kv` after the phase if it is for
        `--keep-kv`, then `-faster-at-<tokens>` if time decides ties, or with the method in place of `selection`, and
        without the phase if its sets do not depend on it.
        If the profile of that name was made with another configuration or tokenizer of the same weights, the hash also
        covers these.
        """
        usual = self._named(self.identity)
        return self._named(self.identity | self.files) if self._is_of_other_files(usual) else usual

    @property
    def files(self) -> dict[str, str | None]:
        """Dependencies that are not in `identity`, so that older profiles keep their names."""
        config = config_fingerprint(self.loaded.model.config)
        return {"config_fingerprint": config, "tokenizer_files": self.loaded.spec.tokenizer_files}

    def _named(self, identity: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        assert self.calibration.folder is not None, "of a command that keeps profiles"
        return self.calibration.folder / f"{self.stem}-{digest[:8]}.json"

    def _is_of_other_files(self, path: Path) -> bool:
        """Whether the profile at `path` records another configuration or tokenizer."""
        held = _read(path) if path.is_file() else {}
        return any(held.get(name) not in (None, value) for name, value in self.files.items())

    @property
    def stem(self) -> str:
        """The beginning of the file name."""
        name = self.loaded.spec.name
        if self.phase is None:
            return name
        ties = "" if self.ties is None else f"-faster-at-{self.ties.request.prompt_tokens}"
        return f"{name}-{selection_stem(self.method, self.phase, keep_kv=self.keep_kv)}{ties}"


def selection_stem(method: str, phase: str, *, keep_kv: bool = False) -> str:
    """What follows the model in the name of a kept selection."""
    kind = "selection" if method == SEARCH else method
    return (f"{kind}-{phase}" if METHODS[method].by_phase else kind) + ("-keep-kv" if keep_kv else "")


def profile_for(job: Job, loaded: LoadedModel) -> tuple[Profile, Path]:
    """The profile given by the user, or the kept one of this model, which is made if missing; and its path.

    Raises:
        ValueError: the given profile is missing, of the wrong kind, or was measured on another model (with
            `--allow-other-weights`, other weights of a model of the same shape only cause a warning).
    """
    if (given := job.given_profile) is None:
        return keep(wanted_by(job, loaded))
    assert job.profile_name is not None, "it was read from there"
    given.check_fits(
        loaded.model,
        allow_other_weights=job.allow_other_weights,
        weights_fingerprint=loaded.weights_fingerprint,
    )
    return given, find_profile(job.profile_name, type(given))


def find_compensation(job: Job, loaded: LoadedModel) -> FittedCompensation | None:
    """What `--compensation` asks for, fitted on the calibration prompts; None for the scales of the profile."""
    if job.compensation == SCALE:
        return None
    assert job.calibration is not None, "only strategies with a profile have this option"
    return fit_compensation(loaded.model, job.compensation, job.calibration.data(loaded)["prompts"])


def kept_path(job: Job, loaded: LoadedModel) -> Path:
    """Where the profile that a job needs is kept."""
    return wanted_by(job, loaded).path


def wanted_by(job: Job, loaded: LoadedModel) -> Wanted:
    """The profile that a job needs."""
    assert job.calibration is not None, "its strategy needs a profile"
    if (method := job.selection_method) is None:
        return Wanted(loaded, job.calibration, None)
    settings = settings_of(method, {})
    return Wanted(
        *(loaded, job.calibration, job.phase, job.counts),
        **{"method": method, "settings": settings, "keep_kv": job.searches_kept_kv},
    )


def keep(wanted: Wanted, *, show_progress: bool = False) -> tuple[Profile, Path]:
    """The kept profile and its path; if missing, it is made by one process while others wait."""
    path = wanted.path
    with exclusive(path.with_suffix(".lock"), wait=True):  # a second process then finds the file
        remove_torn(path)
        profile = _ensured(wanted, path, show_progress) if wanted.path == path else None
    if profile is None:  # while this process waited, the file was made with another configuration or tokenizer
        return keep(wanted, show_progress=show_progress)
    return profile, path


def _ensured(wanted: Wanted, path: Path, show_progress: bool) -> Profile:
    """The profile, which is made if missing; call this while holding its lock."""
    if not path.is_file():
        if others := _others_line(wanted, path):
            logger.warning("%s", others)
        made = _make(wanted, path, show_progress)
        replace(made, tokenizer_files=wanted.loaded.spec.tokenizer_files).save(path)
    profile = _kept(wanted, path)
    _progress_path(path).unlink(missing_ok=True)
    return profile


def _kept(wanted: Wanted, path: Path) -> Profile:
    kind = ImportanceProfile if wanted.phase is None else SelectionProfile
    try:
        profile = kind.load(path)
        profile.check_fits(wanted.loaded.model, weights_fingerprint=wanted.loaded.weights_fingerprint)
    except ProfileError as error:
        raise ProfileError(f"{error}; delete {path} to make it again") from None
    return profile


def _make(wanted: Wanted, path: Path, show_progress: bool) -> Profile:
    """Measure importance, or search a selection; a stopped search continues from its progress file."""
    if wanted.phase is None:
        return measure_importance(wanted.calibration, wanted.loaded, wanted.batch_size)
    importance = None
    if wanted.method == SEARCH:
        importance, _ = keep(wanted.importance)
        assert isinstance(importance, ImportanceProfile), "what strategy adaskip chooses by"
    return search_selection(wanted, wanted.phase, importance, _progress_path(path), show_progress)


def _progress_path(path: Path) -> Path:
    """The progress file of a search, beside the profile that it will make."""
    return path.with_suffix(".partial.jsonl")


def _others_line(wanted: Wanted, path: Path) -> str:
    """A line that names the most similar kept profile of this model and its differences; empty if there is none."""
    found = []
    for other in sorted(path.parent.glob(f"{wanted.stem}-????????.json")):
        held = _read(other)
        differing = {name: held.get(name) for name, value in _told(wanted).items() if held.get(name) != value}
        differing |= {name: held[name] for name, value in wanted.files.items() if held.get(name) not in (None, value)}
        if wanted.phase is not None and (made := [*held.get("selected", ())]) != [*map(str, wanted.counts)]:
            differing["up_to"] = made
        if wanted.method != SEARCH and held.get("settings") != wanted.settings:
            differing["settings"] = held.get("settings")
        found.append((len(differing), other, differing))
    if not found:
        return ""
    _, other, differing = min(found)
    what = ", ".join(name.replace("_", " ") for name in differing) or "device, prompts, batch size or stop tokens"
    usable = "" if {"weights_fingerprint", "config_fingerprint"} & differing.keys() else "; --profile takes it as it is"
    return f"{path} is made now: {other.name} beside it was made with other {what}{usable}"


def _read(path: Path) -> dict[str, Any]:
    """The fields of a kept profile; empty for an invalid file, which raises an error only where it is used."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return held if isinstance(held, dict) else {}


def _told(wanted: Wanted) -> dict[str, Any]:
    """The dependencies of a profile that its file records, under the names in the file."""
    model = wanted.loaded.model
    return {
        "weights_fingerprint": wanted.loaded.weights_fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": attn_implementation(model),
        "dataset": _dataset(wanted.samples),
        "data_ids": [sample["_id"] for _, sample in wanted.samples],
    }


def measure_importance(calibration: Calibration, loaded: LoadedModel, batch_size: int = 1) -> ImportanceProfile:
    """Calibrate on the samples of the calibration task."""
    known = loaded.weights_fingerprint
    return calibrate(loaded.model, **calibration.data(loaded), batch_size=batch_size, weights_fingerprint=known)


def search_selection(
    wanted: Wanted, phase: Phase, importance: ImportanceProfile | None, progress_path: Path, show_progress: bool
) -> SelectionProfile:
    """Choose the sets of strategy calibrated, or those of another paper's method, for which `importance` is None."""
    loaded, calibration, samples = wanted.loaded, wanted.calibration, wanted.samples
    ties: dict[str, Any] = {} if wanted.ties is None else wanted.ties.options(loaded, phase)
    return select(
        loaded.model,
        calibration.prompts(samples, loaded),
        phase,
        up_to=max(wanted.counts),
        keep_kv=wanted.keep_kv,
        method=wanted.method,
        budgets=None if wanted.method == SEARCH else wanted.counts,
        **{"settings": wanted.settings, **ties},
        eos_token_ids=loaded.spec.stop_token_ids,
        pad_token_id=loaded.pad_token_id,
        model_name=loaded.spec.name,
        dataset=_dataset(samples),
        data_ids=[sample["_id"] for _, sample in samples],
        importance=importance,
        progress_path=progress_path,
        show_progress=show_progress,
        weights_fingerprint=loaded.weights_fingerprint,
    )


def _dataset(samples: Sequence[tuple[str, Sample]]) -> str:
    return ", ".join(dict.fromkeys(task for task, _ in samples))


def calibrate_to(config: CalibrateConfig) -> tuple[Profile, tuple[Path, ...]]:
    """`adaskip calibrate`: make a model's profile and keep it where runs look for it, and also at `config.output`.

    Returns the profile and its paths.
    """
    prepare_torch(config)
    loading, setup = find_loading(config, config.model, config.max_prompt_tokens), config.setup
    loading.check_limit()
    if config.output is not None:
        check_writable(Path(config.output))
    phase = None if config.select is None else check_phase(config.select)
    ties = find_ties(config, loading)
    tasks = () if phase is None else config.tasks or setup.phases[phase].tasks
    budgets = setup.budgets_for(loading.num_layers)
    if METHODS[config.method].one_by_one:
        budgets = config.budgets or budgets
        counts = counts_of(config.method, max(budgets), budgets)
    else:
        counts = counts_of(config.method, config.up_to or max(budgets), None)
    wanted = Wanted(
        loading.load(),
        find_calibration(config, find_records(config, loading), tasks, config.samples),
        phase,
        counts,
        batch_size=config.batch_size,
        method=config.method,
        settings=config.settings,
        keep_kv=config.keep_kv,
        ties=ties,
    )
    profile, path = keep(wanted, show_progress=True)
    return profile, (path, *([] if config.output is None else [profile.save(config.output)]))
