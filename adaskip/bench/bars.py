"""What the benchmark must show: figure, bar, what was measured, and the verdict. From saved results only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from adaskip.bench.cells import ADASKIP, COMPILED, COUNTS, EAGER, Cell, Workload
from adaskip.bench.results import Result
from adaskip.bench.summary import (
    TIMES,
    Comparison,
    calibration_over_plain,
    comparisons,
    patched_over_stock,
    ratios,
    window_cost,
)
from adaskip.results.intervals import Estimate
from adaskip.results.markdown import pipe_table
from adaskip.strategies import FULL

REALISED = {"prefill": 0.95, "decode": 0.90}
SHARES = (0.125, 0.25)
PAPER = {(8, "prefill"): 1.09, (16, "prefill"): 1.22, (8, "decode"): 1.15, (16, "decode"): 1.32}
"""Actual speedup of AdaSkip on LLaMA3.1-8B on an L20, by skipped sublayers. Paper: Table 3."""
PAPER_PROMPT = 8000
MET, MISSED, INFORMATION, NEEDS_GPU = "met", "missed", "for information", "not measured here: needs a GPU"


@dataclass(frozen=True)
class Bar:
    """A bound of a ratio."""

    text: str
    bound: float
    at_most: bool

    def verdict(self, measured: Estimate) -> str:
        """By the median; says so if the interval reaches over the bound."""
        met = measured.value <= self.bound if self.at_most else measured.value >= self.bound
        low, high = measured.low, measured.high
        unsure = low is not None and high is not None and low < self.bound < high
        return (MET if met else MISSED) + (" (the interval holds both)" if unsure else "")


def at_most(bound: float, text: str) -> Bar:
    return Bar(text, bound, at_most=True)


def at_least(bound: float, text: str) -> Bar:
    return Bar(text, bound, at_most=False)


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
    """A figure of one result: its number, the bar it is held against, and for what."""

    about: str
    measured: Estimate
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
    if result.manifest["identity"]["testbed"]:
        return
    sublayers = 2 * result.manifest["identity"]["subject"]["num_layers"]
    for compared in comparisons(result):
        share = compared.cell.sublayers / sublayers
        ours = (compared.cell.name, compared.cell.phase) == (ADASKIP, "prefill")
        if compared.workload != workload or not ours or share not in SHARES:
            continue
        for phase, bound in REALISED.items():
            if realised := compared.realised(phase):
                about = f"{phase}, {100 * share:g} %"
                yield Finding(about, realised, at_least(bound, f"at least {bound:.2f}"))


def _window(result: Result, workload: Workload) -> Iterator[Finding]:
    for cell in result.cells(workload):
        if cell.name == ADASKIP:
            yield Finding(cell.mode, window_cost(result, workload, cell), at_most(0.01, "at most 0.01"))


def _calibration(result: Result, workload: Workload) -> Iterator[Finding]:
    about = f"{workload.prompt_tokens} tokens"
    yield Finding(about, calibration_over_plain(result, workload), at_most(1.02, "at most 1.02x"))


def _compiled_limit(result: Result, workload: Workload) -> Iterator[Finding]:
    for compared in _compiled(result, workload):
        if limit := result.limit(workload, compared.cell):
            over = Estimate(compared.seconds("decode") / limit["tpot_s"])
            yield Finding(_name(compared), over, at_most(1.35, "at most 1.35x"), counts=_on_gpu(result))


def _compiled_eager(result: Result, workload: Workload) -> Iterator[Finding]:
    for compared in _compiled(result, workload):
        cell = compared.cell
        eager = result.of(workload, Cell(cell.name, cell.phase, cell.sublayers, EAGER))
        if eager:
            faster = ratios(eager, compared.records, "decode")
            yield Finding(_name(compared), faster, at_least(1.5, "at least 1.5x"), counts=_on_gpu(result))


def _paper(result: Result, workload: Workload) -> Iterator[Finding]:
    identity = result.manifest["identity"]
    if identity["model"] != "llama" or identity["testbed"] or workload.prompt_tokens != PAPER_PROMPT:
        return
    for compared in comparisons(result):
        if compared.workload != workload or (compared.cell.name, compared.cell.phase) != (ADASKIP, "e2e"):
            continue
        for phase in TIMES:
            bound = PAPER.get((compared.cell.sublayers, phase))
            if bound is not None:
                about = f"{phase}, {compared.cell.sublayers} sublayers, {compared.cell.mode}"
                yield Finding(about, compared.speedup(phase), at_least(bound, f"at least {bound:.2f}x"))


def _compiled(result: Result, workload: Workload) -> list[Comparison]:
    return [c for c in comparisons(result) if c.workload == workload and c.cell.mode == COMPILED]


def _name(compared: Comparison) -> str:
    return " ".join(filter(None, (compared.cell.name, str(compared.cell.sublayers or ""))))


def _on_gpu(result: Result) -> bool:
    return result.device != "cpu"


FIGURES: tuple[tuple[str, str, str, bool, Find], ...] = (
    ("nothing skipped, patched / stock", "at most 1.01x", "overhead", False, _overhead),
    ("saving realised / ideal", "at least 0.95 (prefill), 0.90 (decode)", "strategies", False, _realised),
    ("learning window's cost over 256 tokens", "at most 0.01", "window", False, _window),
    ("calibration / plain prefill", "at most 1.02x", "calibration", False, _calibration),
    ("compiled decode / limit", "at most 1.35x", "strategies", True, _compiled_limit),
    ("eager / compiled decode", "at least 1.5x", "strategies", True, _compiled_eager),
    ("speedup of the 8B shape against the paper's L20", "1.09, 1.22; 1.15, 1.32", "strategies", True, _paper),
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
            if not result.failed(workload)
            for finding in find(result, workload)
        ]
        if gpu_only and all(row.verdict == INFORMATION for row in found):
            found.append(Row(figure, bar, "", NEEDS_GPU))
        rows += found or [Row(figure, bar, "", "not measured yet")]
    return rows + _kv_rows(results)


def _row(figure: str, result: Result, workload: Workload, finding: Finding) -> Row:
    verdict = finding.bar.verdict(finding.measured) if finding.counts else INFORMATION
    bar = finding.bar.text if finding.counts else "a GPU's"
    measured = "; ".join(filter(None, (_estimate(finding.measured), finding.note)))
    return Row(f"{figure}: {finding.about}", bar, measured, verdict, _where(result, workload), _command(result))


def _kv_rows(results: Sequence[Result]) -> list[Row]:
    rows = []
    for result in results:
        checks: list[dict[str, Any]] = [r for r in result.records if "error" not in r] if result.study == "kv" else []
        for check in checks:
            exact = all(
                check[held] == check[expected]
                for held, expected in (
                    ("bytes_before_decode", "expected_before_decode"),
                    ("bytes_at_end", "expected_at_end"),
                )
            )
            cell, workload = Cell(**check["cell"]), Workload(**check["workload"])
            kept = check["kept_alive"]
            measured = (
                f"{check['bytes_at_end']:,} of {check['all_layers_at_end']:,} bytes with {check['live_layers']} of "
                f"{check['layers']} layers live; " + (f"not freed: layers {kept}" if kept else "freed before the step")
            )
            verdict = MET if exact and not kept else MISSED
            name = f"KV bytes: {cell.phase}, {cell.sublayers} sublayers"
            rows.append(Row(name, "exactly live / all", measured, verdict, _where(result, workload), _command(result)))
    return rows or [Row("KV bytes", "exactly live / all", "", "not measured yet")]


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
