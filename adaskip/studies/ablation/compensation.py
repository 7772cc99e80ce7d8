"""`eval/compensation.py`: how far the output lies from the full model's under each way to compensate AdaSkip's sets.

Fitted on the calibration prompts, measured on samples of the phase's tasks that no run is scored on. On stories260K
both are stories that the model tells itself.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from adaskip.calibration.compensation import StreamMoments, stream_moments
from adaskip.calibration.divergence import OutputDivergence
from adaskip.calibration.measure import calibrate
from adaskip.common.choices import check_choice
from adaskip.common.commands import study
from adaskip.common.files import write_text_atomic
from adaskip.common.locks import exclusive
from adaskip.common.options import option
from adaskip.common.paths import given_or_default
from adaskip.core.plan import Budget, Compensation, Phase, SkipPlan, Sublayer
from adaskip.models.loading import LoadedModel
from adaskip.models.stories import CALIBRATION_STORIES, NOT_AT_HAND, STORIES, load_stories, stories_dir, tell
from adaskip.profiles.importance import ImportanceProfile
from adaskip.runs.calibration import find_calibration
from adaskip.runs.cells import MODELS
from adaskip.runs.config import SharedConfig
from adaskip.runs.loading import find_loading
from adaskip.runs.manifest import describe_model
from adaskip.runs.records import find_records, prompt_ids
from adaskip.strategies import AdaSkip
from adaskip.studies.ablation.compensation_findings import AFFINE, LEAST_SQUARES, NONE, SCALE, SHIFT, find
from adaskip.studies.ablation.selection import PROMPT_TOKENS
from adaskip.studies.ablation.stories import TOKENS
from adaskip.studies.observations.findings import write_findings

OUTPUT_DIR = "results/compensation"
RESULTS_FILE = "compensation_divergences.json"
PHASES: tuple[Phase, ...] = ("prefill", "decode")
STORIES_BUDGETS = (2, 4, 6)
STORIES_SEED = 1
"""Other stories than those that the ablation of online learning tests on."""
SAME = ("weights_fingerprint", "dtype", "device", "attn_implementation", "prompts_fingerprint", "calibration_prompts")
"""What must be equal for measurements to be continued."""


@dataclass(frozen=True, kw_only=True)
class CompensationConfig(SharedConfig):
    """The options of `eval/compensation.py`."""

    models: tuple[str, ...] = option(f"of {', '.join(MODELS)}", MODELS, aliases=["--model"])
    held_out: int = option("prompts to measure on, none of them among those that calibrate", 24)
    output_dir: str | None = option(f"where everything goes; if not given, {OUTPUT_DIR}")
    draw_only: bool = option("run no model: table and verdict of what is saved", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.models:
            check_choice("model", name, MODELS)
        if self.checkpoint is not None and len(self.models) != 1:
            raise ValueError("--checkpoint is one model's: give it with exactly one --model")
        if self.held_out < 2:
            raise ValueError(f"--held-out must be at least 2, not {self.held_out}: one prompt has no interval")

    @property
    def out_dir(self) -> Path:
        return given_or_default(self.output_dir, OUTPUT_DIR)

    @property
    def results_path(self) -> Path:
        return self.out_dir / RESULTS_FILE


@dataclass(frozen=True)
class Subject:
    """A model to measure. calibration, held_out: prompts to fit on and, by phase, to measure on, token ids, 1-D. stops,
    pad: token ids."""

    loaded: LoadedModel
    calibration: Sequence[Tensor]
    held_out: Mapping[Phase, Sequence[Tensor]]
    budgets: Sequence[int]
    stops: Sequence[int]
    pad: int

    @property
    def sources(self) -> dict[str, Any]:
        """What the numbers are measured on."""
        told = str([prompt.tolist() for prompts in (self.calibration, *self.held_out.values()) for prompt in prompts])
        described = describe_model(self.loaded)
        return {
            **{name: value for name, value in described.items() if name not in ("checkpoint", "device_name")},
            "calibration_prompts": len(self.calibration),
            "held_out_prompts": {phase: len(prompts) for phase, prompts in self.held_out.items()},
            "prompts_fingerprint": hashlib.sha256(told.encode()).hexdigest(),
        }


def main(doc: str | None) -> int:
    """The script's whole life; returns its exit code. doc: the script's docstring."""
    return study(doc, CompensationConfig, _run)


def _run(config: CompensationConfig) -> int:
    if not config.draw_only:
        with exclusive(config.results_path.with_suffix(".lock")):
            measure(config)
    results = read(config.results_path)
    if not results:
        raise ValueError(f"{config.results_path} does not exist; leave out --draw-only")
    findings = find(results, None if STORIES in results else NOT_AT_HAND)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(findings.title, style="bold")
    for line in [*(f"- {claim.sentence}" for claim in findings.claims), findings.notes[-1]]:
        console.print(line)
    written = write_findings(findings, config.out_dir)
    console.print("wrote " + ", ".join(path.name for path in written) + f" to {config.out_dir}")
    return 0


def read(path: Path) -> dict[str, Any]:
    """What is saved, by model; nothing where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def measure(config: CompensationConfig) -> None:
    """Measure what is missing; each model's phase is saved as soon as it is measured.

    Raises ValueError if what is saved of a model was measured on other weights or prompts.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    subjects: dict[str, Callable[[], Subject]] = {
        name: lambda name=name: _of_task(config, name) for name in config.models
    }
    if stories_dir() is None:
        print(NOT_AT_HAND, file=sys.stderr)
    else:
        subjects[STORIES] = lambda: _of_stories(config.held_out)
    with tqdm(total=len(subjects) * len(PHASES), desc="compensation", unit="phase", disable=None) as bar:
        for name, make in subjects.items():
            measure_subject(config.results_path, name, make(), bar)


def measure_subject(path: Path, name: str, subject: Subject, bar: tqdm) -> None:
    """Measure the phases that the file at `path` lacks of one model, and add them to it."""
    results, sources = read(path), subject.sources
    held = results.setdefault(name, {"sources": sources, "cells": []})
    if other := [key for key in SAME if held["sources"][key] != sources[key]]:
        raise ValueError(f"{path} holds {name} measured with other {', '.join(other)}; give another --output-dir")
    done = {(cell["phase"], cell["sublayers"]) for cell in held["cells"]}
    missing: list[Phase] = [phase for phase in PHASES if not {(phase, count) for count in subject.budgets} <= done]
    bar.update(len(PHASES) - len(missing))
    if not missing:
        return
    model = subject.loaded.model
    importance, moments = calibrate(model, subject.calibration), stream_moments(model, subject.calibration)
    for phase in missing:
        held["cells"] = [cell for cell in held["cells"] if cell["phase"] != phase]
        held["cells"] += _cells(subject, phase, importance, moments)
        write_text_atomic(path, json.dumps(results, allow_nan=False) + "\n")
        bar.update()


def _cells(
    subject: Subject, phase: Phase, importance: ImportanceProfile, moments: dict[Sublayer, StreamMoments]
) -> list[dict[str, Any]]:
    """Of each budget the divergences on every held-out prompt, by compensation."""
    stand_ins: dict[str, Callable[[Sublayer], Compensation]] = {
        NONE: lambda sublayer: 1.0,
        SCALE: importance.scale_of,
        LEAST_SQUARES: lambda sublayer: moments[sublayer].least_squares_scale(),
        AFFINE: lambda sublayer: moments[sublayer].affine(),
        SHIFT: lambda sublayer: moments[sublayer].shift(importance.scale_of(sublayer)),
    }
    ends = {"eos_token_ids": subject.stops, "pad_token_id": subject.pad}
    divergence = OutputDivergence(subject.loaded.model, subject.held_out[phase], phase, **ends)
    cells = []
    for count in subject.budgets:
        budget = Budget(sublayers=count)
        skipped = AdaSkip(num_layers=importance.num_layers, budget=budget, profile=importance, phase=phase).skipped
        measured = {
            name: divergence(SkipPlan.of_sublayers({sublayer: stand_in(sublayer) for sublayer in skipped.scales}))
            for name, stand_in in stand_ins.items()
        }
        cells.append({"phase": phase, "sublayers": count, "plan": skipped.to_dict(), "divergences": measured})
    return cells


def _of_task(config: CompensationConfig, name: str) -> Subject:
    loaded = find_loading(config, name).load()
    calibration = find_calibration(config).data(loaded)["prompts"]
    held_out: dict[Phase, Sequence[Tensor]] = {phase: _unscored(config, loaded, phase) for phase in PHASES}
    budgets = config.setup.budgets_for(loaded.model.config.num_hidden_layers)
    tokenizer: Any = loaded.tokenizer
    stops, pad = loaded.spec.stop_token_ids, tokenizer.pad_token_id
    return Subject(loaded, calibration, held_out, budgets, stops, pad)


def _unscored(config: CompensationConfig, loaded: LoadedModel, phase: Phase) -> list[Tensor]:
    """Prompts of the phase's tasks, in turns, behind those that a selection is searched on."""
    searched, tasks = config.setup.search_samples, config.setup.phases[phase].tasks
    records = find_records(config)
    samples = records.unscored(tasks, searched + config.held_out)
    return [prompt_ids(records.benchmark, task, [sample], loaded)[0] for task, sample in samples[searched:]]


def _of_stories(held_out: int) -> Subject:
    loaded = load_stories()
    told = tell(loaded, CALIBRATION_STORIES + held_out, TOKENS, STORIES_SEED)
    calibration, others = told[:CALIBRATION_STORIES], [story[:PROMPT_TOKENS] for story in told[CALIBRATION_STORIES:]]
    return Subject(loaded, calibration, dict.fromkeys(PHASES, others), STORIES_BUDGETS, stops=[], pad=0)
