"""Which calls of `generate` run inside a `skipping` context, and what becomes of one that outlives it.

`generate` looks up the model's methods anew in every step. So a call that began before the context would be skipped
from its middle on, and one that runs in another thread when the context ends would go on with the full model. Both
are refused at their next step.
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


class GenerateCalls:
    """The calls of `model.generate` that began inside one context and have not returned."""

    def __init__(self, model: Any, patches: ModelPatches):
        self.model, self.patches = model, patches
        self.ended = False
        self._depths: Counter[int] = Counter()  # by thread: an assistant's call runs inside another one
        self._lock = threading.Lock()
        self._own: Any = None

    @property
    def here(self) -> bool:
        """Whether a call of this thread is running."""
        return self._depths[threading.get_ident()] > 0

    def counted(self, stock: Callable[..., Any], check: Callable[[], Callable[[], None]]) -> Callable[..., Any]:
        """`generate` as the model has it, counted. check: called before; what it returns is called after success."""

        @functools.wraps(stock)
        def generate(*args, **kwargs):
            if self.ended:
                raise ValueError(
                    "this generate belongs to a skipping(...) context that has ended; take the model's own"
                )
            after = check()
            with self._lock:
                self._depths[threading.get_ident()] += 1
            try:
                output = stock(*args, **kwargs)
            finally:
                self._leave()
            after()
            return output

        return generate

    def _leave(self) -> None:
        with self._lock:
            self._depths[threading.get_ident()] -= 1
            self._depths += Counter()  # drops the zeros
            if self.ended and not self._depths and self.patches.outlived:
                self.patches.outlived = False
                restore_attribute(self.model, NEXT_STEP, self._own)

    def end(self) -> None:
        """The context has ended, the model's own methods are back: calls that still run are refused their next step."""
        with self._lock:
            self.ended = True
            if not self._depths:
                return
            stock = getattr(self.model, NEXT_STEP)
            self._own = self.model.__dict__.get(NEXT_STEP)

            @functools.wraps(stock)
            def refuse_what_outlived(*args, **kwargs):
                if not self.here:
                    return stock(*args, **kwargs)
                raise ValueError(
                    "skipping(...) ended while this generate was running in another thread; its answer cannot go on "
                    "with the full model. Leave the context when its requests are done"
                )

            self.model.__dict__[NEXT_STEP] = refuse_what_outlived
            self.patches.outlived = True
