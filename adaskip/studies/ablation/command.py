"""`eval/online_ablation.py`: measures what is missing, then judges, tabulates and draws what is saved."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from rich.console import Console
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from adaskip.common.commands import study
from adaskip.models.stories import NOT_AT_HAND, STORIES, stories_dir
from adaskip.studies.ablation import figure, saved
from adaskip.studies.ablation.cells import ensure_cell, read_subject
from adaskip.studies.ablation.findings import find, groups
from adaskip.studies.ablation.settings import AblationConfig
from adaskip.studies.ablation.stories import ensure_stories, read_stories
from adaskip.studies.observations.findings import write_findings


def main(doc: str | None) -> int:
    """The script's whole life; returns its exit code. doc: the script's docstring."""
    return study(doc, AblationConfig, _run)


def _run(config: AblationConfig) -> int:
    if not config.draw_only:
        measure(config)
    subjects = saved.load(config.out_dir)
    with_stories = any(subject.name == STORIES for subject in subjects)
    findings = find(subjects, None if with_stories else NOT_AT_HAND)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(findings.title, style="bold")
    for claim in findings.claims:
        console.print(f"- {claim.sentence}")
    written = [*write_findings(findings, config.out_dir), *figure.draw(groups(subjects), config.out_dir)]
    console.print("wrote " + ", ".join(path.name for path in written) + f" to {config.out_dir}")
    return 0


def measure(config: AblationConfig) -> None:
    """Bring every run to its end and keep what the verdict needs; what is finished is passed over.

    Raises:
        ValueError: a run cannot be, or its folder holds another or is in use.
        RunError: a run failed half-way; the same command continues.
    """
    with_stories = config.stories > 0 and stories_dir() is not None
    work: list[tuple[Callable[..., None], tuple]] = [
        (ensure_cell, (config, model, variant)) for model in config.models for variant in config.variants
    ]
    if with_stories:
        work += [(ensure_stories, (config, variant)) for variant in config.stories_variants]
    elif config.stories > 0:
        print(NOT_AT_HAND, file=sys.stderr)
    _side_by_side(work, min(config.num_jobs, len(work)))
    subjects = [read_subject(config, model) for model in config.models]
    saved.keep(config.out_dir, [*subjects, *([read_stories(config)] if with_stories else [])])


def _side_by_side(work: Sequence[tuple[Callable[..., None], tuple]], jobs: int) -> None:
    """Call everything, in so many processes; the first failure ends it, what is saved stays."""
    with tqdm(total=len(work), desc="online ablation", unit="run", disable=None) as bar:
        if jobs == 1:
            for call, arguments in work:
                call(*arguments)
                bar.update()
            return
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=disable_progress_bar) as pool:
            futures: list[Future[None]] = [pool.submit(call, *arguments) for call, arguments in work]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
