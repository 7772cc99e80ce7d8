"""The output of `adaskip grid --dry-run`: the cells, an estimate for the unfinished ones, and its assumptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from adaskip.profiles.selection import METHODS
from adaskip.roofline import Ceilings, known_ceilings
from adaskip.runs.config import GridConfig
from adaskip.runs.estimate import (
    TOKENS_PER_WORD,
    CellSize,
    calibration_seconds,
    gpu_bytes,
    listing,
    result_bytes,
    search_seconds,
    seconds,
)
from adaskip.runs.job import Job

EFFICIENCY = 0.5


def dry_run(config: GridConfig) -> Iterator[str]:
    """Yield the lines to print. No cost is estimated for the small models that a benchmark brings: they need no GPU."""
    cells, ceilings = list(listing(config)), known_ceilings(config.estimate_for)
    times = {} if config.find_benchmark().models else {cell.label: seconds(cell, ceilings) for cell in cells}
    for cell in cells:
        time = f" {_time(times[cell.label]):>12}" if times else ""
        yield f"{cell.label:34} {cell.samples:6} samples{time}  {cell.state}"
    yield f"{sum(cell.is_done for cell in cells)} of {len(cells)} cells done in {config.runs_dir}"
    left = [cell for cell in cells if not cell.is_done]
    if times and left:
        yield from _cost(left, {cell.label: times[cell.label] for cell in left}, ceilings)


def _cost(left: list[CellSize], times: dict[str, float], ceilings: Ceilings) -> Iterator[str]:
    by_model: dict[str, list[CellSize]] = {}
    for cell in left:
        by_model.setdefault(cell.job.cell.model, []).append(cell)
    calibration = sum(max(calibration_seconds(c.job, ceilings) for c in mine) for mine in by_model.values())
    searches = {_search(cell.job): search_seconds(cell.job, ceilings) for cell in left}
    search = sum(searches.values())
    total = sum(times.values()) + calibration + search
    yield (
        f"estimated GPU time of the {len(left)} cells left, on one {ceilings.name}: {_time(total)}, of which "
        f"calibration {_time(calibration)} and the searches of sets {_time(search)}; "
        f"a lower bound, every sublayer at the data sheet's "
        f"{ceilings.matmul_flops / 1e12:g} TFLOP/s and {ceilings.bandwidth / 1e9:g} GB/s (efficiency 100 %); "
        f"{_time(total / EFFICIENCY)} at {100 * EFFICIENCY:.0f} %"
    )
    yield (
        "assumed: 16-bit weights, batches of one, answers at their maximum length, and equal numbers of attentions and "
        "FFNs skipped if a profile decides; not counted: loading, tokenising, kernel launches. " + _samples(left)
    )
    for model, mine in by_model.items():
        weights, kv = gpu_bytes(mine[0])
        source = mine[0].job.loading.source
        place = source.checkpoint + ("" if source.weight_files is not None else ", not on this machine")
        yield f"{model}: {_size(weights)} of weights ({place}), and up to {_size(kv)} of K/V on the GPU"
    download = 0 if all(cell.is_counted for cell in left) else left[0].job.records.benchmark.download_bytes
    data = f", and {_size(download)} of data" if download else ""
    yield f"disk: the weights, about {_size(sum(map(result_bytes, left)))} of results{data}"


def _search(job: Job) -> tuple[object, ...]:
    """Equal for jobs that share a search: of one model, strategy and numbers of sublayers, and of one phase or, if that
    is enough, tasks."""
    method = job.selection_method
    of_phase = method is None or METHODS[method].by_phase
    counts = () if method is None else job.counts
    return (job.cell.model, job.strategy, *counts, *((job.phase,) if of_phase else job.answer_caps))


def _samples(cells: Sequence[CellSize]) -> str:
    if all(cell.is_counted for cell in cells):
        return f"The samples were counted; a word is taken as {TOKENS_PER_WORD} tokens, up to the model's limit."
    benchmark = cells[0].job.records.benchmark
    return (
        f"The data was not found: numbers of samples are those that {benchmark.label or benchmark.name} states, and "
        "every prompt is as long as the model's limit."
    )


def _time(time_s: float) -> str:
    return f"{time_s / 3600:.2f} h" if time_s >= 360 else f"{time_s:.3g} s"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.2g} MB"
