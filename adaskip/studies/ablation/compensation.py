"""`eval/compensation.py`: how much the output diverges from the full model's with each compensation of AdaSkip's sets.

Fitted on the calibration prompts, measured on samples of the phase's tasks that no run is scored on. For stories260K
both are stories sampled from the model itself.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from adaskip.calibration.compensation import COMPENSATIONS, FittedCompensation, stream_moments
from adaskip.calibration.divergence import OutputDivergence
from adaskip.calibration.measure import calibrate
from adaskip.common.files import write_text_atomic
from adaskip.common.locks import exclusive
from adaskip.common.options import option
from adaskip.core.plan import Budget, Phase
from adaskip.models.loading import LoadedModel
from adaskip.models.stories import NOT_AT_HAND, STORIES, load_stories, stories_dir, tell_split
from adaskip.profiles.importance import ImportanceProfile
from adaskip.runs.job import resolve
from adaskip.runs.manifest import describe_model
from adaskip.strategies import AdaSkip
from adaskip.studies.ablation.compensation_findings import find
from adaskip.studies.ablation.online import STORY_TOKENS
from adaskip.studies.ablation.stories import PROMPT_TOKENS
from adaskip.studies.study import Study, StudyConfig, check_same, read_json, read_saved

RESULTS_FILE = "compensation_divergences.json"
PHASES: tuple[Phase, ...] = ("prefill", "decode")
STORIES_BUDGETS = (2, 4, 6)
STORIES_SEED = 1
"""Not the seed of the ablation of online learning, which tests on other stories."""
SAME = ("weights_fingerprint", "dtype", "device", "attn_implementation", "prompts_fingerprint", "calibration_prompts")
"""Fields that must be equal to continue a measurement."""


@dataclass(frozen=True, kw_only=True)
class CompensationConfig(StudyConfig):
    """The options of `eval/compensation.py`."""

    folder = "results/compensation"

    held_out: int = option("number of prompts to measure on; none of them calibrates", 24, least=2)

    @property
    def results_path(self) -> Path:
        return self.out_dir / RESULTS_FILE


@dataclass(frozen=True)
class Subject:
    """A model to measure. calibration: prompts to fit on, 1-D token ids; held_out: prompts to measure on, by phase."""

    loaded: LoadedModel
    calibration: Sequence[Tensor]
    held_out: Mapping[Phase, Sequence[Tensor]]
    budgets: Sequence[int]
    stops: Sequence[int]

    @property
    def sources(self) -> dict[str, Any]:
        """Description of model and prompts."""
        told = str([prompt.tolist() for prompts in (self.calibration, *self.held_out.values()) for prompt in prompts])
        described = describe_model(self.loaded)
        return {
            **{name: value for name, value in described.items() if name not in ("checkpoint", "device_name")},
            "calibration_prompts": len(self.calibration),
            "held_out_prompts": {phase: len(prompts) for phase, prompts in self.held_out.items()},
            "prompts_fingerprint": hashlib.sha256(told.encode()).hexdigest(),
        }


def measure(config: CompensationConfig) -> None:
    """Measure what is missing; each phase of a model is saved when it is complete.

    Raises ValueError if saved results of a model are of other weights or prompts.
    """
    names = list(config.models)
    if stories_dir() is None:
        print(NOT_AT_HAND, file=sys.stderr)
    else:
        names.append(STORIES)
    path = config.results_path
    with (
        exclusive(path.with_suffix(".lock")),
        tqdm(total=len(names) * len(PHASES), desc="compensation", unit="phase", disable=None) as bar,
    ):
        for name in names:
            subject = _of_stories(config.held_out) if name == STORIES else _of_tasks(config, name)
            measure_subject(path, subject.loaded.spec.name if name != STORIES else name, subject, bar)


def _of_tasks(config: CompensationConfig, name: str) -> Subject:
    """Prompts are held out alternately from the phase's tasks, after those that a selection is searched on."""
    held_out: dict[Phase, Sequence[Tensor]] = {}
    job = resolve(config.run_config(name, phase=PHASES[0], strategy=AdaSkip.name))
    loaded, calibration = job.loading.load(), job.calibration
    assert calibration is not None, "of strategy adaskip"
    for phase in PHASES:
        tasks, first = resolve(config.run_config(name, phase=phase)).answer_caps, calibration.num_searched
        samples = job.records.unscored([*tasks], first + config.held_out)[first:]
        held_out[phase] = calibration.prompts(samples, loaded)
    budgets = config.setup_of(job.loading.source.entry).budgets_for(job.loading.num_layers)
    return Subject(loaded, calibration.data(loaded)["prompts"], held_out, budgets, loaded.spec.stop_token_ids)


def _of_stories(held_out: int) -> Subject:
    loaded = load_stories()
    calibration, others = tell_split(loaded, held_out, STORY_TOKENS, STORIES_SEED)
    others = [story[:PROMPT_TOKENS] for story in others]
    return Subject(loaded, calibration, dict.fromkeys(PHASES, others), STORIES_BUDGETS, stops=[])


def measure_subject(path: Path, name: str, subject: Subject, bar: tqdm) -> None:
    """Measure the phases of a model that are missing in the file at `path`, and add them."""
    results, sources = read_json(path), subject.sources
    held = results.setdefault(name, {"sources": sources, "cells": []})
    check_same(held["sources"], sources, SAME, f"{name} in {path}")
    done = {(cell["phase"], cell["sublayers"]) for cell in held["cells"]}
    missing: list[Phase] = [phase for phase in PHASES if not {(phase, count) for count in subject.budgets} <= done]
    bar.update(len(PHASES) - len(missing))
    if not missing:
        return
    model = subject.loaded.model
    importance, moments = calibrate(model, subject.calibration), stream_moments(model, subject.calibration)
    fitted = [FittedCompensation(kind, moments) for kind in COMPENSATIONS]
    for phase in missing:
        held["cells"] = [cell for cell in held["cells"] if cell["phase"] != phase]
        held["cells"] += _cells(subject, phase, importance, fitted)
        write_text_atomic(path, json.dumps(results, allow_nan=False) + "\n")
        bar.update()


def _cells(
    subject: Subject, phase: Phase, importance: ImportanceProfile, fitted: Sequence[FittedCompensation]
) -> list[dict[str, Any]]:
    """For each budget and compensation the divergence on every held-out prompt."""
    loaded = subject.loaded
    ends = {"eos_token_ids": subject.stops, "pad_token_id": loaded.pad_token_id}
    divergence = OutputDivergence(loaded.model, subject.held_out[phase], phase, **ends)
    cells = []
    for count in subject.budgets:
        budget = Budget(sublayers=count)
        skipped = AdaSkip(num_layers=importance.num_layers, budget=budget, profile=importance, phase=phase).skipped
        measured = {compensate.kind: divergence(compensate(skipped)) for compensate in fitted}
        cells.append({"phase": phase, "sublayers": count, "plan": skipped.to_dict(), "divergences": measured})
    return cells


STUDY = Study(
    CompensationConfig,
    measure,
    read=lambda config: read_saved(config.results_path),
    find=lambda results, config: [find(results)],
)
main = STUDY.main
