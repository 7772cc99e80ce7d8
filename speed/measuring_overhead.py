"""What measuring IO similarity costs: a measuring prefill against a plain one, side by side.

    python speed/measuring_overhead.py [--tokens 2048] [--rounds 15] [--threads 1] [--output FILE]

A random 100M Llama. Each round times the plain and the measuring prefill in turn, neither always first, so that a
drifting machine hits both alike; a third, separate run of each round tells the share of its time spent in measuring.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from adaskip import calibration
from adaskip.blocks import find_decoder
from adaskip.calibration import measure
from adaskip.files import write_text_atomic
from adaskip.runs.manifest import device_name, git_commit


def random_llama() -> PreTrainedModel:
    """A 100M Llama; speed does not depend on the weights' values."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=640,
        intermediate_size=1792,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to; on the CPU of this process's own time, not of others'."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def plain_prefill(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """What a measuring prefill does besides measuring: no cache, no logits."""
    find_decoder(model)(input_ids=ids[None].to(model.device), use_cache=False)


def measuring_prefill(model: PreTrainedModel, ids: torch.Tensor) -> None:
    for measured in measure(model, [ids]):
        measured.means()


def seconds(prefill: Callable[..., None], model: PreTrainedModel, ids: torch.Tensor) -> float:
    start = now(model.device)
    prefill(model, ids)
    return now(model.device) - start


def share_inside(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Time within the probe over the time of the whole measuring prefill; waits for the device around each probe."""
    stock, inside = calibration._RowSums.record, 0.0

    def record(*args) -> None:
        nonlocal inside
        start = now(model.device)
        stock(*args)
        inside += now(model.device) - start

    with mock.patch.object(calibration._RowSums, "record", record):
        whole = seconds(measuring_prefill, model, ids)
    return inside / whole


def compare(tokens: int, rounds: int) -> dict[str, float]:
    """Medians and quartiles over the rounds."""
    model = random_llama()
    ids = torch.arange(tokens) % 32000
    times: dict[Callable[..., None], list[float]] = {plain_prefill: [], measuring_prefill: []}
    shares = []
    for number in range(rounds + 1):
        for prefill in times if number % 2 else reversed(times):
            took = seconds(prefill, model, ids)
            if number:  # the first round warms up
                times[prefill].append(took)
        if number:
            shares.append(share_inside(model, ids))
    plain, measuring = times.values()
    ratios = [b / a for a, b in zip(plain, measuring, strict=True)]
    return {
        "plain_ms": 1000 * statistics.median(plain),
        "measuring_ms": 1000 * statistics.median(measuring),
        "ratio_of_medians": statistics.median(measuring) / statistics.median(plain),
        "ratio_of_fastest": min(measuring) / min(plain),
        **quartiles("ratio", ratios),
        **quartiles("share_inside", shares),
    }


def quartiles(name: str, values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {f"{name}_median": middle, f"{name}_quartile_1": low, f"{name}_quartile_3": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        "measured": "measuring prefill against plain prefill",
        "model": "random Llama, 12 layers, 100M parameters",
        **vars(arguments),
        "device": device_name(device),
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "adaskip")},
        },
        "git_commit": git_commit(),
        **compare(arguments.tokens, arguments.rounds),
    }
    result.pop("output")
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        write_text_atomic(arguments.output, text + "\n")


if __name__ == "__main__":
    main()
