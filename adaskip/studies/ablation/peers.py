"""`eval/peer_divergence.py`: KL(full || skipped) of every strategy by phase and budget, on records that chose no set.

The records are those that runs are scored on, without any that a calibration or search has seen. Selections are those
that runs keep, made where they are missing, or files. AdaSkip is measured without online learning, SkipDecode with the
full set of its last step.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from adaskip.calibration.divergence import OutputDivergence
from adaskip.common.files import write_text_atomic
from adaskip.common.locks import exclusive
from adaskip.common.options import option
from adaskip.core.plan import PHASES, Budget, Phase, SkipPlan, check_phase
from adaskip.models.loading import LoadedModel
from adaskip.profiles.selection import METHODS, SelectionProfile
from adaskip.runs.checks import check
from adaskip.runs.job import Job, Profile, find_profile, resolve
from adaskip.runs.manifest import describe_model
from adaskip.runs.profiles import profile_for
from adaskip.runs.records import Sample
from adaskip.strategies import (
    NAMES,
    PAPER_STRATEGIES,
    PEERS,
    CalibratedSkip,
    build,
    needs_profile,
    phases_of,
    selection_method,
)
from adaskip.studies.ablation.peers_findings import find
from adaskip.studies.study import Study, StudyConfig, check_same, read_json, read_saved

RESULTS_FILE = "peer_divergences.json"
COMPARED = (*PAPER_STRATEGIES[1:], *(cls.name for cls in PEERS), CalibratedSkip.name)
SAME = ("weights_fingerprint", "dtype", "device", "attn_implementation")
"""Fields that must be equal to continue a measurement, besides the prompts of a phase."""


@dataclass(frozen=True, kw_only=True)
class PeersConfig(StudyConfig):
    """The options of `eval/peer_divergence.py`."""

    folder = "peer_divergence"

    phases: tuple[str, ...] = option(f"phases: {', '.join(PHASES)}", PHASES, choices=PHASES, distinct=True)
    budgets: tuple[int, ...] | None = option(
        "numbers of sublayers to skip; default: those of the protocol", least=1, distinct=True
    )
    limit: int = option("number of records in each phase, alternating between its tasks", 24, least=2)
    strategies: tuple[str, ...] = option(
        lambda: (
            f"strategies, calibrated among them, each in the phases it is defined for; default: {', '.join(COMPARED)}"
        ),
        COMPARED,
        choices=lambda: NAMES[1:],
        distinct=True,
    )
    keep_kv: bool = option(
        "with --phases prefill: every strategy skips only while the prompt is read, as with `adaskip run --keep-kv`, "
        "and the answers' distributions are compared",
        False,
    )
    selections: tuple[str, ...] | None = option(
        "files made by `adaskip calibrate --select`: FILE is for the strategy of its method in its phase, instead of "
        "what runs keep; NAME=FILE is another row of that name",
        distinct=True,
    )
    runs: str | None = option("folder of runs whose kept profiles are used; default: that of `adaskip run`")

    def __post_init__(self) -> None:
        super().__post_init__()
        if CalibratedSkip.name not in self.strategies:
            raise ValueError(f"every strategy is compared with calibrated; given: {' '.join(self.strategies)}")
        if self.keep_kv and set(self.phases) != {"prefill"}:
            raise ValueError(f"--keep-kv needs --phases prefill; given: {' '.join(self.phases)}")

    @property
    def results_path(self) -> Path:
        return self.out_dir / RESULTS_FILE

    def job(self, model: str, phase: str, strategy: str, budget: int | None) -> Job:
        """The run whose profile the strategy has at a budget."""
        options = {"phase": phase, "strategy": strategy, "budget": budget, "output_dir": self.runs}
        return resolve(self.run_config(model, **options, keep_kv=self.keep_kv))


@dataclass(frozen=True)
class Row:
    """A strategy in one cell. name: that of the strategy, or of a selection file."""

    name: str
    phase: Phase
    sublayers: int
    plan: SkipPlan
    profile: Profile | None


def read_selections(config: PeersConfig) -> list[tuple[str, SelectionProfile]]:
    """The files of `--selections` with the names of their rows; a name may have one file for each phase.

    Raises ValueError for a file that is not a selection, the name of a strategy, and a second file for a row.
    """
    found: list[tuple[str, SelectionProfile]] = []
    for given in config.selections or ():
        name, _, file = given.rpartition("=")
        selection = SelectionProfile.load(find_profile(file, SelectionProfile, "--selections"))
        row = name or _strategy_of(selection)
        if name in NAMES or any(row == other and _phases(selection) & _phases(before) for other, before in found):
            raise ValueError(f"--selections {given}: the row {row} is taken; give another NAME=FILE")
        found.append((row, selection))
    return found


def _phases(selection: SelectionProfile) -> set[str]:
    """The phases that the sets of a selection are for."""
    return {selection.phase} if METHODS[selection.method].by_phase else set(PHASES)


def _strategy_of(selection: SelectionProfile) -> str:
    return next(name for name in NAMES if selection_method(name) == selection.method)


def measure(config: PeersConfig) -> None:
    """Measure what is missing; each strategy at each budget is saved when it is complete.

    Raises ValueError if saved results of a model are of other weights or prompts, or a strategy has no set of a budget.
    """
    selections = read_selections(config)
    with exclusive(config.results_path.with_suffix(".lock")):
        for name in config.models:
            measure_model(config, name, selections)


def measure_model(config: PeersConfig, name: str, selections: Sequence[tuple[str, SelectionProfile]]) -> None:
    """Measure the rows of a model that are missing in the results file, and add them."""
    job, path = config.job(name, config.phases[0], CalibratedSkip.name, None), config.results_path
    budgets = config.budgets or job.budgets
    compared = [_compared(config, name, check_phase(phase), selections) for phase in config.phases]
    for each in compared:
        each.check(budgets)
    loaded = job.loading.load()
    for _, selection in selections:
        selection.check_fits(loaded.model, weights_fingerprint=loaded.weights_fingerprint)
    rows = [row for each in compared for row in each.rows(budgets)]
    seen = {sample for row in rows if row.profile is not None for sample in row.profile.data_ids}
    results, sources = read_json(path), {**_sources(loaded), **({"keep_kv": True} if config.keep_kv else {})}
    held = results.setdefault(loaded.spec.name, {"sources": sources, "prompts": {}, "costs": [], "cells": []})
    if any(each["sources"].get("keep_kv", False) != config.keep_kv for each in results.values()):
        raise ValueError(f"{path} was measured with{'out' * config.keep_kv} --keep-kv; give another --output-dir")
    check_same(held["sources"], sources, SAME, f"{name} in {path}")
    held["costs"] = _costs(rows, held["costs"])
    for each in compared:
        prompts = _prompts(config, name, each.phase, loaded, seen)
        described = {"count": len(prompts), "fingerprint": _fingerprint(prompts)}
        if held["prompts"].setdefault(each.phase, described) != described:
            raise ValueError(
                f"{path} holds {name} measured on other prompts of {each.phase}; give another --output-dir"
            )
        in_phase = [row for row in rows if row.phase == each.phase]
        for cell in _cells(loaded, prompts, in_phase, held["cells"], keep_kv=config.keep_kv):
            held["cells"] = [old for old in held["cells"] if _place(old) != _place(cell)] + [cell]
            write_text_atomic(path, json.dumps(results, allow_nan=False) + "\n")
    write_text_atomic(path, json.dumps(results, allow_nan=False) + "\n")


def _place(cell: Mapping[str, Any]) -> list[Any]:
    return [cell[name] for name in ("phase", "sublayers", "row")]


def _compared(
    config: PeersConfig, model: str, phase: Phase, selections: Sequence[tuple[str, SelectionProfile]]
) -> Compared:
    return Compared(config, model, phase, {name: each for name, each in selections if phase in _phases(each)})


@dataclass(frozen=True)
class Compared:
    """What is compared in one phase. files: selections given by files, by the name of their row."""

    config: PeersConfig
    model: str
    phase: Phase
    files: Mapping[str, SelectionProfile]

    @property
    def strategies(self) -> dict[str, str]:
        """The strategy of each row; without those that are not defined for the phase."""
        given = {name: name if name in NAMES else _strategy_of(each) for name, each in self.files.items()}
        defined = (name for name in self.config.strategies if self.phase in phases_of(name))
        return {**{name: name for name in defined}, **given}

    def check(self, budgets: Sequence[int]) -> None:
        """Raise ValueError if a row has no set of a budget; measures and searches nothing."""
        for name, strategy in self.strategies.items():
            for count in budgets:
                job = self.config.job(self.model, self.phase, strategy, count)
                if name in self.files:
                    self._skipped(job, self.files[name])
                else:
                    check(job)

    def rows(self, budgets: Sequence[int]) -> Iterator[Row]:
        """Every row at every budget; makes missing profiles."""
        for count in budgets:
            for name, strategy in self.strategies.items():
                job = self.config.job(self.model, self.phase, strategy, count)
                profile: Profile | None = self.files.get(name)
                if profile is None and needs_profile(strategy):
                    profile, _ = profile_for(job, job.loading.load())
                yield Row(name, self.phase, count, self._skipped(job, profile), profile)

    def _skipped(self, job: Job, profile: Profile | None) -> SkipPlan:
        budget, num_layers = Budget(sublayers=job.sublayers), job.loading.num_layers
        options = {"num_layers": num_layers, "profile": profile, "keep_kv": job.keeps_kv}
        made = build(job.strategy, phase=self.phase, budget=budget, **options)
        assert made is not None, "the full model is no choice"
        return made.skipped


def _prompts(config: PeersConfig, model: str, phase: Phase, loaded: LoadedModel, seen: set[str]) -> list[Tensor]:
    """The prompts of the first scored records of a phase's tasks that are not in `seen`, truncated as in searches."""
    job = config.job(model, phase, CalibratedSkip.name, None)
    assert job.calibration is not None, "of strategy calibrated"
    columns: list[list[tuple[str, Sample]]] = [
        [(task, sample) for sample in job.records.scored(task) if sample["_id"] not in seen] for task in job.answer_caps
    ]
    pairs = [pair for row in zip_longest(*columns) for pair in row if pair is not None][: config.limit]
    if len(pairs) < 2:
        raise ValueError(f"phase {phase} has {len(pairs)} records that no search has seen; at least 2 are needed")
    return job.calibration.prompts(pairs, loaded)


