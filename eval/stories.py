"""Test loss of stories260K under every strategy, on stories the full model tells: `python eval/stories.py`.

The model samples stories at temperature 1. The first ones calibrate, the others are the test: their opening is the
prompt, the rest is fed token by token as the answer, and its mean negative log-likelihood is the loss. Nothing is
compared with the calibration stories. stories260K is read from $ADASKIP_REAL/stories260K.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from adaskip.calibration import calibrate
from adaskip.context import skipping
from adaskip.files import write_text_atomic
from adaskip.models import load_model
from adaskip.plan import PHASES, Budget
from adaskip.results.intervals import mean_estimate
from adaskip.results.labels import PHASES as PHASE_LABELS
from adaskip.results.labels import STRATEGIES as LABELS
from adaskip.results.markdown import pipe_table
from adaskip.runs.manifest import describe_model
from adaskip.selection.select import select
from adaskip.strategies import build

COMPARED = ("early_exit", "skipdecode", "unified", "adaskip")
BUDGETS = (2, 4, 6)
CALIBRATION_STORIES = 20
PROMPT_TOKENS = 96
ANSWER_TOKENS = 64
BATCH_SIZE = 20
"""Stories that run together; with a strategy that learns online every story runs alone, a request of its own."""


def tell(model: Any, bos: int, count: int) -> Tensor:
    """Stories sampled at temperature 1, [count, PROMPT_TOKENS + ANSWER_TOKENS], begun with the start token."""
    start = torch.full((count, 1), bos)
    length = PROMPT_TOKENS + ANSWER_TOKENS
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    return model.generate(start, min_length=length, max_length=length, **options)


@torch.no_grad()
def losses(model: Any, strategy: Any, stories: Tensor) -> list[float]:
    """Mean negative log-likelihood of each story's answer; strategy None: the full model."""
    found = []
    for batch in stories.split(1 if strategy is not None and strategy.window_tokens else BATCH_SIZE):
        cache, logits = DynamicCache(config=model.config), []
        session = skipping(model, strategy, eos_token_id=[]) if strategy is not None else None
        with session if session is not None else torch.no_grad():
            logits.append(model(batch[:, :PROMPT_TOKENS], past_key_values=cache).logits[:, -1])
            for i in range(PROMPT_TOKENS, batch.shape[1] - 1):
                logits.append(model(batch[:, i : i + 1], past_key_values=cache).logits[:, -1])
        log_p = torch.stack(logits, dim=1).log_softmax(dim=-1)
        found += (-log_p.gather(2, batch[:, PROMPT_TOKENS:, None])[..., 0].mean(dim=1)).tolist()
    return found


def measure(model: Any, bos: int, num_stories: int) -> dict[str, Any]:
    """Losses of every story by phase, budget and strategy, and what the searches have cost."""
    stories = tell(model, bos, CALIBRATION_STORIES + num_stories)
    prompts, test = list(stories[:CALIBRATION_STORIES]), stories[CALIBRATION_STORIES:]
    importance = calibrate(model, prompts)
    result: dict[str, Any] = {"full": losses(model, None, test), "cells": [], "search": {}}
    for phase in PHASES:
        selection = select(model, prompts, phase, up_to=max(BUDGETS), eos_token_ids=[], pad_token_id=0)
        result["search"][phase] = {"multiple": selection.cost.multiple, "forwards": selection.cost.num_forwards}
        for budget in tqdm(BUDGETS, desc=phase, disable=None):
            by_strategy = {}
            for name in (*COMPARED, "calibrated"):
                profile = selection if name == "calibrated" else importance if name == "adaskip" else None
                options: dict[str, Any] = {"num_layers": importance.num_layers, "max_decode_steps": ANSWER_TOKENS}
                strategy = build(name, phase=phase, budget=Budget(sublayers=budget), profile=profile, **options)
                by_strategy[name] = losses(model, strategy, test)
            plan = selection.selected[budget].plan.to_dict()
            result["cells"].append({"phase": phase, "budget": budget, "plan": plan, "losses": by_strategy})
    return result


def table(result: dict[str, Any]) -> str:
    """Mean losses, and calibrated's paired difference from the best of the others with its 95 % interval."""
    rows = []
    for cell in result["cells"]:
        means = {name: sum(values) / len(values) for name, values in cell["losses"].items()}
        best = min(COMPARED, key=means.__getitem__)
        pairs = zip(cell["losses"]["calibrated"], cell["losses"][best], strict=True)
        gap = mean_estimate([ours - theirs for ours, theirs in pairs])
        assert gap is not None
        verdict = "better than" if gap.value < 0 else "equal to" if gap.value == 0 else "**worse than**"
        low, high = gap.low or 0.0, gap.high or 0.0
        scores = [f"{means[name]:.3f}" for name in means]
        place = [PHASE_LABELS[cell["phase"]], str(cell["budget"])]
        rows.append([*place, *scores, f"{gap.value:+.3f} [{low:+.3f}, {high:+.3f}]", f"{verdict} {LABELS[best]}"])
    header = ["Phase", "Skipped of 10", *(LABELS[name] for name in (*COMPARED, "calibrated")), "Difference", "Verdict"]
    return pipe_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stories", type=int, default=300, help="test stories")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output-dir", type=Path, default=Path("results/stories"))
    arguments = parser.parse_args()
    if "ADASKIP_REAL" not in os.environ:
        parser.error("ADASKIP_REAL must name the folder that holds stories260K")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    checkpoint = Path(os.environ["ADASKIP_REAL"]) / "stories260K"
    loaded = load_model(None, checkpoint=str(checkpoint), device="cpu", dtype="float32")
    tokenizer: Any = loaded.tokenizer
    result = measure(loaded.model, tokenizer.bos_token_id or 1, arguments.stories)
    result["model"] = {key: value for key, value in describe_model(loaded).items() if key != "checkpoint"}
    full = sum(result["full"]) / len(result["full"])
    text = (
        "# stories260K: test loss by strategy\n\n"
        f"Nats a token over {arguments.stories} stories the full model told itself (full model: {full:.3f}), "
        f"{PROMPT_TOKENS} tokens of prompt and {ANSWER_TOKENS} of answer; calibrated on {CALIBRATION_STORIES} others. "
        "Difference: calibrated less the best of the other four, paired, with its 95 % bootstrap interval.\n\n"
        f"{table(result)}\n"
    )
    write_text_atomic(arguments.output_dir / "losses.json", json.dumps(result) + "\n")
    print(f"wrote {write_text_atomic(arguments.output_dir / 'selection.md', text)}", text, sep="\n")


if __name__ == "__main__":
    main()
