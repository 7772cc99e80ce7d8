"""What the page of an engine benchmark says beside its tables, and its one figure."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adaskip.common.pipe_table import pipe_table
from adaskip.core.look import BLUE, GREEN, PURPLE, VERMILION, Look
from adaskip.studies.bench.results import NAMES, Record, Result
from adaskip.studies.bench.settings import EAGER, Workload
from adaskip.studies.engines.engines import ENGINE_MODES
from adaskip.studies.plots.style import save, styled

LABELS = {
    **{EAGER: "transformers", "vllm": "vLLM", "vllm-draft": "vLLM, drafted"},
    **{"llama-cpp": "llama.cpp", "llama-cpp-draft": "llama.cpp, drafted"},
}
LOOKS = {
    EAGER: Look(BLUE, "o", ()),
    "vllm": Look(VERMILION, "s", (4, 2)),
    "vllm-draft": Look(PURPLE, "^", (1, 1)),
    "llama-cpp": Look(GREEN, "D", (6, 2, 1, 2)),
    "llama-cpp-draft": Look(GREEN, "v", (1, 1)),
}


def engine_lines(result: Result, workload: Workload) -> list[str]:
    """Versions of the engines, room in vLLM's K/V cache, and how many drafted tokens were accepted."""
    cells = {cell: result.of(workload, cell)[-1] for cell in result.cells(workload) if cell.mode in ENGINE_MODES}
    lines = []
    if cells:
        versions = {LABELS[cell.mode]: record["engine"]["version"] for cell, record in cells.items()}
        lines.append(f"Engines: {', '.join(f'{name} {version}' for name, version in versions.items())}.")
    if room := {c.sublayers: r["engine"]["kv_capacity_tokens"] for c, r in cells.items() if c.mode == "vllm"}:
        rows = [[str(count), f"{room[count]:,}", f"{room[count] / room[0]:.2f}"] for count in sorted(room)]
        lines += ["Room in 1 GiB of vLLM's K/V cache:", pipe_table(("sublayers", "tokens", "times"), rows)]
    for mode in dict.fromkeys(cell.mode for cell, record in cells.items() if "drafted" in record):
        drafting = sorted(
            (c.sublayers, r["accepted"] / r["drafted"]) for c, r in cells.items() if c.mode == mode and "drafted" in r
        )
        shares = ", ".join(f"{share:.2f} with {count} sublayers skipped" for count, share in drafting)
        lines.append(f"Accepted of the tokens drafted in {LABELS[mode].split(',')[0]}: {shares}.")
    return lines


def draw_engines(result: Result) -> list[Path]:
    """Speedup over the same engine's full model against the number of skipped sublayers: a column a workload."""
    with styled():
        figure = Figure(figsize=(3.2 * len(result.workloads) + 0.6, 4.8), layout="constrained")
        axes = figure.subplots(2, len(result.workloads), squeeze=False, sharex=True, sharey="row")
        for column, workload in enumerate(result.workloads):
            entries = [entry for entry in result.entries if vars(workload).items() <= entry.items()]
            for row, phase in enumerate(NAMES):
                _draw(axes[row, column], entries, phase)
            axes[0, column].set_title(str(workload))
        for row, phase in enumerate(NAMES):
            axes[row, 0].set_ylabel(f"{phase} speedup")
        figure.supxlabel("skipped sublayers", fontsize=8)
        axes[0, 0].legend(fontsize=7)
        return save(figure, result.path.parent / "plots" / result.name)


def _draw(panel: Axes, entries: list[Record], phase: str) -> None:
    panel.axhline(1.0, color="black", linewidth=0.8)
    panel.grid(axis="y")
    for mode in dict.fromkeys(entry["mode"] for entry in entries):
        points = sorted((e for e in entries if e["mode"] == mode), key=lambda e: e["budget"])
        at, measured = [e["budget"] for e in points], [e[f"speedup_{phase}"] for e in points]
        bounds = [e[f"speedup_{phase}_interval"] for e in points]
        reach = None
        if not any(edge is None for both in bounds for edge in both):
            pairs = list(zip(measured, bounds, strict=True))
            reach = [[m - low for m, (low, _) in pairs], [high - m for m, (_, high) in pairs]]
        panel.errorbar(at, measured, yerr=reach, **LOOKS[mode].line, elinewidth=0.8, capsize=1.5, label=LABELS[mode])
    panel.set_xticks(sorted({entry["budget"] for entry in entries}))
