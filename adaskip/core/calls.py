"""Tracks the calls of `generate` inside a `skipping` context, and stops those that outlive it.

`generate` looks up the model's methods in every step. A call that began before the context would therefore start to
skip half-way, and a call that still runs in another thread when the context ends would continue with the full model.
Both are refused at their next step.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from adaskip.core.blocks import restore_attribute
from adaskip.core.hf import NEXT_STEP
from adaskip.core.patching import ModelPatches

STEPS = (NEXT_STEP, "forward")
"""The methods that `generate` calls for each token: one of the model before the forward, then the decoder's forward."""
Place = tuple[Any, str, Any]
"""(object, attribute name, the object's own attribute before it was replaced, or None)."""


class GenerateCalls:
    """The calls of `model.generate` that began inside one context and have not returned."""

    def __init__(self, patches: ModelPatches):
        self.patches = patches
        self.ended = False
        self._depths: Counter[int] = Counter()  # per thread: an assistant model's call is nested in another call
        self._lock = threading.Lock()
        self._guarded: list[Place] = []

    @property
    def here(self) -> bool:
        """Whether this thread is inside a counted call."""
        return self._depths[threading.get_ident()] > 0

    def counted(
        self, stock: Callable[..., Any], check: Callable[[], Callable[[], None]], left: Callable[[], None]
    ) -> Callable[..., Any]:
        """Wrap `generate` so that its calls are counted.

        check: called before each call; the function that it returns is called after the call has succeeded. left:
        called after each call, also a failed one.
        """

        @functools.wraps(stock)
        def generate(*args, **kwargs):
            after = check()
            self._enter()
            try:
                output = stock(*args, **kwargs)
            finally:
                self._leave()
                left()
            after()
            return output

        return generate

    def _enter(self) -> None:
        with self._lock:
            if self.ended:
                raise ValueError(
                    "this generate belongs to a skipping(...) context that has ended; call the model's own generate"
                )
            self._depths[threading.get_ident()] += 1

    def _leave(self) -> None:
        with self._lock:
            self._depths[threading.get_ident()] -= 1
            self._depths += Counter()  # drops the zeros
            if self.ended and not self._depths:
                for place in self._guarded:
                    restore_attribute(*place)
                self._guarded = []
                self.patches.outlived = False

    def end(self, replaced: list[Place]) -> None:
        """Restore the methods that the context replaced, and refuse the next step of calls that still run.

        replaced: methods of the model and its decoder. Call this while no forward is running.
        """
        with self._lock:
            self.ended = True
            for owner, name, own in replaced:
                restore_attribute(owner, name, own)
                if self._depths and name in STEPS:
                    owner.__dict__[name] = self._refusing_what_outlived(getattr(owner, name))
                    self._guarded.append((owner, name, own))
            self.patches.outlived = bool(self._guarded)

    def _refusing_what_outlived(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def refuse(*args, **kwargs):
            if not self.here:
                return stock(*args, **kwargs)
            raise ValueError(
                "skipping(...) ended while this generate was running in another thread; its answer cannot continue "
                "with the full model. Leave the context after its requests are done"
            )

        return refuse
