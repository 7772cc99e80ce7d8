"""`adaskip bench` and `adaskip bench-report`: measure what is missing, and draw what is saved."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from transformers.utils import logging as transformers_logging

from adaskip.common.optional import optional_import
from adaskip.common.options import option
from adaskip.common.paths import given_or_default
from adaskip.studies.bench.measuring import run_bench
from adaskip.studies.bench.settings import RESULTS_DIR, BenchConfig

INCOMPLETE = 1


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Where the results are."""

    results_dir: str | None = option(f"folder of the results; if not given, {RESULTS_DIR}")


def bench(config: BenchConfig) -> int:
    """Run a benchmark; returns the exit code."""
    with optional_import():
        from adaskip.studies.bench.report import result_markdown
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("adaskip.studies.bench").setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()  # random weights have no generation config to be warned of
    outcome = run_bench(config)
    table = [result_markdown(outcome.result)] if outcome.result.entries else []
    state = "complete" if outcome.complete else "incomplete"
    print(*table, *outcome.notes, f"{state}: {outcome.result.path}", sep="\n")
    return 0 if outcome.complete else INCOMPLETE


def bench_report(config: ReportConfig) -> int:
    """Draw again what is saved."""
    with optional_import():
        from adaskip.studies.bench.report import write_bench_report
    written = write_bench_report(given_or_default(config.results_dir, RESULTS_DIR))
    print(f"wrote {len(written)} files, first {written[0]}")
    return 0
