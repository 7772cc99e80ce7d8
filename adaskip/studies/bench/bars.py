"""What the benchmark must show: figure, bar, what was measured, and the verdict. From saved results only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from adaskip.common.intervals import Estimate, median_estimate
from adaskip.common.pipe_table import pipe_table
from adaskip.strategies import FULL
from adaskip.studies.bench.cells import ADASKIP, COMPILED, COUNTS, EAGER, Cell, Workload
from adaskip.studies.bench.results import Record, Result
from adaskip.studies.bench.summary import (
    TIMES,
    WINDOW_STEPS,
    Comparison,
    calibration_over_plain,
    comparisons,
    patched_over_stock,
    ratios,
    tpot_s,
    window_cost,
)
from adaskip.studies.tables.paper import load_paper

REALISED = {"prefill": 0.95, "decode": 0.90}
SHARES = (0.125, 0.25)
PAPER_MODEL, PAPER_PROMPT = "llama", 8000
PARAMETERS_8B = 8_030_261_248
"""Of Llama-3.1-8B: weights of that shape, whatever they are called."""
OF_8B = "the 8B shape's at batch 1 on a GPU"
MET, MISSED, INFORMATION, NEEDS_GPU = "met", "missed", "for information", "not measured here: needs a GPU"
NO_MEMORY, TOO_SHORT = "not measured: not enough memory", f"not measured: needs {WINDOW_STEPS} decode steps"


@dataclass(frozen=True)
class Bar:
    """A bound of a ratio."""

    text: str
    bound: float
    at_most: bool
    ideal: float | None = None
    """What the ratio cannot exceed, if there is such a value."""

    def verdict(self, measured: Estimate) -> str:
        """By the median; says so if the interval reaches over the bound or lies above the ideal."""
        met = measured.value <= self.bound if self.at_most else measured.value >= self.bound
        return (MET if met else MISSED) + self._doubt(measured)

    def _doubt(self, measured: Estimate) -> str:
        if measured.low is None or measured.high is None:
            return ""
        if measured.low < self.bound < measured.high:
            return " (the interval holds both)"
        above = self.ideal is not None and measured.low > self.ideal
        return " (the interval lies above the ideal)" if above else ""


def at_most(bound: float, text: str) -> Bar:
    return Bar(text, bound, at_most=True)


def at_least(bound: float, text: str, ideal: float | None = None) -> Bar:
    return Bar(text, bound, at_most=False, ideal=ideal)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    figure: str
    bar: str
    measured: str
    verdict: str
    where: str = ""
    command: str = ""


@dataclass(frozen=True)
class Finding:
    """A figure of one result: its number (None if the answers are too short), its bar, and for what."""

    about: str
    measured: Estimate | None
    bar: Bar
    note: str = ""
    counts: bool = True
    """Whether the bar is meant for a run of this kind; else the number is for information."""


Find = Callable[[Result, Workload], Iterator[Finding]]


def _overhead(result: Result, workload: Workload) -> Iterator[Finding]:
    counts = result.of(workload, Cell(COUNTS))
    for phase, step in (("prefill", "prefill"), ("decode", "decode_step")):
        note = ""
        if counts:
            stock, patched = (counts[0][name] for name in (FULL, "patched"))
            same = stock["torch_operations"][step] == patched["torch_operations"][step]
            calls = patched["python_calls"][step] / stock["python_calls"][step]
            operations = "the same torch operations" if same else "other torch operations"
            note = f"{operations}, {calls:.3f}x the Python calls"
        yield Finding(phase, patched_over_stock(result, workload, EAGER, phase), at_most(1.01, "at most 1.01x"), note)


def _realised(result: Result, workload: Workload) -> Iterator[Finding]:
    """In phase prefill, where one set serves prompt and answer and no window measures; on models that are no toys."""
    identity = result.manifest["identity"]
    if identity["testbed"] or COMPILED in identity.get("modes", ()):  # those results are about something else
        return
    for compared in comparisons(result):
        share = compared.cell.sublayers / _num_sublayers(result)
        ours = (compared.cell.name, compared.cell.phase) == (ADASKIP, "prefill")
        if compared.workload != workload or not ours or share not in SHARES:
            continue
        for phase, bound in REALISED.items():
            if realised := compared.realised(phase):
                about = f"{phase}, {100 * share:g} %"
                yield Finding(about, realised, at_least(bound, f"at least {bound:.2f}", ideal=1.0))


def _window(result: Result, workload: Workload) -> Iterator[Finding]:
    for cell in result.cells(workload):
        if cell.name == ADASKIP:
            long_enough = workload.decode_steps >= WINDOW_STEPS
            cost = window_cost(result, workload, cell) if long_enough else None
            yield Finding(cell.label, cost, at_most(0.01, "at most 0.01"))


def _calibration(result: Result, workload: Workload) -> Iterator[Finding]:
    about = f"{workload.prompt_tokens} tokens"
    yield Finding(about, calibration_over_plain(result, workload), at_most(1.02, "at most 1.02x"))


def _compiled_limit(result: Result, workload: Workload) -> Iterator[Finding]:
    counts = _is_8b_on_gpu(result, workload)
    bar = at_most(1.35, "at most 1.35x" if counts else f"at most 1.35x ({OF_8B})")
    for compared in _compiled(result, workload):
        if limit := result.limit(workload, compared.cell):
            over = median_estimate([tpot_s(record) / limit["tpot_s"] for record in compared.records])
            yield Finding(compared.cell.label, over, bar, counts=counts)


def _compiled_eager(result: Result, workload: Workload) -> Iterator[Finding]:
    counts = _is_8b_on_gpu(result, workload)
    bar = at_least(1.5, "at least 1.5x" if counts else f"at least 1.5x ({OF_8B})")
    for compared in _compiled(result, workload):
        cell = compared.cell
        if eager := result.of(workload, Cell(cell.name, cell.phase, cell.sublayers, EAGER)):
            yield Finding(cell.label, ratios(eager, compared.records, "decode"), bar, counts=counts)


def _paper(result: Result, workload: Workload) -> Iterator[Finding]:
    """The 8B shape in phase e2e; for information, other models and devices in every phase, at the same shares, at batch
    1 and uncompiled.

    Beside what the paper measured of a model that it does not have stands Llama's. Paper: Table 3.
    """
    counts, paper, identity = _is_8b_on_gpu(result, workload), load_paper(), result.manifest["identity"]
    alike = counts or (workload.batch_size == 1 and COMPILED not in identity.get("modes", ()))
    if identity["testbed"] or not alike or (counts and workload.prompt_tokens != PAPER_PROMPT):
        return
    model = identity["model"] if identity["model"] in paper.models else PAPER_MODEL
    for compared in comparisons(result):
        cell = compared.cell
        if compared.workload != workload or cell.name != ADASKIP or (counts and cell.phase != "e2e"):
            continue
        for phase in TIMES:
            bound = paper.tables[phase].speedup(model, ADASKIP, cell.sublayers / _num_sublayers(result))
            if bound is not None and (phase, cell.phase) != ("prefill", "decode"):
                bar = at_least(bound, f"at least {bound:.2f}x" if counts else f"{model}'s in the paper {bound:.2f}x")
                yield Finding(f"{phase}, {cell.label}", compared.speedup(phase), bar, counts=counts)


def _compiled(result: Result, workload: Workload) -> list[Comparison]:
    return [c for c in comparisons(result) if c.workload == workload and c.cell.mode == COMPILED]


def _num_sublayers(result: Result) -> int:
    return 2 * result.manifest["identity"]["subject"]["num_layers"]


def _is_8b_on_gpu(result: Result, workload: Workload) -> bool:
    of_8b = result.manifest["identity"]["subject"]["parameters"] == PARAMETERS_8B
    return of_8b and result.device != "cpu" and workload.batch_size == 1


FIGURES: tuple[tuple[str, str, str, bool, Find], ...] = (
    ("nothing skipped, patched / stock", "at most 1.01x", "overhead", False, _overhead),
    ("saving realised / ideal", "at least 0.95 (prefill), 0.90 (decode)", "strategies", False, _realised),
    ("learning window's cost over 256 tokens", "at most 0.01", "window", False, _window),
    ("calibration / plain prefill", "at most 1.02x", "calibration", False, _calibration),
    ("compiled decode / limit", "at most 1.35x", "strategies", True, _compiled_limit),
    ("eager / compiled decode", "at least 1.5x", "strategies", True, _compiled_eager),
    ("AdaSkip's speedup, against the paper's L20", "1.09, 1.22; 1.15, 1.32", "strategies", True, _paper),
)
"""Figure, its bar, the study it comes from, whether the bar is a GPU's, and how it is found in a result."""


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Every figure that must be shown, with each result that has it; a line without a number where none has."""
    rows = []
    for figure, bar, study, gpu_only, find in FIGURES:
        found = [
            _row(figure, result, workload, finding)
            for result in results
            if result.study == study
            for workload in result.workloads
            if result.rounds_of(workload)
            for finding in find(result, workload)
        ]
        if gpu_only and all(row.verdict == INFORMATION for row in found):
            found.append(Row(figure, bar, "", NEEDS_GPU))
        if study != "strategies":  # which has a table of its own for what lacked memory
            found += _failed_rows(figure, bar, study, results)
        rows += found or [Row(figure, bar, "", "not measured yet")]
    return rows + _kv_rows(results)


def _row(figure: str, result: Result, workload: Workload, finding: Finding) -> Row:
    name, where = f"{figure}: {finding.about}", _where(result, workload)
    if finding.measured is None:
        return Row(name, finding.bar.text, "", TOO_SHORT, where, _command(result))
    verdict = finding.bar.verdict(finding.measured) if finding.counts else INFORMATION
    measured = "; ".join(filter(None, (_estimate(finding.measured), finding.note)))
    return Row(name, finding.bar.text, measured, verdict, where, _command(result))


def _failed_rows(figure: str, bar: str, study: str, results: Sequence[Result]) -> list[Row]:
    """Of the workloads without a single round."""
    return [
        Row(figure, bar, "", NO_MEMORY, _where(result, workload), _command(result))
        for result in results
        if result.study == study
        for workload in result.workloads
        if result.failed(workload) and not result.rounds_of(workload)
    ]


def _kv_rows(results: Sequence[Result]) -> list[Row]:
    figure, bar = "KV bytes", "exactly live / all"
    rows = [
        _kv_row(f"{figure}: {cell.phase}, {cell.sublayers} sublayers", bar, result, workload, cell)
        for result in results
        if result.study == "kv"
        for workload in result.workloads
        for cell in result.cells(workload)
    ]
    return rows + _failed_rows(figure, bar, "kv", results) or [Row(figure, bar, "", "not measured yet")]


def _kv_row(name: str, bar: str, result: Result, workload: Workload, cell: Cell) -> Row:
    """The first round that missed the bar, or the last one."""
    checks = result.of(workload, cell)
    missed = [check for check in checks if not _kv_exact(check)]
    check = missed[0] if missed else checks[-1]
    kept = check["kept_alive"]
    measured = (
        f"{check['bytes_at_end']:,} of {check['all_layers_at_end']:,} bytes with {check['live_layers']} of "
        f"{check['layers']} layers live; " + (f"not freed: layers {kept}" if kept else "freed before the step")
    )
    return Row(name, bar, measured, MISSED if missed else MET, _where(result, workload), _command(result))


def _kv_exact(check: Record) -> bool:
    before = check["bytes_before_decode"] == check["expected_before_decode"]
    return before and check["bytes_at_end"] == check["expected_at_end"] and not check["kept_alive"]


def _estimate(measured: Estimate) -> str:
    between = "" if measured.low is None else f" [{measured.low:.4g}, {measured.high:.4g}]"
    return f"{measured.value:.4g}{between}"


def _where(result: Result, workload: Workload) -> str:
    identity = result.manifest["identity"]
    rounds = result.rounds_of(workload)
    return f"{result.device}, {identity['model']} ({_weights(identity)}), {workload}, {rounds} rounds"


def _weights(identity: dict[str, Any]) -> str:
    return "random" if identity["random_weights"] else "testbed" if identity["testbed"] else "checkpoint"


def _command(result: Result) -> str:
    figure = result.manifest.get("figure")
    return f"`adaskip bench --figure {figure}`" if figure else ""


def bars_markdown(results: Sequence[Result]) -> str:
    """The table figure | bar | measured | verdict, with where and by which command."""
    header = ["figure", "bar", "measured [95 % interval]", "verdict", "device and work", "command"]
    return pipe_table(header, [[r.figure, r.bar, r.measured, r.verdict, r.where, r.command] for r in rows_of(results)])
