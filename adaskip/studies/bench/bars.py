"""What the benchmark must show: figure, bar, measured value and verdict, from saved results only.

The bars are in `bars` of `configs/bench.yaml`; this module finds the number for each in a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from adaskip.common.configs import load_yaml
from adaskip.common.intervals import Estimate
from adaskip.common.pipe_table import pipe_table
from adaskip.strategies import FULL
from adaskip.studies.bench.results import (
    WINDOW_STEPS,
    Result,
    full_of,
    median_of_rounds,
    ratio,
    realised,
    slowdown,
    time_of,
    window_cost,
)
from adaskip.studies.bench.settings import (
    ADASKIP,
    COMPILED,
    COUNTS,
    EAGER,
    IN_PLACE,
    MEASURING_PREFILL,
    PATCHED,
    PLAIN_PREFILL,
    PLAIN_STEPS,
    Cell,
    Workload,
)
from adaskip.studies.tables.paper import load_paper

PHASES = ("prefill", "decode")
PARAMETERS_8B = 8_030_261_248
"""Parameters of Llama-3.1-8B, which identify its shape."""
MET, MISSED, INFORMATION, NEEDS_GPU = "met", "missed", "for information", "not measured here: needs a GPU"
NO_MEMORY, TOO_SHORT = "not measured: not enough memory", f"not measured: needs {WINDOW_STEPS} decode steps"
NOTHING = "not measured yet"
Bar = Mapping[str, Any]
"""An entry of `bars`: figure, bar (its text), study, and `at_most` or `at_least`."""


class Row(NamedTuple):
    """One line of the table."""

    figure: str
    bar: str
    measured: str
    verdict: str
    where: str = ""
    command: str = ""


class Finding(NamedTuple):
    """A number of a result: its subject, its value (None if the answers are too short), its bar, and a note.

    counts: whether the bar applies to such a run; else the number is for information.
    """

    about: str
    measured: Estimate | None
    bar: Bar
    note: str = ""
    counts: bool = True


def verdict(measured: Estimate, bar: Bar) -> str:
    """The verdict by the median; it mentions an interval that includes the bound or is above the ideal."""
    below = "at_most" in bar
    bound = bar["at_most"] if below else bar["at_least"]
    met = MET if (measured.value <= bound if below else measured.value >= bound) else MISSED
    if measured.low is None or measured.high is None:
        return met
    if measured.low < bound < measured.high:
        return f"{met} (the interval includes the bar)"
    above = bar.get("ideal") is not None and measured.low > bar["ideal"]
    return f"{met} (the interval lies above the ideal)" if above else met


def _overhead(bar: Bar, result: Result, workload: Workload) -> Iterator[Finding]:
    counts = result.of(workload, Cell(COUNTS))
    for phase, step in (("prefill", "prefill"), ("decode", "decode_step")):
        note = ""
        if counts:
            stock, patched = counts[0][FULL], counts[0][PATCHED]
            same = stock["torch_operations"][step] == patched["torch_operations"][step]
            calls = patched["python_calls"][step] / stock["python_calls"][step]
            note = f"{'the same' if same else 'other'} torch operations, {calls:.3f}x the Python calls"
        yield Finding(phase, slowdown(result, workload, Cell(PATCHED), phase), bar, note)


def _saving(bar: Bar, result: Result, workload: Workload) -> Iterator[Finding]:
    """In phase prefill, with one set for prompt and answer and no learning window; not on the testbed's models."""
    if result.weights == "testbed" or COMPILED in result.identity.get("modes", ()):
        return
    for cell in result.cells(workload):
        share = _share(result, cell)
        for phase in PHASES if (cell.name, cell.phase) == (ADASKIP, "prefill") and share in bar["shares"] else ():
            if saved := realised(result, workload, cell, phase):
                bound = bar["at_least"][phase]
                yield Finding(f"{phase}, {100 * share:g} %", saved, _of_ratio(bar, f"at least {bound:.2f}", bound))


