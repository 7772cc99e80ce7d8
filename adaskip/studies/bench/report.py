"""Tables and plots of saved benchmarks; runs no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adaskip.common.files import write_text_atomic
from adaskip.common.pipe_table import pipe_table
from adaskip.strategies import FULL
from adaskip.studies.bench.bars import bars_markdown
from adaskip.studies.bench.results import NAMES, Record, Result, load_results, what_failed
from adaskip.studies.bench.settings import BREAKDOWN, COMPARISONS, EAGER, REFERENCE_EVERY, TURNS, Cell, Workload
from adaskip.studies.engines.report import draw_engines, engine_lines
from adaskip.studies.plots.style import LOOKS, Look, save, styled
from adaskip.studies.tables.labels import MISSING, STRATEGIES

OTHER = Look("#666666", "x", (2, 1))
"""The look of strategies that declare none."""
IDEAL = "ideal: faint"
"""The legend's text for the ideal lines of all strategies."""
INTRODUCTION = """# What the benchmark shows

Made from the saved results by `adaskip bench-report`. A ratio is the median of the ratios of the rounds, in brackets
its 95 % bootstrap interval over the rounds."""
COLUMNS = (
    *("strategy", "phase", "sublayers", "mode", "TTFT, ms", "TPOT, ms", "prefill, tokens/s", "decode, tokens/s"),
    *("prefill speedup", "of ideal saving", "decode speedup", "of ideal saving", "TTFT / limit", "TPOT / limit"),
    *("KV, MB", "peak, MB"),
)
METHOD = (
    "Speedups are over the full model in the same mode, medians over rounds with 95 % bootstrap intervals. Ideal "
    "is the full model's time less the measured time of the skipped sublayers. Limit is the time at the device's "
    "measured ceilings."
)
IN_TURNS = (
    "Other cells run between two turns of a cell, so its times are with caches that they have used: compare them "
    "within this result."
)
FREED = "The process keeps the memory that it frees, so that times contain no page faults of the allocator."
KEPT = (
    "Every strategy skips only while the prompt is read, up to its last token (`--keep-kv`): skipped attentions write "
    "their K/V, which the ideal saving counts as free, and the full model answers."
)
TOY = (
    "On so small a model the time between operations (Python, dispatch) outweighs the operations themselves: "
    "its speedups say what sublayers' number is worth, not what their size is."
)


def write_bench_report(results_dir: Path) -> list[Path]:
    """Write `summary.md` into `results_dir`, and a table and plots beside each study of strategies or engines.

    A study that ran out of memory has a page, too. Raises ValueError if there is no result.
    """
    results = load_results(results_dir)
    if not results:
        raise ValueError(f"no benchmark results in {results_dir}; `adaskip bench` makes them")
    written = [write_text_atomic(results_dir / "summary.md", f"{INTRODUCTION}\n\n{bars_markdown(results)}\n")]
    for result in results:
        if result.study in COMPARISONS or any(map(result.failure, result.workloads)):
            written.append(write_text_atomic(result.path.with_suffix(".md"), result_markdown(result)))
            written += draw_engines(result) if result.study == "engines" else draw(result)
    return written


def result_markdown(result: Result) -> str:
    """The document of a study: subject and machine, a table per workload, and the times of sublayers."""
    parts = [f"# {result.name}", *_about(result)]
    for workload in result.workloads:
        parts.append(f"## {workload}, {result.rounds_of(workload)} rounds")
        if (failure := result.failure(workload)) is not None:
            when = f"round {failure['round']}" if failure["round"] else "the warm-up"
            parts.append(f"Not enough memory for {what_failed(failure)} in {when}.")
        if lines := [_line(entry) for entry in result.entries if vars(workload).items() <= entry.items()]:
            parts += [pipe_table(COLUMNS, lines), *_sublayer_lines(result, workload), *engine_lines(result, workload)]
    return "\n\n".join(parts) + "\n"


def _about(result: Result) -> list[str]:
    identity = result.identity
    subject, versions = identity["subject"], identity["versions"]
    clock = {
        "wall": "wall clock",
        "process": "the process's own clock",
        "turns": f"CPU time of each cell's thread, up to {REFERENCE_EVERY + 2} cells in turns of a layer or a step",
    }[identity["clock"]]
    selections = "; ".join(f"{phase}, {what}" for phase, what in subject["selections"].items())
    chosen = f"Calibrated's: {selections}. " if selections else ""
    ceilings = result.manifest.get("ceilings")
    return [
        f"{identity['model']}, {subject['parameters'] / 1e6:,.0f}M parameters, {subject['dtype']}, attention by "
        f"{subject['attn_implementation']}, on {result.device} ({identity['device_name']}, {identity['threads']} "
        f"threads, {clock if result.device == 'cpu' else 'CUDA events'}), torch {versions['torch']}, transformers "
        f"{versions['transformers']}.",
        f"AdaSkip's sets: {subject['profile']}. {chosen}SkipDecode's schedule spans the new tokens.",
        *([KEPT] if result.keep_kv else []),
        METHOD,
        *([IN_TURNS] if identity["clock"] == TURNS else []),
        *([FREED] if identity.get("freed_memory") else []),
        *(
            [
                f"Ceilings, measured: {ceilings['matmul_flops'] / 1e12:.3g} TFLOP/s of matrix multiplication, "
                f"{ceilings['bandwidth_bytes_per_s'] / 1e9:.3g} GB/s of copying."
            ]
            if ceilings
            else []
        ),
        *([TOY] if result.weights == "testbed" else []),
    ]


