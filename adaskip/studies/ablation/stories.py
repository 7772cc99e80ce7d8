"""`eval/stories.py`: test loss of stories260K under every strategy, on stories sampled from the full model.

The loss of such stories under the full model is its own entropy, so the loss that skipping adds estimates the
divergence of the skipped model from the full one. The first stories calibrate, the others test: their beginning is the
prompt, the rest is fed token by token as the answer.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from adaskip.calibration.measure import calibrate
from adaskip.calibration.select import select
from adaskip.common.files import write_text_atomic
from adaskip.common.intervals import mean, mean_estimate
from adaskip.common.locks import exclusive
from adaskip.common.options import check_options, option
from adaskip.common.paths import given_or_default
from adaskip.core.context import skipping
from adaskip.core.hf import CACHE
from adaskip.core.plan import PHASES, Budget, Phase
from adaskip.models.stories import CALIBRATION_STORIES, STORIES, load_stories, tell_split
from adaskip.profiles.importance import ImportanceProfile
from adaskip.runs.manifest import describe_model
from adaskip.strategies import CalibratedSkip, Strategy, build
from adaskip.studies.study import Findings, Study, check_same, read_json, read_saved
from adaskip.studies.tables import labels

OUTPUT_DIR = "results/stories"
COMPARED = ("early_exit", "skipdecode", "unified", "adaskip")
BUDGETS = (2, 4, 6)
"""Of 10 sublayers."""
PROMPT_TOKENS = 96
ANSWER_TOKENS = 64
BATCH_SIZE = 20
"""Stories per batch; 1 for strategies with online learning, which is per request."""
SAME = ("weights_fingerprint", "dtype", "attn_implementation", "stories", "seed", "versions")
"""Fields that must be equal to continue a study."""


@dataclass(frozen=True, kw_only=True)
class StoriesConfig:
    """The options of `eval/stories.py`."""

    stories: int = option("number of test stories", 300, least=2)
    seed: int = option("seed of the stories", 0)
    threads: int = option("CPU threads of torch", 1, least=1)
    output_dir: str | None = option(f"output folder; default: {OUTPUT_DIR}")
    draw_only: bool = option("run no model; make the table of the saved results", False)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def out_dir(self) -> Path:
        return given_or_default(self.output_dir, OUTPUT_DIR)

    @property
    def results_path(self) -> Path:
        return self.out_dir / "losses.json"


def measure(config: StoriesConfig) -> None:
    """Measure the missing phases; each is saved when it is complete.

    Raises ValueError if stories260K is missing, or saved results are of other weights or stories.
    """
    path = config.results_path
    with exclusive(path.with_suffix(".lock")):
        loaded = load_stories()
        described = {name: value for name, value in describe_model(loaded).items() if name != "checkpoint"}
        manifest = {**described, "stories": config.stories, "seed": config.seed}
        result = read_json(path) or {"manifest": manifest, "full": [], "phases": {}}
        check_same(result["manifest"], manifest, SAME, path)
        missing: list[Phase] = [phase for phase in PHASES if phase not in result["phases"]]
        if not missing:
            return
        prompts, others = tell_split(loaded, config.stories, PROMPT_TOKENS + ANSWER_TOKENS, config.seed)
        test = torch.stack(others)
        importance = calibrate(loaded.model, prompts)
        result["full"] = losses(loaded.model, None, test)
        for phase in tqdm(missing, desc=STORIES, unit="phase", disable=None):
            result["phases"][phase] = _measure_phase(loaded.model, phase, importance, prompts, test)
            write_text_atomic(path, json.dumps(result, allow_nan=False) + "\n")


def _measure_phase(
    model: Any, phase: Phase, importance: ImportanceProfile, prompts: list[Tensor], test: Tensor
) -> dict[str, Any]:
    """The cost of the search, and for each budget the selected set and the losses of every strategy by story."""
    selection, cells = select(model, prompts, phase, up_to=max(BUDGETS), eos_token_ids=[], pad_token_id=0), []
    for count in BUDGETS:
        measured = {}
        for name in (*COMPARED, CalibratedSkip.name):
            strategy = build(
                name,
                phase=phase,
                budget=Budget(sublayers=count),
                num_layers=importance.num_layers,
                profile=selection if name == CalibratedSkip.name else importance,
                max_decode_steps=ANSWER_TOKENS,
            )
            measured[name] = losses(model, strategy, test)
        cells.append({"budget": count, "plan": selection.selected[count].plan.to_dict(), "losses": measured})
    return {"forwards": selection.cost.num_forwards, "multiple": selection.cost.multiple, "cells": cells}


def losses(model: Any, strategy: Strategy | None, stories: Tensor) -> list[float]:
    """Mean negative log-likelihood of each story's answer, nats a token; strategy None: the full model."""
    found = []
    for batch in stories.split(1 if strategy is not None and strategy.window_tokens else BATCH_SIZE):
        of_tokens, _ = token_losses(model, strategy, batch, PROMPT_TOKENS)
        found += of_tokens.mean(dim=1).tolist()
    return found