def _plain_steps(bar: Bar, result: Result, workload: Workload) -> Iterator[Finding]:
    dtype = result.identity["subject"]["dtype"]
    for cell in result.cells(workload):
        for phase in PHASES if cell.name == PLAIN_STEPS else ():
            about = f"{phase}, {dtype}, AdaSkip's {cell.sublayers} in {cell.phase} as drafts"
            yield Finding(about, slowdown(result, workload, cell, phase), bar)


def _cache(bar: Bar, result: Result, workload: Workload) -> Iterator[Finding]:
    dtype = result.identity["subject"]["dtype"]
    for phase in PHASES:
        measured = slowdown(result, workload, Cell(IN_PLACE), phase)
        yield Finding(f"{phase}, {dtype}", measured, {**bar, "at_most": bar["at_most"][phase]})


def _window(bar: Bar, result: Result, workload: Workload) -> Iterator[Finding]:
    for cell in result.cells(workload):
        if cell.name == ADASKIP:
            yield Finding(cell.label, window_cost(result, workload, cell), bar)


def _calibration(bar: Bar, result: Result, workload: Workload) -> Iterator[Finding]:
    measured = ratio(result, workload, Cell(MEASURING_PREFILL), Cell(PLAIN_PREFILL))
    yield Finding(f"{workload.prompt_tokens} tokens", measured, bar)


def _compiled(bar: Bar, result: Result, workload: Workload) -> Iterator[Finding]:
    """For each compiled cell its time / its limit, or its eager time / its time."""
    counts = _is_8b_on_gpu(result, workload)
    bar = bar if counts else {**bar, "bar": f"{bar['bar']} (the 8B shape's at batch 1 on a GPU)"}
    for cell in result.cells(workload):
        eager, limit = Cell(cell.name, cell.phase, cell.sublayers, EAGER), result.limit(workload, cell)
        if cell.mode != COMPILED:
            continue
        if "at_most" in bar and limit is not None:
            times = ((r["round"], time_of(r, "decode") / limit["tpot_s"]) for r in result.of(workload, cell))
            yield Finding(cell.label, median_of_rounds(times), bar, counts=counts)
        elif "at_least" in bar and result.of(workload, eager):
            yield Finding(cell.label, ratio(result, workload, eager, cell, "decode"), bar, counts=counts)


def _paper(bar: Bar, result: Result, workload: Workload) -> Iterator[Finding]:
    """The 8B shape in phase e2e; for information, other models and devices in every phase at the same fractions, batch
    size 1, uncompiled.

    A model that the paper does not have is compared with its Llama. Paper: Table 3.
    """
    counts, paper, identity = _is_8b_on_gpu(result, workload), load_paper(), result.identity
    alike = counts or (workload.batch_size == 1 and COMPILED not in identity.get("modes", ()))
    if result.weights == "testbed" or not alike or (counts and workload.prompt_tokens != bar["prompt_tokens"]):
        return
    model = identity["model"] if identity["model"] in paper.models else bar["model"]
    for cell in result.cells(workload):
        if cell.name != ADASKIP or (counts and cell.phase != "e2e"):
            continue
        for phase in PHASES:
            bound = paper.tables[phase].speedup(model, ADASKIP, _share(result, cell))
            if bound is not None and (phase, cell.phase) != ("prefill", "decode"):
                text = f"at least {bound:.2f}x" if counts else f"{model}'s in the paper {bound:.2f}x"
                measured = ratio(result, workload, full_of(cell), cell, phase)
                yield Finding(f"{phase}, {cell.label}", measured, _of_ratio(bar, text, bound), counts=counts)


def _of_ratio(bar: Bar, text: str, bound: float) -> Bar:
    return {**bar, "bar": text, "at_least": bound}


def _share(result: Result, cell: Cell) -> float:
    return cell.sublayers / (2 * result.identity["subject"]["num_layers"])


