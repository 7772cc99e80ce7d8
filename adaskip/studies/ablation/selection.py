"""`eval/stories.py`: test loss of stories260K under every strategy, on stories that the full model tells.

The first stories calibrate, the others are the test: their opening is the prompt, the rest is fed token by token as the
answer, and its mean negative log-likelihood is the loss. Nothing is compared with the calibration stories.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from adaskip.calibration.measure import calibrate
from adaskip.calibration.select import select
from adaskip.common.commands import study
from adaskip.common.files import write_text_atomic
from adaskip.common.intervals import mean, mean_estimate
from adaskip.common.locks import exclusive
from adaskip.common.options import option
from adaskip.common.paths import given_or_default
from adaskip.common.pipe_table import pipe_table
from adaskip.core.context import skipping
from adaskip.core.plan import PHASES, Budget, Phase
from adaskip.models.stories import CALIBRATION_STORIES, STORIES, load_stories, tell
from adaskip.profiles.importance import ImportanceProfile
from adaskip.runs.manifest import describe_model
from adaskip.strategies import CalibratedSkip, Strategy, build
from adaskip.studies.tables import labels

OUTPUT_DIR = "results/stories"
COMPARED = ("early_exit", "skipdecode", "unified", "adaskip")
BUDGETS = (2, 4, 6)
"""Of 10 sublayers."""
PROMPT_TOKENS = 96
ANSWER_TOKENS = 64
BATCH_SIZE = 20
"""Stories that run together; with a strategy that learns online every story runs alone, a request of its own."""
SAME = ("weights_fingerprint", "dtype", "attn_implementation", "stories", "seed", "versions")
"""What must be equal for a study to be continued."""


@dataclass(frozen=True, kw_only=True)
class SelectionStudyConfig:
    """The options of `eval/stories.py`."""

    stories: int = option("test stories", 300)
    seed: int = option("seed of the stories", 0)
    threads: int = option("CPU threads of torch", 1)
    output_dir: str | None = option(f"where everything goes; if not given, {OUTPUT_DIR}")
    draw_only: bool = option("run no model: the table of what is saved", False)

    def __post_init__(self) -> None:
        if self.stories < 2:
            raise ValueError(f"--stories must be at least 2, not {self.stories}: one story has no interval")
        if self.threads < 1:
            raise ValueError(f"--threads must be at least 1, not {self.threads}")

    @property
    def out_dir(self) -> Path:
        return given_or_default(self.output_dir, OUTPUT_DIR)

    @property
    def results_path(self) -> Path:
        return self.out_dir / "losses.json"


def main(doc: str | None) -> int:
    """The script's whole life; returns its exit code. doc: the script's docstring."""
    return study(doc, SelectionStudyConfig, _run)


def _run(config: SelectionStudyConfig) -> int:
    if not config.draw_only:
        with exclusive(config.results_path.with_suffix(".lock")):
            measure(config)
    if not config.results_path.is_file():
        raise ValueError(f"{config.results_path} does not exist; leave out --draw-only")
    text = to_text(json.loads(config.results_path.read_text(encoding="utf-8")))
    print(f"wrote {write_text_atomic(config.out_dir / 'selection.md', text)}", text, sep="\n")
    return 0


def measure(config: SelectionStudyConfig) -> None:
    """Measure the phases that are missing; each is saved as soon as it is measured.

    Raises ValueError if stories260K is not at hand, or what is saved was measured on other weights or stories.
    """
    torch.set_num_threads(config.threads)
    loaded = load_stories()
    described = {name: value for name, value in describe_model(loaded).items() if name != "checkpoint"}
    manifest = {**described, "stories": config.stories, "seed": config.seed}
    path = config.results_path
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if saved is not None and (other := [key for key in SAME if saved["manifest"].get(key) != manifest[key]]):
        raise ValueError(f"{path} was measured with other {', '.join(other)}; give another --output-dir")
    result = saved or {"manifest": manifest, "full": None, "phases": {}}
    missing: list[Phase] = [phase for phase in PHASES if phase not in result["phases"]]
    if not missing:
        return
    stories = tell(loaded, CALIBRATION_STORIES + config.stories, PROMPT_TOKENS + ANSWER_TOKENS, config.seed)
    prompts, test = stories[:CALIBRATION_STORIES], torch.stack(stories[CALIBRATION_STORIES:])
    importance = calibrate(loaded.model, prompts)
    result["full"] = losses(loaded.model, None, test)
    for phase in tqdm(missing, desc=STORIES, unit="phase", disable=None):
        result["phases"][phase] = _measure_phase(loaded.model, phase, importance, prompts, test)
        write_text_atomic(path, json.dumps(result, allow_nan=False) + "\n")


def _measure_phase(
    model: Any, phase: Phase, importance: ImportanceProfile, prompts: list[Tensor], test: Tensor
) -> dict[str, Any]:
    """What the search has cost, and of each budget the set it chose and every strategy's losses, story by story."""
    selection = select(model, prompts, phase, up_to=max(BUDGETS), eos_token_ids=[], pad_token_id=0)
    make = partial(build, phase=phase, num_layers=importance.num_layers, max_decode_steps=ANSWER_TOKENS)
    cells = []
    for count in BUDGETS:
        budget = Budget(sublayers=count)
        strategies = {name: make(name, budget=budget, profile=importance) for name in COMPARED}
        strategies[CalibratedSkip.name] = make(CalibratedSkip.name, budget=budget, profile=selection)
        measured = {name: losses(model, strategy, test) for name, strategy in strategies.items()}
        cells.append({"budget": count, "plan": selection.selected[count].plan.to_dict(), "losses": measured})
    return {"forwards": selection.cost.num_forwards, "multiple": selection.cost.multiple, "cells": cells}


