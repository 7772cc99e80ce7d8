"""What it costs to be inside `skipping` with nothing to skip: patched against stock, side by side.

    python speed/patching_overhead.py [--rounds 15] [--threads 1] [--output FILE]

A random 100M Llama; each round times stock and patched in turn, so that a drifting machine hits both alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import nullcontext

import torch
from torch.utils.benchmark import Timer
from torch.utils.benchmark import timer as synchronizing_clock
from transformers import AutoModelForCausalLM, LlamaConfig

from adaskip.files import write_text_atomic
from adaskip.plan import Budget
from adaskip.skipping import skipping
from adaskip.strategies import EarlyExit

PREFILL = {"prompt_tokens": 512, "new_tokens": 1}
DECODE = {"prompt_tokens": 16, "new_tokens": 64}


def random_llama() -> torch.nn.Module:
    """A 100M Llama; speed does not depend on the weights' values."""
    config = LlamaConfig(vocab_size=32000, hidden_size=640, intermediate_size=1792, num_hidden_layers=12,
                         num_attention_heads=10, num_key_value_heads=10, max_position_embeddings=4096)  # fmt: skip
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)


def time_once(model, work: dict[str, int], patched: bool, threads: int) -> float:
    """Seconds of one `generate`; on the CPU of this process's own time, which other processes do not stretch."""
    ids = torch.arange(3, 3 + work["prompt_tokens"], device=model.device)[None]
    strategy = EarlyExit(num_layers=model.config.num_hidden_layers, budget=Budget(sublayers=0))
    tokens = work["new_tokens"]
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    clock = synchronizing_clock if model.device.type == "cuda" else time.process_time
    with skipping(model, strategy) if patched else nullcontext():
        timer = Timer(
            "model.generate(ids, attention_mask=mask, **options)",
            globals={"model": model, "ids": ids, "mask": torch.ones_like(ids), "options": options},
            num_threads=threads,
            timer=clock,
        )
        return timer.timeit(1).mean


def compare(rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Medians, quartiles and ratios of a prefill (one new token) and of decoding (a short prompt, many new tokens)."""
    model = random_llama()
    result = {}
    for name, work in (("prefill", PREFILL), ("decode", DECODE)):
        times = {False: [], True: []}
        for round_number in range(rounds + 1):
            for patched in (False, True) if round_number % 2 else (True, False):  # neither side always goes first
                seconds = time_once(model, work, patched, threads)
                if round_number:  # the first round warms up
                    times[patched].append(seconds)
        result[name] = {**work, **summary(times[False], times[True])}
    return result


def summary(stock: list[float], patched: list[float]) -> dict[str, float]:
    ratios = [b / a for a, b in zip(stock, patched, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "stock_ms": 1000 * statistics.median(stock),
        "patched_ms": 1000 * statistics.median(patched),
        "ratio_of_medians": statistics.median(patched) / statistics.median(stock),
        "ratio_median": middle,
        "ratio_quartile_1": low,
        "ratio_quartile_3": high,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Patched with nothing to skip against stock.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {
        "model": "random Llama, 12 layers, 100M parameters",
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        **compare(arguments.rounds, arguments.threads),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        write_text_atomic(arguments.output, text + "\n")


if __name__ == "__main__":
    main()
