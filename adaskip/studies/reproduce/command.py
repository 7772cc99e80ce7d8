"""`eval/reproduce.py`, which `make reproduce` runs: grid, tables, plots and observations of the testbed's three models.

It uses the committed profiles and selections and fewer samples than the committed results, and writes into a separate
folder. A stopped run continues.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from adaskip.common.commands import STOPPED, study
from adaskip.common.paths import default_path
from adaskip.runs.cells import MODELS
from adaskip.runs.checks import check
from adaskip.runs.grid import Queued, run_cells
from adaskip.runs.job import resolve
from adaskip.studies.observations.command import OBSERVATIONS, all_targets
from adaskip.studies.observations.importance_check import measure_check
from adaskip.studies.observations.measuring import measure_targets
from adaskip.studies.reproduce.committed import keep_profiles, profile_of, read_profiles
from adaskip.studies.reproduce.progress import Whole
from adaskip.studies.reproduce.settings import CHECK_S, DRAW_S, SAMPLE_S, TARGET_S, ReproduceConfig
from adaskip.studies.side_by_side import Work, side_by_side
from adaskip.studies.tables.command import SPEEDS
from adaskip.studies.tables.report import headline_of, write_plots, write_tables, write_tradeoffs
from adaskip.studies.tables.results import load_results
from adaskip.studies.tables.tradeoff import find_tradeoffs


def main(doc: str | None) -> int:
    """Run the script; returns the exit code. doc: its docstring."""
    return study(doc, ReproduceConfig, _run)


def _run(config: ReproduceConfig) -> int:
    cells, measurements = config.cells(), observations(config)
    jobs = [resolve(cell) for cell in cells]
    total_s = sum(job.num_samples * SAMPLE_S[job.phase] for job in jobs)
    total_s += sum(seconds for _, seconds in measurements) + DRAW_S
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
    queue = []
    for cell in cells:
        cell = replace(cell, profile=profile_of(cell, config.out_dir / "profiles"))
        job = resolve(cell)
        check(job)
        queue.append(Queued(job.cell.label, cell))
    with Whole(total_s) as whole:
        whole.stage("grid")
        ended = run_cells(queue, min(config.num_jobs, len(queue)), whole, lambda cell: SAMPLE_S[cell.phase])
        whole.stage("observations")
        work, seconds = zip(*measurements, strict=True)
        side_by_side(work, config.num_jobs, lambda place: whole.update(seconds[place]))
        whole.stage("tables and plots")
        lines = _draw(config)
        whole.update(DRAW_S)
    print(*lines, sep="\n")
    return STOPPED if ended.failed else 0


def observations(config: ReproduceConfig) -> list[tuple[Work, float]]:
    """The measurements of the observations by model, each with its estimated duration in seconds."""
    work: list[tuple[Work, float]] = []
    for model in MODELS:
        observe, checked = config.observe(model), config.observe(model, check=True)
        for target in all_targets(observe):
            seconds = observe.num_samples * TARGET_S[target.phase]
            work.append(((measure_targets, (observe, [target])), seconds))
        work.append(((measure_check, (checked,)), checked.num_samples * CHECK_S))
    return work


def _draw(config: ReproduceConfig) -> list[str]:
    """Make tables and plots of the saved runs; returns lines with the main results and the folders."""
    out = config.out_dir
    results = load_results(out / "runs", jobs=config.num_jobs)
    written = [*write_tables(results, out / "tables"), *write_plots(results, out / "plots")]
    written += write_tradeoffs(find_tradeoffs(results, [str(default_path(SPEEDS))]), out)
    for observation in OBSERVATIONS.values():
        written += observation.write(config.observe())[1]
    counts = Counter(path.parent for path in written)
    where = [f"{folder.name}: {folder} ({count} files)" for folder, count in sorted(counts.items())]
    return [*headline_of(results), *where, f"the committed results, on more samples: {default_path('results/testbed')}"]