@torch.no_grad()
def losses(model: Any, strategy: Strategy | None, stories: Tensor) -> list[float]:
    """Mean negative log-likelihood of each story's answer, nats a token; strategy None: the full model."""
    found = []
    for batch in stories.split(1 if strategy is not None and strategy.window_tokens else BATCH_SIZE):
        cache, logits = DynamicCache(config=model.config), []
        with nullcontext() if strategy is None else skipping(model, strategy, eos_token_id=[]):
            logits.append(model(batch[:, :PROMPT_TOKENS], past_key_values=cache).logits[:, -1])
            for i in range(PROMPT_TOKENS, batch.shape[1] - 1):
                logits.append(model(batch[:, i : i + 1], past_key_values=cache).logits[:, -1])
        log_p = torch.stack(logits, dim=1).log_softmax(dim=-1)
        found += (-log_p.gather(2, batch[:, PROMPT_TOKENS:, None])[..., 0].mean(dim=1)).tolist()
    return found


def to_text(result: dict[str, Any]) -> str:
    """The document `selection.md`: mean losses, and calibrated's paired difference from the best of the others."""
    full = result["full"]
    cells = [(phase, cell) for phase, measured in result["phases"].items() for cell in measured["cells"]]
    names = [labels.STRATEGIES[name] for name in (*COMPARED, CalibratedSkip.name)]
    costs = [
        f"{labels.PHASES[phase]} {measured['forwards']} forwards and {measured['multiple']:.0f} times its time"
        for phase, measured in result["phases"].items()
    ]
    parts = [
        f"# {STORIES}: test loss by strategy",
        f"Nats a token over {len(full)} stories the full model told itself (full model: {mean(full):.3f}), "
        f"{PROMPT_TOKENS} tokens of prompt and {ANSWER_TOKENS} of answer; calibrated on {CALIBRATION_STORIES} others. "
        "Difference: calibrated less the best of the other four, paired, with its 95 % bootstrap interval.",
        pipe_table(["Phase", "Skipped of 10", *names, "Difference", "Verdict"], [_row(*cell) for cell in cells]),
        f"The search beside AdaSkip's calibration of {CALIBRATION_STORIES} forwards: {', '.join(costs)}.",
    ]
    return "\n\n".join(parts) + "\n"


def _row(phase: str, cell: dict[str, Any]) -> list[str]:
    by_strategy = cell["losses"]
    means = {name: mean(values) for name, values in by_strategy.items()}
    best = min(COMPARED, key=means.__getitem__)
    pairs = zip(by_strategy[CalibratedSkip.name], by_strategy[best], strict=True)
    gap = mean_estimate([ours - theirs for ours, theirs in pairs])
    assert gap is not None, "there are stories"
    verdict = "better than" if gap.value < 0 else "equal to" if gap.value == 0 else "**worse than**"
    scores = [f"{means[name]:.3f}" for name in (*COMPARED, CalibratedSkip.name)]
    difference = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
    return [labels.PHASES[phase], str(cell["budget"]), *scores, difference, f"{verdict} {labels.STRATEGIES[best]}"]