@torch.no_grad()
def token_losses(model: Any, strategy: Strategy | None, ids: Tensor, begin: int) -> tuple[Tensor, list[int]]:
    """Negative log-likelihood [B, S - begin] of the tokens from `begin` on, fed one by one, and the FFNs that the
    strategy added online. ids: [B, S]."""
    cache, logits = DynamicCache(config=model.config), []
    with nullcontext() if strategy is None else skipping(model, strategy, eos_token_id=[]) as session:
        for start, end in [(0, begin), *((i, i + 1) for i in range(begin, ids.shape[1] - 1))]:
            logits.append(model(input_ids=ids[:, start:end], **{CACHE: cache}).logits[:, -1])
        online = [] if session is None else list(session.last_request.online_ffns)
    log_p = torch.stack(logits, dim=1).log_softmax(dim=-1)
    return -log_p.gather(2, ids[:, begin:, None])[..., 0], online


def find(result: dict[str, Any]) -> Findings:
    """Mean losses, and the paired difference of calibrated and the best of the others."""
    full, rows, costs = result["full"], [], []
    for phase, measured in result["phases"].items():
        label = labels.PHASES[phase]
        costs.append(f"{label} {measured['forwards']} forwards and {measured['multiple']:.0f} times its time")
        for cell in measured["cells"]:
            means = {name: mean(values) for name, values in cell["losses"].items()}
            best = min(COMPARED, key=means.__getitem__)
            pairs = zip(cell["losses"][CalibratedSkip.name], cell["losses"][best], strict=True)
            gap = mean_estimate([ours - theirs for ours, theirs in pairs])
            assert gap is not None, "there are stories"
            verdict = "better than" if gap.value < 0 else "equal to" if gap.value == 0 else "**worse than**"
            scores = {labels.STRATEGIES[name]: f"{value:.3f}" for name, value in means.items()}
            difference = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
            judged = {"Difference": difference, "Verdict": f"{verdict} {labels.STRATEGIES[best]}"}
            rows.append({"Phase": label, "Skipped of 10": str(cell["budget"]), **scores, **judged})
    return Findings(
        name="selection",
        title=f"{STORIES}: test loss by strategy",
        notes=[
            f"Nats a token over {len(full)} stories the full model told itself (full model: {mean(full):.3f}), "
            f"{PROMPT_TOKENS} tokens of prompt and {ANSWER_TOKENS} of answer; calibrated on {CALIBRATION_STORIES} "
            "others. Difference: calibrated less the best of the other four, paired, with its 95 % bootstrap interval."
        ],
        claims=[],
        table=DataFrame(rows),
        closing=[f"The search beside AdaSkip's calibration of {CALIBRATION_STORIES} forwards: {', '.join(costs)}."],
        has_figure=False,
        kinds=["md"],
    )


STUDY = Study(
    StoriesConfig,
    measure,
    read=lambda config: read_saved(config.results_path),
    find=lambda result, config: [find(result)],
)
main = STUDY.main
