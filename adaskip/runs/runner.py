"""Runs one cell: generates an answer for every sample of its tasks, and continues a run that was stopped.

The folder is the only state. A batch is `batch_size` consecutive samples in the order of the data. So a run that was
killed and continued, or split over processes, has the same batches and the same predictions as one that was not. With
several processes (`adaskip.common.processes`), the main one locks the folder, calibrates and merges.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adaskip.benchmarks.protocol import Task
from adaskip.calibration.compensation import FittedCompensation
from adaskip.common.errors import RunError
from adaskip.common.processes import Processes, one_line
from adaskip.core.generate import Generation, generate
from adaskip.models.loading import LoadedModel
from adaskip.runs.cells import Cell, run_name
from adaskip.runs.checks import build_strategies, check
from adaskip.runs.config import RunConfig
from adaskip.runs.folder import check_alike
from adaskip.runs.job import Job, Part, Profile, resolve
from adaskip.runs.loading import prepare_torch
from adaskip.runs.manifest import comparable, describe_job, describe_run, is_done, without_growth
from adaskip.runs.profiles import find_compensation, profile_for
from adaskip.runs.records import Sample, reference_ids
from adaskip.runs.speedup import Target, attain, find_target
from adaskip.strategies import Strategy
from adaskip.strategies.recompensated import Recompensated

Record = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """A step of a run: samples already done before, samples made now, and samples left to other processes."""

    found: int = 0
    made: int = 0
    elsewhere: int = 0


@dataclass(frozen=True)
class Outcome:
    """A finished cell: how many of its samples were done before, and how many this call made.

    target: the target speedup and its result; None if the budget was given.
    """

    cell: Cell
    folder: Path
    found: int
    made: int
    target: Target | None = None


def run(
    config: RunConfig, *, show_progress: bool = False, watch: Callable[[Progress], object] | None = None
) -> Outcome:
    """Run or continue a cell until it is complete. If it is already finished, the model is not loaded.

    Args:
        show_progress: draw a progress bar if standard error is a terminal.
        watch: called after each step of this process.

    Raises:
        ValueError: the configuration is invalid, or its folder contains another run or is in use.
        RunError: generating or writing failed half-way.
        ProcessError: another process of the launch failed.
    """
    processes = Processes()
    with processes.together():
        _prepare(config, processes)
        job = resolve(config)
        check(job)
    target = None
    if job.speedup is not None:
        target = processes.from_main(partial(_find_target, job))
        job = job.with_sublayers(target.sublayers)
    show = show_progress and processes.is_main
    found = made = 0
    with (
        ExitStack() as held,
        tqdm(total=job.num_samples, desc=job.cell.label, unit="sample", disable=None if show else True) as bar,
    ):
        processes.from_main(lambda: held.enter_context(job.folder.lock()))
        for number, step in enumerate(execute(job, processes)):
            if target is not None and number == 0:  # the folder is this run's now
                processes.from_main(partial(target.save, job.folder.path))
            found, made = found + step.found, made + step.made
            bar.total -= step.elsewhere
            bar.update(step.found + step.made)
            if watch is not None:
                watch(step)
        if target is not None and target.attained is None:
            target = processes.from_main(partial(_attain, job, target))
    return Outcome(job.cell, job.folder.path, found, sum(processes.gather(made)), target)


def _prepare(config: RunConfig, processes: Processes) -> None:
    if processes.size > 1 and config.device_map is not None:
        raise ValueError(
            f"--device-map {config.device_map} spreads one model over all devices, but {processes.size} processes "
            "would each load a model: leave it out, or run in one process"
        )
    if not processes.is_main:
        logging.getLogger("adaskip").setLevel(logging.ERROR)  # only the main process logs warnings
    prepare_torch(config)


def _find_target(job: Job) -> Target:
    where = f"{run_name(job.loading.source.name, job.phase, job.strategy)} stopped before it chose its budget"
    with failure_as_run_error(where, "nothing was written"):
        return find_target(job)


def _attain(job: Job, target: Target) -> Target:
    failed = f"the run in {job.folder.path} is finished, but its speedup could not be measured"
    with failure_as_run_error(failed, "run the same command again to retry"):
        attained = attain(job, target)
        attained.save(job.folder.path)
    return attained


def execute(job: Job, processes: Processes) -> Iterator[Progress]:
    """Run this process's share of the remaining samples of a job, step by step; the folder must be locked."""
    if processes.from_main(lambda: _is_complete(job)):
        yield Progress(found=job.num_samples)
        return
    with processes.together(), _before_the_first_sample(job):
        loaded = job.loading.load()
    profile, profile_path = processes.from_main(lambda: _find_profile(job, loaded))
    compensate = processes.from_main(lambda: _find_compensation(job, loaded))
    with processes.together():
        strategies = [_compensated(strategy, compensate) for strategy in build_strategies(job, profile)]
        manifest = {**describe_run(job, loaded, profile, profile_path), "processes": processes.size}
    manifests = processes.gather(manifest)
    missing = processes.from_main(lambda: _begin(job, manifests))
    mine = [processes.share(starts) for starts in missing]
    left = _count(job, missing)
    yield Progress(found=job.num_samples - left, elsewhere=left - _count(job, mine))
    with processes.together():
        for part, strategy, starts in zip(job.parts, strategies, mine, strict=True):
            for start in starts:
                yield Progress(made=_run_batch(job, part, start, loaded, strategy, processes.rank))
    processes.from_main(lambda: _end(job))


