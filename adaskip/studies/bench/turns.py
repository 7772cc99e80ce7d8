"""Runs several generations at once, in turns of one layer of the prompt or one step of the answer.

A shared machine becomes a fifth slower or faster within seconds. Generations that run one after the other then differ
by that much, however alike their work. In turns all are equally far at any moment, so such a change meets them alike.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from adaskip.core.blocks import decoder_layers
from adaskip.core.patching import patches_of

T = TypeVar("T")
OTHERS_SHARE, OTHERS_S = 0.1, 0.2
"""Share of the process's CPU time, and seconds, that other threads may take; more would be missing in the times."""


class _OtherFailed(Exception):
    """Ends a thread because the work of another one failed or was interrupted."""


class _Turns:
    """Whose turn it is among numbered threads; only the one whose turn it is runs."""

    def __init__(self, number: int):
        self.gates = [threading.Semaphore(0) for _ in range(number)]
        self.present = list(range(number))
        self.failed = False

    def begin(self) -> None:
        self.gates[0].release()

    def wait(self, mine: int) -> None:
        """Wait for the turn of thread `mine`. Raises `_OtherFailed`."""
        self.gates[mine].acquire()
        if self.failed:
            raise _OtherFailed

    def pass_on(self, mine: int) -> None:
        """Give the turn to the next thread, and wait for the next turn of thread `mine`."""
        self._next(mine)
        self.wait(mine)

    def leave(self, mine: int) -> None:
        """Give the turn to the next thread for good."""
        self._next(mine)
        self.present.remove(mine)

    def _next(self, mine: int) -> None:
        place = (self.present.index(mine) + 1) % len(self.present)
        self.gates[self.present[place]].release()


def in_turns(works: Sequence[Callable[[Callable[[], None]], T]]) -> list[T]:
    """Run each of `works` in a thread of its own, one at a time, and return their results in order.

    Each is called with a function that gives the turn to the next. An exception ends all and is raised again.

    Raises:
        RuntimeError: torch computed in other threads, too, so that the CPU time of these threads is not that of the
            works.
    """
    turns, seconds = _Turns(len(works)), [0.0] * len(works)

    def run(mine: int, work: Callable[[Callable[[], None]], T]) -> T:
        try:
            turns.wait(mine)
            start = time.thread_time()
            result = work(lambda: turns.pass_on(mine))
            seconds[mine] = time.thread_time() - start
            return result
        except BaseException:
            turns.failed = True
            raise
        finally:
            turns.leave(mine)

    start = time.process_time()
    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(run, mine, work) for mine, work in enumerate(works)]
        turns.begin()
        try:
            wait(futures)
        except BaseException:  # an interrupt of the main thread
            turns.failed = True
            raise
    results = _results(futures)
    spent = time.process_time() - start
    if spent - sum(seconds) > max(OTHERS_SHARE * spent, OTHERS_S):
        raise RuntimeError(
            f"in turns, cells are timed by the CPU time of their own threads, but these took {sum(seconds):.1f} of the "
            f"process's {spent:.1f} s; torch must compute in one thread: set OMP_NUM_THREADS=1"
        )
    return results


def _results(futures: Sequence[Future[T]]) -> list[T]:
    """The results; else the first exception that is not the consequence of another."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda each: isinstance(each, _OtherFailed)):
        raise error
    return [future.result() for future in futures]


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` with the same parameters in memory, whose layers can be patched beside the original's."""
    copied = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    patches_of(copied)  # the proof of its layers, which runs them, is not part of any time
    return copied


@contextmanager
def taking_turns(model: nn.Module, pass_on: Callable[[], None]) -> Iterator[None]:
    """A context in which `pass_on` is called before each layer of a prompt and before each step of an answer."""
    layers = decoder_layers(model)

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if layer is layers[0] or hidden.shape[1] > 1:
            pass_on()

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
