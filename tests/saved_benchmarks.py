"""Results of the benchmark with chosen times: for tables, bars and pictures without timing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adaskip.studies.bench.results import Result
from adaskip.studies.bench.settings import BREAKDOWN, COMPILED, COUNTS, EAGER, KV_CHECK, Cell, Workload

SMALL = {"model": "llama-100m", "num_layers": 12, "parameters": 101_924_480}
LLAMA_8B = {"model": "llama", "num_layers": 32, "parameters": 8_030_261_248}
INTERNLM = {"model": "internlm", "num_layers": 32, "parameters": 7_321_000_000}
GPU = "nvidia-l20"
KINDS = ("attention", "ffn")


def result_of(
    folder: Path, name: str, study: str, shape: dict[str, Any] = SMALL, *, device: str = "cpu", testbed: bool = False
) -> Result:
    """A result without records, of the figure of its name."""
    subject = {
        "weights": "random",
        "num_layers": shape["num_layers"],
        "parameters": shape["parameters"],
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "profile": "assumed",
        "selections": {},
    }
    identity = {
        "model": shape["model"],
        "study": study,
        "random_weights": not testbed,
        "testbed": testbed,
        "clock": "process",
        "threads": 1,
        "device_name": "NVIDIA L20" if device == GPU else "A processor",
        "versions": {"python": "3.11", "torch": "2.11", "transformers": "5.17", "adaskip": "0.1"},
        "subject": subject,
    }
    manifest = {"figure": name, "identity": identity, "rounds": 3, "git_commits": ["abc"]}
    return Result(folder / device / f"{name}.json", manifest)


def add(result: Result, workload: Workload, cell: Cell, rounds: Iterable[dict[str, Any]]) -> None:
    """One record of `cell` per round."""
    for number, measured in enumerate(rounds, start=1):
        result.records.append({"workload": vars(workload), "cell": vars(cell), "round": number, **measured})


def add_failure(result: Result, workload: Workload, cell: Cell, number: int = 0) -> None:
    """What stands in a result if `cell` lacked memory in that round."""
    about = {"workload": vars(workload), "cell": vars(cell), "round": number}
    result.records.append({**about, "error": "out of memory"})


def generation(ttft_s: float, steps_s: Sequence[float], **more: Any) -> dict[str, Any]:
    """What a generation measures. more: the shares of what it skips, or a breakdown's sublayers."""
    return {"ttft_s": ttft_s, "steps_s": list(steps_s), "kv_bytes": 1_000_000, "peak_memory_bytes": None, **more}


def add_strategies(
    result: Result,
    workload: Workload,
    phases: Sequence[str],
    budgets: Sequence[int],
    modes: Sequence[str] = (EAGER,),
    compiled_speedup: float = 2.0,
) -> None:
    """The full model, its breakdown in eager mode, and AdaSkip, three rounds each, with limits.

    Eager, the full model takes 1 s to the first token and 0.1 s a step, a fifth of both outside of the sublayers, which
    are alike. AdaSkip skips the last layers and saves exactly their time. Limits are half of the eager times.
    """
    layers, steps = result.manifest["identity"]["subject"]["num_layers"], workload.decode_steps
    sublayer = 0.8 / (2 * layers)  # of the whole time
    for mode in modes:
        faster = compiled_speedup if mode == COMPILED else 1.0
        for cell in (Cell("full", mode=mode), *(Cell("adaskip", p, n, mode) for p in phases for n in budgets)):
            left = 1 - sublayer * cell.sublayers
            ttft_s, tpot_s = 1.0 if cell.phase == "decode" else left, 0.1 * left
            gone = {"attention": _last((cell.sublayers + 1) // 2, layers), "ffn": _last(cell.sublayers // 2, layers)}
            nothing = {"attention": _last(0, layers), "ffn": _last(0, layers)}
            shares = {"prefill_shares": nothing if cell.phase == "decode" else gone, "decode_shares": gone}
            measured = generation(ttft_s, [tpot_s / faster] * steps, **(shares if cell.sublayers else {}))
            add(result, workload, cell, [measured] * 3)
            about = {"workload": vars(workload), "cell": vars(cell)}
            result.limits.append({**about, "ttft_s": ttft_s / 2, "tpot_s": tpot_s / 2})
    if EAGER in modes:
        times = {"prefill": 1.0, "decode": 0.1}
        each = {f"{part}_sublayers_s": dict.fromkeys(KINDS, [s * sublayer] * layers) for part, s in times.items()}
        add(result, workload, Cell(BREAKDOWN), [generation(1.0, [0.1] * steps, **each)] * 3)


def _last(count: int, num_layers: int) -> list[float]:
    return [0.0] * (num_layers - count) + [1.0] * count


def add_overhead(result: Result, workload: Workload, prefill: float, decode: float, calls: int = 110) -> None:
    """Patched against stock, so many times slower in three rounds, with `calls` Python calls against 100."""
    for name, (ttft_s, step_s) in {"full": (1.0, 0.1), "patched": (prefill, 0.1 * decode)}.items():
        add(result, workload, Cell(name), [generation(ttft_s, [step_s] * workload.decode_steps)] * 3)
    add(result, workload, Cell(COUNTS), [{"full": _counts(100), "patched": _counts(calls)}])


def _counts(calls: int) -> dict[str, Any]:
    return {name: {"prefill": n, "decode_step": n} for name, n in (("python_calls", calls), ("torch_operations", 50))}


def kv_check(*, held: int = 800, kept: Sequence[int] = ()) -> dict[str, Any]:
    """A check of a model that has 10 of 12 layers live and should hold 800 bytes at the end."""
    return {
        "live_layers": 10,
        "layers": 12,
        "bytes_before_decode": 700,
        "expected_before_decode": 700,
        "bytes_at_end": held,
        "expected_at_end": 800,
        "all_layers_at_end": 960,
        "kept_alive": list(kept),
    }


def add_kv(result: Result, workload: Workload, phase: str, sublayers: int, *checks: dict[str, Any]) -> None:
    add(result, workload, Cell(KV_CHECK, phase, sublayers), checks)


def save(result: Result) -> Result:
    """Write the file, and return the result."""
    result.save()
    return result
