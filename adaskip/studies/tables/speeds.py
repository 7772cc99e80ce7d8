"""Reads speedups from the result files of `adaskip bench`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adaskip.strategies.registry import FULL

BENCH_FORMAT = "adaskip-bench/1"
FULL_KEY = ("", FULL, 0)
Speeds = Mapping[tuple[str, str, int], dict[str, Any]]
"""(phase, strategy, sublayers) -> entry of a result of `adaskip bench`."""


def speed_paths(pattern: str, models: Iterable[str]) -> dict[str, Path]:
    """The result file of each model: `pattern` with {model} replaced by its name.

    Raises:
        ValueError: a file does not exist; the message names the command that makes it.
    """
    paths = {model: Path(pattern.replace("{model}", model)) for model in models}
    absent = [path for path in paths.values() if not path.is_file()]
    if absent:
        commands = " && ".join(f"adaskip bench --figure {path.stem}" for path in absent)
        raise ValueError(f"no measured speeds: {', '.join(map(str, absent))} not found; make them with: {commands}")
    return paths


def read_speeds(path: Path, prompt_tokens: int | None = None) -> Speeds:
    """The entries of uncompiled runs at batch size 1, for prompts of `prompt_tokens` tokens if given.

    Each says by `keep_kv` whether its strategy skipped only while the prompt was read (`adaskip bench --keep-kv`).

    Raises:
        ValueError: the file is not a result of the benchmark, lacks the full model, or has several prompt lengths and
            none is chosen.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != BENCH_FORMAT:
        raise ValueError(f"{path} is not a benchmark's result: its format is not {BENCH_FORMAT}")
    wanted = [entry for entry in content["entries"] if (entry["mode"], entry["batch_size"]) == ("eager", 1)]
    lengths = sorted({entry["prompt_tokens"] for entry in wanted})
    if prompt_tokens is not None and prompt_tokens not in lengths:
        raise ValueError(f"{path} has no prompts of {prompt_tokens} tokens; it has {', '.join(map(str, lengths))}")
    wanted = [entry for entry in wanted if prompt_tokens in (None, entry["prompt_tokens"])]
    kept = {"keep_kv": content["manifest"].get("identity", {}).get("keep_kv", False)}
    speeds = {(entry["phase"], entry["strategy"], entry["budget"]): {**entry, **kept} for entry in wanted}
    if len(speeds) < len(wanted):
        raise ValueError(f"{path} has prompts of {', '.join(map(str, lengths))} tokens: choose with --prompt-tokens")
    if FULL_KEY not in speeds:
        raise ValueError(f"{path} has no entry of the full model; finish it with: adaskip bench --figure {path.stem}")
    return speeds


def speedup(phase: str, ours: Mapping[str, Any], steps: float) -> float:
    """The full model's time / the strategy's: TTFT in prefill, TPOT in decode, end to end a request of `steps` steps.

    End to end, the full model's times are the strategy's times its measured speedups, so that all three agree.
    """
    if phase != "e2e":
        return ours[f"speedup_{phase}"]
    ttft_s, decode_s = ours["ttft_s"], steps * ours["tpot_s"]
    return (ttft_s * ours["speedup_prefill"] + decode_s * ours["speedup_decode"]) / (ttft_s + decode_s)
