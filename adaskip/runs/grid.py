"""Runs many cells in parallel worker processes, each with one CPU thread; a worker keeps its model loaded.

If a cell fails, it is reported and the others continue. If a worker dies (killed, out of memory), its cell fails and
the worker is replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Protocol

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from adaskip.common.errors import RunError
from adaskip.runs.checks import check
from adaskip.runs.config import GridConfig, RunConfig
from adaskip.runs.job import find_cells, resolve
from adaskip.runs.runner import Progress, run
from adaskip.strategies import needs_selection


@dataclass(frozen=True)
class Queued:
    """The configuration of a cell and its label."""

    label: str
    config: RunConfig


@dataclass(frozen=True)
class Done:
    """Message of a worker: its cell is complete."""


@dataclass(frozen=True)
class Failed:
    """Message of a worker: its cell failed; `line` is the reason."""

    line: str


GRACE_S = 30.0
"""How long a worker may take to end before it is killed."""
Message = Progress | Done | Failed


class Bar(Protocol):
    """A progress bar. disable: it is not drawn, so finished cells are printed line by line."""

    disable: bool

    def update(self, n: float, /) -> object: ...


@dataclass(frozen=True)
class GridOutcome:
    """Labels of the complete and of the failed cells, and the number of samples that this call made."""

    complete: tuple[str, ...]
    failed: tuple[str, ...]
    made: int


def run_grid(config: GridConfig) -> GridOutcome:
    """Run every cell to its end; finished cells are only checked.

    Raises:
        ValueError: a check that needs no model failed for a cell; then no cell is started.
    """
    cells = searches_first(find_cells(config))
    jobs = min(config.jobs or default_jobs(config), len(cells))
    if jobs > 1 and config.threads is None:
        cells = [replace(cell, threads=1) for cell in cells]
    queue, total = [], 0
    for cell in cells:
        job = resolve(cell)
        check(job)
        queue.append(Queued(job.cell.label, cell))
        total += job.num_samples
    with tqdm(total=total, unit="sample", desc="grid", smoothing=0.05, disable=None) as bar:
        return run_cells(queue, jobs, bar)


def run_cells(
    cells: Sequence[Queued], jobs: int, bar: Bar, weight: Callable[[RunConfig], float] = lambda cell: 1
) -> GridOutcome:
    """Run cells in `jobs` processes. bar: updated for every sample. weight: progress per sample of a cell."""
    return Pool(jobs, bar, weight).run(cells)


def searches_first(cells: Sequence[RunConfig]) -> list[RunConfig]:
    """The cells ordered by model, with one cell per needed search first, so that workers do not wait for the same
    search."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    searches: dict[tuple[str, str, str], RunConfig] = {}
    for cell in cells:
        if needs_selection(cell.strategy):
            searches.setdefault((cell.model, cell.phase, cell.strategy), cell)
    return sorted(cells, key=lambda cell: (models.index(cell.model), cell not in searches.values()))


def default_jobs(config: GridConfig) -> int:
    """One job per CPU core for the small models that a benchmark brings, on a CPU; else one."""
    on_cpu = config.device == "cpu" or (config.device is None and not torch.cuda.is_available())
    return (os.cpu_count() or 1) if config.find_benchmark().models and on_cpu and config.device_map is None else 1


class Worker:
    """One process that runs the cells sent to it, one at a time."""

    def __init__(self) -> None:
        self.cell: Queued | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        ours = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited, so that only the parent handles Ctrl-C
        self.process.start()
        signal.signal(signal.SIGINT, ours)
        theirs.close()

    def assign(self, cell: Queued) -> None:
        self.cell = cell
        self.connection.send(cell.config)

    def receive(self) -> Message | None:
        """The next message; None if the process died."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None

    def restart(self) -> None:
        self.end()
        self.wait_for_end()
        self._start()

    def end(self) -> None:
        """Terminate the process, even in the middle of a cell: a run can be stopped at any point."""
        self.process.terminate()

    def wait_for_end(self) -> None:
        """Wait for the process to end; kill it if that takes too long."""
        self.process.join(GRACE_S)
        self.process.kill()
        self.process.join()
        self.connection.close()


class Pool:
    """A queue of cells and the workers that run them."""

    def __init__(self, jobs: int, bar: Bar, weight: Callable[[RunConfig], float]):
        self.jobs, self.bar, self.weight = jobs, bar, weight
        self.workers: list[Worker] = []
        self.complete: list[str] = []
        self.failed: list[str] = []
        self.made = 0

    def run(self, cells: Sequence[Queued]) -> GridOutcome:
        queue = deque(cells)
        try:
            for _ in range(self.jobs):
                self.workers.append(Worker())
                self.workers[-1].assign(queue.popleft())
            while busy := [worker for worker in self.workers if worker.cell is not None]:
                ready = wait([worker.connection for worker in busy])
                for worker in busy:
                    if worker.connection in ready:
                        self._handle(worker, worker.receive(), queue)
        finally:
            for worker in self.workers:
                worker.end()
            for worker in self.workers:
                worker.wait_for_end()
        return GridOutcome(tuple(self.complete), tuple(self.failed), self.made)

    def _handle(self, worker: Worker, message: Message | None, queue: deque[Queued]) -> None:
        assert worker.cell is not None, "only a worker with a cell sends messages"
        if isinstance(message, Progress):
            self.made += message.made
            self.bar.update((message.found + message.made) * self.weight(worker.cell.config))
            return
        label = worker.cell.label
        if isinstance(message, Done):
            self.complete.append(label)
            self._tell(f"{label} complete", quiet=not self.bar.disable)
        else:
            self.failed.append(label)
            self._tell(f"{label} failed: {message.line if message else 'its process died (killed, or out of memory)'}")
        if message is None:
            worker.restart()
        worker.cell = None
        if queue:
            worker.assign(queue.popleft())

    def _tell(self, line: str, quiet: bool = False) -> None:
        """Print a line above the bar, unless `quiet`."""
        if not quiet:
            number = len(self.complete) + len(self.failed)
            tqdm.write(f"[{number}] {line}", file=sys.stderr)


def serve(connection: Connection) -> None:
    """Main loop of a worker: run every cell that arrives and report; end when the parent ends."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())  # unlike the default, this runs cleanup code
    disable_progress_bar()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        config: RunConfig = connection.recv()
        try:
            run(config, watch=connection.send)
        except (ValueError, RunError, OSError) as error:
            connection.send(Failed(" ".join(str(error).split())))
        else:
            connection.send(Done())


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "serve() runs in a child process"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)