def _line(entry: Record) -> list[str]:
    speedups = []
    for phase in NAMES:
        low, high = entry[f"speedup_{phase}_interval"]
        between = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        realised = entry[f"realised_{phase}"]
        speedups += [f"{entry[f'speedup_{phase}']:.3f}{between}", MISSING if realised is None else f"{realised:.2f}"]
    limits = [(entry[name], entry[f"limit_{name}"]) for name in NAMES.values()]
    peak = entry["peak_memory_bytes"]
    return [
        *(_label(entry["strategy"]), entry["phase"] or MISSING, str(entry["budget"]), entry["mode"]),
        *(f"{1000 * entry[name]:.4g}" for name in NAMES.values()),
        *(f"{entry['prefill_tokens_per_s']:.5g}", f"{entry['decode_tokens_per_s']:.4g}"),
        *speedups,
        *(f"{measured / limit:.3g}" if limit else MISSING for measured, limit in limits),
        f"{entry['kv_bytes'] / 1e6:.4g}",
        MISSING if peak is None else f"{peak / 1e6:,.0f}",
    ]


def _label(strategy: str) -> str:
    return STRATEGIES.get(strategy, strategy.replace("_", " "))


def _sublayer_lines(result: Result, workload: Workload) -> list[str]:
    """Mean time of an attention and an FFN sublayer of the full model."""
    timed, lines = result.of(workload, Cell(BREAKDOWN)), []
    for phase in NAMES if timed else ():
        means = []
        for kind in ("attention", "ffn"):
            rounds = [record[f"{phase}_sublayers_s"][kind] for record in timed]
            means.append(sum(1000 * t for times in rounds for t in times) / sum(map(len, rounds)))
        lines.append(f"{phase}: attention {means[0]:.4g} ms, FFN {means[1]:.4g} ms")
    return [f"A sublayer of the full model takes on average, in {'; in '.join(lines)}."] if lines else []


def draw(result: Result) -> list[Path]:
    """Draw the speedup of prefill and decode against prompt length or, if there is only one, against the budget.

    Markers with intervals are measured, faint lines ideal. One figure per mode, phase and batch size with at least two
    lengths or budgets.
    """
    written = []
    kinds = dict.fromkeys((e["mode"], e["phase"], e["batch_size"]) for e in result.entries if e["strategy"] != FULL)
    for mode, phase, rows in kinds:
        entries = [e for e in result.entries if (e["mode"], e["phase"], e["batch_size"]) == (mode, phase, rows)]
        if len({(e["prompt_tokens"], e["budget"]) for e in entries if e["strategy"] != FULL}) < 2:
            continue
        parts = [result.name, "" if phase == "e2e" else phase, "" if mode == EAGER else mode]
        stem = "_".join(filter(None, [*parts, f"batch{rows}" if rows > 1 else ""]))
        with styled():
            written += save(_figure(entries, f"{result.name}: {phase}, {mode}"), result.path.parent / "plots" / stem)
    return written


def _figure(entries: Sequence[Record], title: str) -> Figure:
    lengths = sorted({entry["prompt_tokens"] for entry in entries})
    by_length = len(lengths) > 1
    columns = sorted({entry["budget"] for entry in entries}) if by_length else [None]
    figure = Figure(figsize=(3.2 * len(columns) + 1.2, 4.8), layout="constrained")
    axes = figure.subplots(2, len(columns), squeeze=False, sharex=True, sharey="row")
    for row, phase in zip(axes, NAMES, strict=True):
        for panel, budget in zip(row, columns, strict=True):
            chosen = [entry for entry in entries if budget is None or entry["budget"] == budget]
            _draw(panel, chosen, phase, "prompt_tokens" if by_length else "budget")
            panel.set_ylabel(f"{phase} speedup" if panel is row[0] else "")
            if budget is not None and phase == "prefill":
                panel.set_title(f"{budget} sublayers skipped")
    if by_length:
        axes[0, 0].set_xscale("log", base=2)
        axes[0, 0].set_xticks(lengths, [str(length) for length in lengths])
    else:
        axes[0, 0].set_xticks(sorted({entry["budget"] for entry in entries if entry["budget"]}))
    for panel in axes[-1]:
        panel.set_xlabel("prompt tokens" if by_length else "skipped sublayers")
    figure.suptitle(title, fontsize=9)
    handles = dict(zip(*axes[0, 0].get_legend_handles_labels()[::-1], strict=True))
    shown = sorted(handles, key=lambda label: label == IDEAL)
    columns_shown = min(3 * len(columns), len(shown))
    figure.legend(
        [handles[label] for label in shown], shown, loc="outside lower center", ncols=columns_shown, fontsize=7
    )
    return figure


def _draw(panel: Axes, entries: Sequence[Record], phase: str, x: str) -> None:
    panel.axhline(1.0, color="black", linewidth=0.8)
    panel.grid(axis="y")
    for strategy in dict.fromkeys(entry["strategy"] for entry in entries):
        look, label, reach = LOOKS.get(strategy, OTHER), _label(strategy), None
        points = sorted((e for e in entries if e["strategy"] == strategy), key=lambda e: e[x])
        at, measured = [e[x] for e in points], [e[f"speedup_{phase}"] for e in points]
        bounds = [e[f"speedup_{phase}_interval"] for e in points]
        if not any(edge is None for both in bounds for edge in both):
            pairs = list(zip(measured, bounds, strict=True))
            reach = [[m - low for m, (low, _) in pairs], [high - m for m, (_, high) in pairs]]
        panel.errorbar(at, measured, yerr=reach, **look.line, elinewidth=0.8, capsize=1.5, label=label)
        if all(e[f"ideal_{NAMES[phase]}"] for e in points):
            full = [e[NAMES[phase]] * e[f"speedup_{phase}"] for e in points]
            ideal = [f / e[f"ideal_{NAMES[phase]}"] for f, e in zip(full, points, strict=True)]
            panel.plot(at, ideal, **look.faint, label=IDEAL)
