"""Writes a benchmark's result file as `adaskip bench` does, with chosen speedups: for pictures without timing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

FULL_TTFT_S, FULL_TPOT_S = 0.1, 0.01


def write_speeds(
    path: Path,
    speedups: Mapping[tuple[str, str, int], float],
    *,
    full: bool = True,
    prompt_tokens: Sequence[int] = (600,),
) -> Path:
    """Write an entry per (phase, strategy, sublayers), as much faster than the full model as `speedups` says.

    A speedup is of the parts that the phase skips: the prompt, the answer, or both. With prompts of several lengths it
    is the n-th power for the n-th.
    """
    entries = []
    for power, length in enumerate(prompt_tokens, start=1):
        entries += [_entry("", "full", 0, 1.0, 1.0, length)] if full else []
        for (phase, strategy, sublayers), speedup in speedups.items():
            of_prompt, of_answer = (1.0 if phase == other else speedup**power for other in ("decode", "prefill"))
            entries.append(_entry(phase, strategy, sublayers, of_prompt, of_answer, length))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": "adaskip-bench/1", "manifest": {}, "entries": entries, "limits": [], "records": []}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def _entry(phase: str, strategy: str, sublayers: int, of_prompt: float, of_answer: float, prompt_tokens: int) -> dict:
    return {
        "phase": phase,
        "strategy": strategy,
        "budget": sublayers,
        "mode": "eager",
        "prompt_tokens": prompt_tokens,
        "new_tokens": 25,
        "batch_size": 1,
        "ttft_s": FULL_TTFT_S / of_prompt,
        "tpot_s": FULL_TPOT_S / of_answer,
        "speedup_prefill": of_prompt,
        "speedup_decode": of_answer,
    }
