"""Calls functions in several processes."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from transformers.utils.logging import disable_progress_bar

Work = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of a module, and its arguments."""


def side_by_side(work: Sequence[Work], jobs: int, done: Callable[[int], object]) -> None:
    """Call everything in `jobs` processes, or in this one if `jobs` is 1; stops at the first failure.

    done: called with the index in `work` of each call that ended.
    """
    if jobs == 1:
        for i, (call, arguments) in enumerate(work):
            call(*arguments)
            done(i)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=draw_no_bars) as pool:
        futures = {pool.submit(call, *arguments): i for i, (call, arguments) in enumerate(work)}
        try:
            for future in as_completed(futures):
                future.result()
                done(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class NoTerminal(io.TextIOWrapper):
    """Standard error on which no progress bar is drawn; warnings are shown."""

    def isatty(self) -> bool:
        return False


def draw_no_bars() -> None:
    """Initialiser of a worker process: only the main process shows progress."""
    disable_progress_bar()
    sys.stderr = NoTerminal(sys.stderr.buffer, line_buffering=True)
