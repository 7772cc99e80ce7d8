"""`eval/reproduce.py`, which `make reproduce` runs: grid, tables, plots and observations of the testbed's three models.

It uses the committed profiles and selections, takes fewer samples than the committed results, and writes into a folder
of its own. What was stopped continues.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from adaskip.common.commands import STOPPED, study
from adaskip.common.paths import default_path
from adaskip.runs.cells import MODELS
from adaskip.runs.checks import check
from adaskip.runs.grid import Queued, run_cells
from adaskip.runs.job import resolve
from adaskip.studies.observations.command import OBSERVATIONS
from adaskip.studies.observations.findings import write_findings
from adaskip.studies.observations.measuring import measure_targets
from adaskip.studies.observations.settings import ObserveConfig
from adaskip.studies.observations.skip_check import measure_check
from adaskip.studies.reproduce.committed import keep_profiles, profile_of, read_profiles
from adaskip.studies.reproduce.progress import Whole
from adaskip.studies.reproduce.settings import CHECK_S, DRAW_S, SAMPLE_S, TARGET_S, ReproduceConfig, targets
from adaskip.studies.tables.command import SPEEDS
from adaskip.studies.tables.report import headline_of, write_plots, write_tables, write_tradeoffs
from adaskip.studies.tables.results import load_results
from adaskip.studies.tables.tradeoff import find_tradeoffs


@dataclass(frozen=True)
class Measurement:
    """A piece of the observations: what is called, and the estimated seconds that it takes."""

    call: Callable[..., None]
    arguments: tuple
    seconds: float


def main(doc: str | None) -> int:
    """The script's whole life; returns its exit code. doc: the script's docstring."""
    return study(doc, ReproduceConfig, _run)


def _run(config: ReproduceConfig) -> int:
    cells, measurements = config.cells(), observations(config)
    jobs = [resolve(cell) for cell in cells]
    cells_s = sum(job.num_samples * SAMPLE_S[job.phase] for job in jobs)
    total_s = cells_s + sum(each.seconds for each in measurements) + DRAW_S
    print(
        f"{len(cells)} cells and {len(measurements)} measurements on {len(MODELS)} models into {config.out_dir}: about "
        f"{total_s / 60 / config.num_jobs:.0f} minutes on {config.num_jobs} quiet cores; the same command continues"
    )
    if config.dry_run:
        for job in jobs:
            print(f"{job.cell.label:34} {job.num_samples:4} samples")
        return 0
    profiles = read_profiles()
    keep_profiles(profiles, config.out_dir / "profiles")
    keep_profiles(profiles, config.out_dir / "observations/profiles")
    cells = [replace(cell, profile=profile_of(cell, config.out_dir / "profiles")) for cell in cells]
    jobs = [resolve(cell) for cell in cells]
    for job in jobs:
        check(job)
    queue = [Queued(job.cell.label, cell) for job, cell in zip(jobs, cells, strict=True)]
    with Whole(total_s) as whole:
        failed = _run_cells(queue, config.num_jobs, whole)
        whole.stage("observations")
        _side_by_side(measurements, config.num_jobs, whole)
        whole.stage("tables and plots")
        lines = _draw(config)
        whole.update(DRAW_S)
    print(*lines, sep="\n")
    return STOPPED if failed else 0


def _run_cells(queue: Sequence[Queued], num_jobs: int, whole: Whole) -> tuple[str, ...]:
    """Bring every cell to its end; returns the labels of those that failed."""
    whole.stage("grid")
    return run_cells(queue, min(num_jobs, len(queue)), whole, lambda cell: SAMPLE_S[cell.phase]).failed


def observations(config: ReproduceConfig) -> list[Measurement]:
    """All that is measured for the observations, model by model."""
    work = []
    for model in MODELS:
        observe, checked = config.observe(model), config.observe(model, check=True)
        assert observe.limit is not None, "given by the settings"
        assert checked.limit is not None, "given by the settings"
        for target in targets():
            seconds = observe.limit * TARGET_S[target.phase]
            work.append(Measurement(measure_targets, (observe, [target]), seconds))
        work.append(Measurement(measure_check, (checked,), checked.limit * CHECK_S))
    return work


def _side_by_side(work: Sequence[Measurement], jobs: int, whole: Whole) -> None:
    """Call everything, in so many processes; the first failure ends it, what is saved stays."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        futures = {pool.submit(each.call, *each.arguments): each for each in work}
        try:
            for future in as_completed(futures):
                future.result()
                whole.update(futures[future].seconds)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class NoTerminal(io.TextIOWrapper):
    """Standard error on which nobody draws a bar; warnings come through."""

    def isatty(self) -> bool:
        return False


def _quiet() -> None:
    """In a process that measures: no bars but the whole's."""
    disable_progress_bar()
    sys.stderr = NoTerminal(sys.stderr.buffer, line_buffering=True)


def _draw(config: ReproduceConfig) -> list[str]:
    """Score, tabulate and draw what is saved. Returns what to tell: the answers, and where everything is."""
    out = config.out_dir
    results = load_results(out / "runs", jobs=config.num_jobs)
    written = [*write_tables(results, out / "tables"), *write_plots(results, out / "plots")]
    written += write_tradeoffs(find_tradeoffs(results, str(default_path(SPEEDS))), out)
    written += _draw_observations(config.drawn())
    folders = {folder.name: folder for path in written if (folder := path.parent)}
    where = [f"{name}: {folder} ({_count(written, folder)} files)" for name, folder in sorted(folders.items())]
    return [*headline_of(results), *where, f"the committed results, on more samples: {default_path('results/testbed')}"]


def _draw_observations(config: ObserveConfig) -> list[Path]:
    written = []
    for observe in OBSERVATIONS.values():
        found, drawn = observe(config)
        written += drawn + [path for findings in found for path in write_findings(findings, config.out_dir)]
    return written


def _count(paths: Sequence[Path], folder: Path) -> int:
    return sum(path.parent == folder for path in paths)
