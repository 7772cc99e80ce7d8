"""The processes of one `accelerate launch`: each makes its share of a run, and all of them succeed or fail together.

    accelerate launch --multi_gpu --num_processes 2 -m adaskip run ...
    accelerate launch --multi_gpu --num_processes 2 prefill/run_llama_ADA.py ...

`--multi_gpu` starts one process per GPU, and without GPUs the same number on the CPU (with `--cpu`, accelerate starts
a single one unless it has MPI). Processes on several machines need an output directory on a file system they share.
Only short messages pass between them, so they meet through gloo on a GPU, too. Of a process that is killed the launcher
ends the others at once; one that falls silent is given up after `PATIENCE`. Without a launch there is one process, and
nothing here waits for anybody.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

logger = logging.getLogger(__name__)

PATIENCE = timedelta(hours=12)
"""How long a process waits for the others: the main one may be calibrating, another may have the longer prompts."""
FAREWELL = timedelta(seconds=10)

T = TypeVar("T")


class ProcessError(OSError):
    """Another process of the launch failed or is gone."""


class Processes:
    """All processes of the launch, seen from this one; made anew anywhere, it is the same."""

    def __init__(self) -> None:
        has_cuda = torch.cuda.is_available()
        backend = {"backend": "gloo"} if has_cuda and "LOCAL_RANK" in os.environ else {}
        try:
            self._state = PartialState(cpu=not has_cuda, timeout=PATIENCE, **backend)
        except (RuntimeError, ValueError) as error:
            raise ProcessError(f"the processes of this launch could not meet: {one_line(error)}") from error
        if self.size == 1:
            _check_launch()

    @property
    def size(self) -> int:
        return self._state.num_processes

    @property
    def rank(self) -> int:
        return self._state.process_index

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that holds the folder, calibrates, merges and speaks to the user."""
        return self._state.is_main_process

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's consecutive part of `items`; the parts differ by one item at most."""
        with self._state.split_between_processes(list(items)) as mine:
            return cast(list[T], mine)

    def gather(self, value: T) -> list[T]:
        """Every process's `value`, by rank.

        Raises:
            ProcessError: a process is gone.
        """
        with _all_there():
            return gather_object([value])

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes leave at the same time, and that fails in every one if it fails in any.

        Raises:
            ValueError, ProcessError: the block failed in another process, for its user's mistake or for another reason.
        """
        if self.size == 1:
            yield
            return
        failure = None
        try:
            yield
        except (ValueError, RuntimeError, OSError) as error:
            failure = error
        failures = self.gather(None if failure is None else (isinstance(failure, ValueError), one_line(failure)))
        if failure is not None:
            raise failure
        for rank, told in enumerate(failures):
            if told is not None:
                is_mistake, line = told
                raise (ValueError if is_mistake else ProcessError)(f"process {rank} of {self.size}: {line}")

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns in the main process; the others wait for it."""
        with self.together():
            made = make() if self.is_main else None
        if self.size > 1:
            with _all_there():
                (made,) = broadcast_object_list([made])
        return cast(T, made)

    def require_one(self, what: str) -> None:
        """Refuse a launch of something whose work is not split."""
        if self.size > 1:
            raise ValueError(
                f"{what} runs in one process, not in {self.size}: "
                "accelerate launch splits `adaskip run` and the run scripts"
            )


@cache
def _check_launch() -> None:
    """Warn, once, of a launch that was asked for more processes than this one."""
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        logger.warning(
            "warning: accelerate launch was asked for several processes and started one; "
            "with --multi_gpu it starts all, on CPUs, too"
        )


def leave_together() -> None:
    """Wait a moment for all who failed: when the first one ends, the launcher ends the others, even unheard."""
    if torch.distributed.is_initialized():
        try:
            torch.distributed.monitored_barrier(timeout=FAREWELL)
        except RuntimeError as error:
            logger.debug("not every process came: %s", error)


@contextmanager
def _all_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        line = f"a process of this launch is gone ({one_line(error)}); what is made is kept, the same command continues"
        raise ProcessError(line) from error


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its name if it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__
