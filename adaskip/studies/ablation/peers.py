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

import torch
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
from adaskip.strategies import NAMES, PAPER_STRATEGIES, PEERS, CalibratedSkip, build, needs_profile, selection_method
from adaskip.studies.ablation.peers_findings import find
from adaskip.studies.study import Study, StudyConfig, prompts_of, read_json, read_saved

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
        lambda: f"strategies, calibrated among them; default: {', '.join(COMPARED)}",
        COMPARED,
        choices=lambda: NAMES[1:],
        distinct=True,
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

    @property
    def results_path(self) -> Path:
        return self.out_dir / RESULTS_FILE

    def job(self, model: str, phase: str, strategy: str, budget: int | None) -> Job:
        """The run whose profile the strategy has at a budget."""
        options = {"phase": phase, "strategy": strategy, "budget": budget, "output_dir": self.runs}
        return resolve(self.run_config(model, **options))


@dataclass(frozen=True)
class Row:
    """A strategy in one cell. name: that of the strategy, or of a selection file."""

    name: str
    phase: Phase
    sublayers: int
    plan: SkipPlan
    profile: Profile | None


def read_selections(config: PeersConfig) -> list[tuple[str, SelectionProfile]]:
    """The files of `--selections` with the names of their rows; ValueError for a name that is taken."""
    of_method = {selection_method(name): name for name in NAMES}
    found: list[tuple[str, SelectionProfile]] = []
    for given in config.selections or ():
        name, _, file = given.rpartition("=")
        selection = SelectionProfile.load(find_profile(file, SelectionProfile))
        if name in NAMES or any(name == other for other, _ in found if name):
            raise ValueError(f"--selections {given}: the name {name} is taken")
        found.append((name or str(of_method[selection.method]), selection))
    return found


def measure(config: PeersConfig) -> None:
    """Measure what is missing; each strategy at each budget is saved when it is complete.

    Raises ValueError if saved results of a model are of other weights or prompts, or a strategy has no set of a budget.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    selections = read_selections(config)
    with exclusive(config.results_path.with_suffix(".lock")):
        for name in config.models:
            measure_model(config, name, selections)


def measure_model(config: PeersConfig, name: str, selections: Sequence[tuple[str, SelectionProfile]]) -> None:
    """Measure the rows of a model that are missing in the results file, and add them."""
    job = config.job(name, config.phases[0], CalibratedSkip.name, None)
    loaded, path = job.loading.load(), config.results_path
    for _, selection in selections:
        selection.check_fits(loaded.model, weights_fingerprint=loaded.weights_fingerprint)
    budgets = config.budgets or job.budgets
    compared = [_compared(config, name, check_phase(phase), selections) for phase in config.phases]
    for each in compared:
        each.check(budgets)
    rows = [row for each in compared for row in each.rows(budgets)]
    seen = {sample for row in rows if row.profile is not None for sample in row.profile.data_ids}
    results = read_json(path)
    held = results.setdefault(loaded.spec.name, {"sources": _sources(loaded), "prompts": {}, "costs": [], "cells": []})
    if other := [key for key in SAME if held["sources"][key] != _sources(loaded)[key]]:
        raise ValueError(f"{path} holds {name} measured with other {', '.join(other)}; give another --output-dir")
    held["costs"] = _costs(rows, held["costs"])
    for phase in map(check_phase, config.phases):
        prompts = _prompts(config, name, phase, loaded, seen)
        described = {"count": len(prompts), "fingerprint": _fingerprint(prompts)}
        if held["prompts"].setdefault(phase, described) != described:
            raise ValueError(f"{path} holds {name} measured on other prompts of {phase}; give another --output-dir")
        for cell in _cells(loaded, phase, prompts, [row for row in rows if row.phase == phase], held["cells"]):
            key = [cell[field] for field in ("phase", "sublayers", "row")]
            held["cells"] = [old for old in held["cells"] if [old["phase"], old["sublayers"], old["row"]] != key]
            held["cells"].append(cell)
            write_text_atomic(path, json.dumps(results, allow_nan=False) + "\n")
    write_text_atomic(path, json.dumps(results, allow_nan=False) + "\n")


def _compared(
    config: PeersConfig, model: str, phase: Phase, selections: Sequence[tuple[str, SelectionProfile]]
) -> Compared:
    files = {name: each for name, each in selections if not METHODS[each.method].by_phase or each.phase == phase}
    return Compared(config, model, phase, files)


@dataclass(frozen=True)
class Compared:
    """What is compared in one phase. files: selections given by files, by the name of their row."""

    config: PeersConfig
    model: str
    phase: Phase
    files: Mapping[str, SelectionProfile]

    @property
    def strategies(self) -> dict[str, str]:
        """The strategy of each row."""
        of_method = {selection_method(name): name for name in NAMES}
        extra = {name: of_method[each.method] for name, each in self.files.items() if name not in NAMES}
        return {**{name: name for name in self.config.strategies}, **extra}

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
        made = build(job.strategy, phase=self.phase, budget=budget, num_layers=num_layers, profile=profile)
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
    return prompts_of(job.calibration, pairs, loaded)


def _cells(
    loaded: LoadedModel,
    phase: Phase,
    prompts: Sequence[Tensor],
    rows: Sequence[Row],
    held: Sequence[Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    """The missing cells of a phase. A saved one is missing if its plan was another."""
    done = [(cell["phase"], cell["sublayers"], cell["row"], cell["plan"]) for cell in held]
    plans = {id(row): json.loads(json.dumps(row.plan.to_dict())) for row in rows}
    missing = [row for row in rows if (row.phase, row.sublayers, row.name, plans[id(row)]) not in done]
    if not missing:
        return
    tokenizer: Any = loaded.tokenizer
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    divergence = OutputDivergence(
        loaded.model, prompts, phase, eos_token_ids=loaded.spec.stop_token_ids, pad_token_id=pad
    )
    for row in tqdm(missing, desc=f"{loaded.spec.name}, {phase}", unit="set", disable=None):
        values = [value if math.isfinite(value) else None for value in divergence(row.plan)]
        cell = {"phase": phase, "sublayers": row.sublayers, "row": row.name, "plan": plans[id(row)]}
        yield {**cell, "divergences": values}


def _costs(rows: Sequence[Row], held: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the sets of each row have cost: for a selection the cost that it records. held: of rows saved before."""
    found = {}
    for row in rows:
        cost, sets = None, []
        if isinstance(row.profile, SelectionProfile):
            cost, sets = asdict(row.profile.cost), list(row.profile.selected)
        phase = row.phase if cost is not None else None
        calibrated = row.profile is not None
        found[row.name, phase, str(sets)] = {
            **{"row": row.name, "phase": phase, "sets": sets, "calibrated": calibrated, "cost": cost}
        }
    renewed = {(name, phase) for name, phase, _ in found}
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