def _cells(
    loaded: LoadedModel,
    prompts: Sequence[Tensor],
    rows: Sequence[Row],
    held: Sequence[Mapping[str, Any]],
    *,
    keep_kv: bool,
) -> Iterator[dict[str, Any]]:
    """The missing cells of one phase; a saved cell of another plan is missing."""
    cells = [
        {"phase": row.phase, "sublayers": row.sublayers, "row": row.name, "plan": row.plan.to_dict(scales=True)}
        for row in rows
    ]
    done = [{name: value for name, value in cell.items() if name != "divergences"} for cell in held]
    missing = [(cell, row.plan) for cell, row in zip(cells, rows, strict=True) if cell not in done]
    if not missing:
        return
    ends = {"eos_token_ids": loaded.spec.stop_token_ids, "pad_token_id": loaded.pad_token_id}
    phase = rows[0].phase
    divergence = OutputDivergence(loaded.model, prompts, phase, keep_kv=keep_kv, **ends)
    for cell, plan in tqdm(missing, desc=f"{loaded.spec.name}, {phase}", unit="set", disable=None):
        values = [value if math.isfinite(value) else None for value in divergence(plan)]
        yield {**cell, "divergences": values}


def _costs(rows: Sequence[Row], held: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the sets of each row have cost: for a selection the cost that it records. held: of rows saved before."""
    found = {}
    for row in rows:
        cost, sets, phase = None, [], None
        if isinstance(row.profile, SelectionProfile):
            cost, sets, phase = asdict(row.profile.cost), list(row.profile.selected), row.phase
        each = {"row": row.name, "phase": phase, "sets": sets, "calibrated": row.profile is not None, "cost": cost}
        found[row.name, phase, *sets] = each
    renewed = [(each["row"], each["phase"]) for each in found.values()]
    return [*(each for each in held if (each["row"], each["phase"]) not in renewed), *found.values()]


def _sources(loaded: LoadedModel) -> dict[str, Any]:
    described = describe_model(loaded)
    return {name: value for name, value in described.items() if name not in ("checkpoint", "device_name")}


def _fingerprint(prompts: Sequence[Tensor]) -> str:
    return hashlib.sha256(str([prompt.tolist() for prompt in prompts]).encode()).hexdigest()


STUDY = Study(
    PeersConfig,
    measure,
    read=lambda config: read_saved(config.results_path),
    find=lambda results, config: find(results),
)
main = STUDY.main