def _is_8b_on_gpu(result: Result, workload: Workload) -> bool:
    of_8b = result.identity["subject"]["parameters"] == PARAMETERS_8B
    return of_8b and result.device != "cpu" and workload.batch_size == 1


FIND: dict[str, Callable[[Bar, Result, Workload], Iterator[Finding]]] = {
    "overhead": _overhead,
    "plain_steps": _plain_steps,
    "cache": _cache,
    "saving": _saving,
    "window": _window,
    "calibration": _calibration,
    "compiled_limit": _compiled,
    "compiled_eager": _compiled,
    "paper": _paper,
}


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Every figure with each result that has it; a row without a number if none has. Those with --keep-kv have none."""
    rows = []
    for name, bar in load_yaml("bench")["bars"].items():
        measured = [(r, w) for r in results if r.study == bar["study"] and not r.keep_kv for w in r.workloads]
        found = []
        for result, workload in measured:
            if name == "kv":
                found += [_kv_row(bar, result, workload, cell) for cell in result.cells(workload)]
            elif result.rounds_of(workload):
                found += [_row(finding, result, workload) for finding in FIND[name](bar, result, workload)]
        if bar.get("gpu") and all(row.verdict == INFORMATION for row in found):
            found.append(Row(bar["figure"], bar["bar"], "", NEEDS_GPU))
        if bar["study"] != "strategies":  # it has its own table of cells that ran out of memory
            for result, workload in measured:
                if result.failure(workload) and not result.rounds_of(workload):
                    found.append(Row(bar["figure"], bar["bar"], "", NO_MEMORY, *_where(result, workload)))
        rows += found or [Row(bar["figure"], bar["bar"], "", NOTHING)]
    return rows


def _row(found: Finding, result: Result, workload: Workload) -> Row:
    figure, where = f"{found.bar['figure']}: {found.about}", _where(result, workload)
    if (measured := found.measured) is None:
        return Row(figure, found.bar["bar"], "", TOO_SHORT, *where)
    between = "" if measured.low is None else f" [{measured.low:.4g}, {measured.high:.4g}]"
    text = "; ".join(filter(None, (f"{measured.value:.4g}{between}", found.note)))
    return Row(figure, found.bar["bar"], text, verdict(measured, found.bar) if found.counts else INFORMATION, *where)


def _kv_row(bar: Bar, result: Result, workload: Workload, cell: Cell) -> Row:
    """The first round in which bytes were not exact or not freed, else the last round."""
    checks = result.of(workload, cell)
    missed = [
        check
        for check in checks
        if check["bytes_before_decode"] != check["expected_before_decode"]
        or check["bytes_at_end"] != check["expected_at_end"]
        or check["kept_alive"]
    ]
    check = missed[0] if missed else checks[-1]
    freed = f"not freed: layers {check['kept_alive']}" if check["kept_alive"] else "freed before the step"
    measured = (
        f"{check['bytes_at_end']:,} of {check['all_layers_at_end']:,} bytes with {check['live_layers']} of "
        f"{check['layers']} layers live; {freed}"
    )
    figure = f"{bar['figure']}: {cell.phase}, {cell.sublayers} sublayers"
    return Row(figure, bar["bar"], measured, MISSED if missed else MET, *_where(result, workload))


def _where(result: Result, workload: Workload) -> tuple[str, str]:
    """Device and work, and the command that measured them."""
    identity, figure = result.identity, result.manifest.get("figure")
    rounds = result.rounds_of(workload)
    where = f"{result.device}, {identity['model']} ({result.weights}), {workload}, {rounds} rounds"
    return where, f"`adaskip bench --figure {figure}`" if figure else ""


def bars_markdown(results: Sequence[Result]) -> str:
    """The table of figure, bar, measured value and verdict, with device, work and command."""
    header = ["figure", "bar", "measured [95 % interval]", "verdict", "device and work", "command"]
    return pipe_table(header, rows_of(results))
