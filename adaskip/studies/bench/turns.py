"""Runs several generations at once, in turns of one layer of the prompt or one step of the answer.

A shared machine becomes a fifth slower or faster within seconds. Generations that run one after the other then differ
by that much, however alike their work. In turns all are equally far at any moment, so such a change meets them alike.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Semaphore
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from adaskip.common.errors import RunError
from adaskip.core.blocks import decoder_layers
from adaskip.core.patching import patches_of

T = TypeVar("T")
Work = Callable[[Callable[[], None]], T]
"""Is called with a function that gives the turn to the next work, and returns when it is this work's turn again."""
OTHERS_SHARE, OTHERS_S = 0.02, 0.1
"""Share of the process's CPU time, and seconds, that other threads may take; more would be missing in the times."""


class _OtherFailed(Exception):
    """Ends a thread because the work of another one failed or was interrupted."""


class _Relay:
    """Passes the turn among threads, each with a gate of its own: the thread of the first gate runs, others wait.

    Each round of turns begins one thread later, since the first to read a layer's weights finds them in no cache.
    """

    def __init__(self, number: int):
        self.gates = deque(Semaphore(0) for _ in range(number))
        self.all = tuple(self.gates)
        self.failed = False
        self.passed = 0

    def begin(self) -> None:
        self.gates[0].release()

    def wait(self, gate: Semaphore) -> None:
        gate.acquire()
        if self.failed:
            raise _OtherFailed

    def pass_on(self, gate: Semaphore) -> None:
        self.passed = (self.passed + 1) % len(self.gates)
        self.gates.rotate(-1 if self.passed else -2)
        self.gates[0].release()
        self.wait(gate)

    def leave(self) -> None:
        """The running thread has finished."""
        self.gates.popleft()
        if self.gates:
            self.passed %= len(self.gates)
            self.gates[0].release()

    def fail(self) -> None:
        """End all threads."""
        self.failed = True
        for gate in self.all:
            gate.release()


def in_turns(works: Sequence[Work[T]]) -> list[T]:
    """Run each of `works` in a thread of its own, one at a time, and return their results in order.

    An exception in one ends all, and is raised again.

    Raises:
        RunError: torch computed in other threads, too, so that the CPU time of the works' threads is not all.
    """
    relay, seconds = _Relay(len(works)), [0.0] * len(works)

    def run(mine: int, work: Work[T]) -> T:
        try:
            relay.wait(relay.all[mine])
            start = time.thread_time()
            result = work(lambda: relay.pass_on(relay.all[mine]))
            seconds[mine] = time.thread_time() - start
        except BaseException:
            relay.fail()
            raise
        relay.leave()
        return result

    start = time.process_time()
    with ThreadPoolExecutor(len(works)) as pool:
        try:
            futures = [pool.submit(run, mine, work) for mine, work in enumerate(works)]
            relay.begin()
            wait(futures)
        except BaseException:
            relay.fail()
            raise
    results = _results(futures)
    spent = time.process_time() - start
    if spent - sum(seconds) > max(OTHERS_SHARE * spent, OTHERS_S):
        raise RunError(
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
    """A context in which `pass_on` is called before each forward of `model`, and before each further layer of a prompt.

    A prompt's last token that is read by itself, as with kept K/V, is no turn of its own.
    """

    def before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] > 1:
            pass_on()

    hooks = [model.register_forward_pre_hook(lambda *_: pass_on())]
    hooks += [
        layer.register_forward_pre_hook(before_layer, with_kwargs=True) for layer in list(decoder_layers(model))[1:]
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
