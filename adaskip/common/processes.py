"""The processes of one `accelerate launch`: each computes a share of a run, and all succeed or fail together.

    accelerate launch --multi_gpu --num_processes 2 -m adaskip run ...
    accelerate launch --multi_gpu --num_processes 2 prefill/run_llama_ADA.py ...

`--multi_gpu` starts one process per GPU, and without GPUs the same number on the CPU (with `--cpu`, accelerate starts
a single one unless it has MPI). Processes on several machines need an output directory on a shared file system. They
exchange only short messages, so they use the gloo backend even with GPUs. If a process is killed, the launcher ends the
others at once; if a process hangs, the others give up after `PATIENCE`. Without a launch there is one process, and
nothing in this module waits.
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
"""How long a process waits for the others: the main one may be calibrating, another may have longer prompts."""
FAREWELL = timedelta(seconds=10)
"""How long a failed process waits for the others to report their errors."""

T = TypeVar("T")


class ProcessError(OSError):
    """Another process of the launch failed or died."""


class Processes:
    """All processes of the launch, seen from this one. Instances share their state, so create one anywhere."""

    def __init__(self) -> None:
        has_cuda = torch.cuda.is_available()
        backend = {"backend": "gloo"} if has_cuda and "LOCAL_RANK" in os.environ else {}
        try:
            self._state = PartialState(cpu=not has_cuda, timeout=PATIENCE, **backend)
        except (RuntimeError, ValueError) as error:
            raise ProcessError(f"the processes of this launch could not connect: {one_line(error)}") from error
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
        """Whether this is the process that locks the folder, calibrates, merges and prints."""
        return self._state.is_main_process

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's consecutive part of `items`; parts differ in length by at most one."""
        with self._state.split_between_processes(list(items)) as mine:
            return cast(list[T], mine)

    def gather(self, value: T) -> list[T]:
        """The `value` of every process, by rank.

        Raises:
            ProcessError: a process died.
        """
        with _all_there():
            return gather_object([value])

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context that all processes leave together, and that fails in all of them if it fails in one.

        Raises:
            ValueError: the block raised a ValueError in another process.
            ProcessError: the block failed otherwise in another process.
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
        """Call `make` in the main process and return its result in all processes."""
        with self.together():
            made = make() if self.is_main else None
        if self.size > 1:
            with _all_there():
                (made,) = broadcast_object_list([made])
        return cast(T, made)

    def require_one(self, what: str) -> None:
        """Raise ValueError if several processes were launched for work that cannot be split."""
        if self.size > 1:
            raise ValueError(
                f"{what} runs in one process, not in {self.size}; "
                "accelerate launch can split only `adaskip run` and the run scripts"
            )


@cache
def _check_launch() -> None:
    """Warn once if accelerate launch was asked for several processes but started only one."""
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        logger.warning(
            "warning: accelerate launch was asked for several processes but started one; "
            "with --multi_gpu it starts all of them, also on CPUs"
        )


def leave_together() -> None:
    """Wait a moment for the other processes to report their errors: the launcher kills them when the first one ends."""
    if torch.distributed.is_initialized():
        try:
            torch.distributed.monitored_barrier(timeout=FAREWELL)
        except RuntimeError as error:
            logger.debug("some processes did not reach the end: %s", error)


@contextmanager
def _all_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"a process of this launch died ({one_line(error)}); finished samples are kept, run the same command again "
            "to continue"
        ) from error


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its class name if the message is empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__