def _is_complete(job: Job) -> bool:
    """Whether nothing is left to do; raises FolderError if the folder contains another run.

    A finished run with missing or truncated records is not complete.
    """
    held = job.folder.read_manifest()
    wanted = without_growth({**describe_job(job), **job.loading.source.model_files}, job, held)
    job.folder.check(comparable(wanted, held))
    return is_done(job) and not _count(job, _merge(job))


def _find_profile(job: Job, loaded: LoadedModel) -> tuple[Profile, Path] | tuple[None, None]:
    if job.calibration is None:
        return None, None
    with _before_the_first_sample(job):
        return profile_for(job, loaded)


def _find_compensation(job: Job, loaded: LoadedModel) -> FittedCompensation | None:
    with _before_the_first_sample(job):
        return find_compensation(job, loaded)


def _compensated(strategy: Strategy | None, compensate: FittedCompensation | None) -> Strategy | None:
    return strategy if strategy is None or compensate is None else Recompensated.of(strategy, compensate)


def _begin(job: Job, manifests: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Write the manifest and return the missing batches of each part."""
    check_alike(manifests)
    held = job.folder.read_manifest()
    manifest = comparable(manifests[0], held)
    same = without_growth(manifest, job, held)
    job.folder.start(same, {name: manifest[name] for name in manifest.keys() - same.keys()} or None)
    return _merge(job)


def _end(job: Job) -> None:
    if missing := _count(job, _merge(job)):
        raise RunError(
            f"{missing} samples of {job.cell.label} were made but are not in {job.folder.path}: it must be on a file "
            "system that all machines of the launch share; run the same command again to continue"
        )
    job.folder.finish()


def _merge(job: Job) -> list[list[int]]:
    return [job.folder.merge(part.name, part.ids, job.batch_size) for part in job.parts]


def _count(job: Job, missing: Sequence[Sequence[int]]) -> int:
    """Number of samples in the batches that begin at the indices `missing` of each part."""
    return sum(
        len(part.samples[start : start + job.batch_size])
        for part, starts in zip(job.parts, missing, strict=True)
        for start in starts
    )


@contextmanager
def failure_as_run_error(where: str, then: str) -> Iterator[None]:
    """Turn a failure of the machine (out of memory, other RuntimeErrors of torch, I/O errors) into a RunError."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        raise RunError(f"{where}: {one_line(error)}; {then}") from error


def _before_the_first_sample(job: Job) -> AbstractContextManager[None]:
    return failure_as_run_error(f"{job.cell.label} stopped before its first sample", "nothing was written")


def _run_batch(job: Job, part: Part, start: int, loaded: LoadedModel, strategy: Strategy | None, rank: int) -> int:
    """Make and save the records of one batch; returns their number."""
    batch = part.samples[start : start + job.batch_size]
    with failure_as_run_error(
        f"{job.cell.label} stopped at {part.name}, samples {start} to {start + len(batch) - 1}",
        "earlier samples are kept; run the same command again to continue",
    ):
        records = make_records(part, batch, start, loaded, strategy)
        job.folder.append(part.name, records, rank)
    return len(records)


def make_records(
    part: Part, batch: Sequence[Sample], start: int, loaded: LoadedModel, strategy: Strategy | None
) -> list[Record]:
    """Generate answers for a batch of samples; `start` is the index of the first one in its task."""
    prompts = part.prompt_ids(batch, loaded)
    references = reference_ids(part.benchmark, part.name, batch, prompts, part.max_new_tokens, loaded)
    generations = generate(
        loaded.model,
        strategy,
        prompts,
        max_new_tokens=part.max_new_tokens,
        eos_token_ids=stop_token_ids(part.task, loaded),
        pad_token_id=loaded.pad_token_id,
        min_new_tokens=part.task.min_new_tokens,
        references=references,
    )
    return [
        {
            **_record(part, start + offset, sample, len(prompt), generation, loaded),
            "reference_loss": generation.reference_loss,
            "reference_tokens": 0 if reference is None else len(reference),
        }
        for offset, (sample, prompt, reference, generation) in enumerate(
            zip(batch, prompts, references, generations, strict=True)
        )
    ]


def _record(
    part: Part, index: int, sample: Sample, prompt_tokens: int, generation: Generation, loaded: LoadedModel
) -> Record:
    return {
        "id": sample["_id"],
        "task": part.name,
        "index": index,
        "prediction": decode(generation.token_ids, loaded),
        "references": sample["answers"],
        **part.benchmark.kept_of(sample),
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(generation.token_ids),
        "ttft_s": generation.ttft_s,
        "tpot_ms": generation.tpot_ms,
        "kv_bytes": generation.kv_bytes,
        "plan": generation.plan,
        "online_ffns": generation.online_ffns,
    }


def stop_token_ids(task: Task, loaded: LoadedModel) -> list[int]:
    """The tokens that end an answer: those of the model, and a newline if the task requires it."""
    stops = list(loaded.spec.stop_token_ids)
    if task.stop_at_newline:
        stops.append(loaded.tokenizer.encode("\n", add_special_tokens=False)[-1])
    return stops


def decode(token_ids: Sequence[int], loaded: LoadedModel) -> str:
    """The text of an answer, up to the first stop string of the model."""
    text = str(loaded.tokenizer.decode(list(token_ids), skip_special_tokens=True))
    for stop in loaded.spec.stop_strings:
        text = text.split(stop, 1)[0]
    return text
