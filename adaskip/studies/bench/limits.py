"""The least times of a benchmark's cells at the ceilings measured on the device it ran on."""

from __future__ import annotations

from adaskip.core.plan import EMPTY_PLAN
from adaskip.roofline import ModelShape, measure_ceilings, predict
from adaskip.studies.bench.cells import BREAKDOWN, Cell, Workload
from adaskip.studies.bench.results import Record, Result
from adaskip.studies.bench.skip_sets import decode_plans
from adaskip.studies.bench.trials import Trials
from adaskip.studies.engines.engines import ENGINE_MODES


def lacks_limits(result: Result) -> bool:
    """Whether some cell has no limit yet."""
    return any(result.limit(w, cell) is None for w in result.workloads for cell in _timed_cells(result, w))


def limits_of(result: Result, trials: Trials, attn_implementation: str) -> list[Record]:
    """`ttft_s` and `tpot_s` of every cell if it ran at the measured copy bandwidth and matmul rate.

    The ceilings stand in the result's manifest.
    """
    model = trials.subject.model
    ceilings = measure_ceilings(model.device, model.dtype)
    result.manifest["ceilings"] = {
        "matmul_flops": ceilings.matmul_flops,
        "bandwidth_bytes_per_s": ceilings.bandwidth,
        "source": ceilings.source,
    }
    shape, limits = ModelShape.of(model.config), []
    for workload in result.workloads:
        for cell in _timed_cells(result, workload):
            strategy = trials.strategy(cell, workload)
            online = result.of(workload, cell)[-1].get("online_ffns", [])
            plans = [] if strategy is None else decode_plans(strategy, workload.decode_steps, online)
            times = predict(
                shape,
                prefill_plan=EMPTY_PLAN if strategy is None else strategy.prefill_plan,
                decode_plan=lambda step, plans=plans: plans[step - 1] if plans else EMPTY_PLAN,
                prompt_tokens=workload.prompt_tokens,
                new_tokens=workload.new_tokens,
                batch_size=workload.batch_size,
                ceilings=ceilings,
                bytes_per_value=model.dtype.itemsize,
                attention="eager" if attn_implementation == "eager" else "fused",
            )
            about = {"workload": vars(workload), "cell": cell.to_dict()}
            limits.append({**about, "ttft_s": times.ttft_s, "tpot_s": times.tpot_s})
    return limits


def _timed_cells(result: Result, workload: Workload) -> list[Cell]:
    return [cell for cell in result.cells(workload) if cell.name != BREAKDOWN and cell.mode not in ENGINE_MODES]
