"""One forward of one request, and the state that each thread keeps between calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache

from adaskip.core.compiled import StepKind
from adaskip.core.plan import SkipPlan
from adaskip.core.request import LearningWindow, Request


@dataclass(slots=True)
class Step:
    """One forward of one request.

    window: the learning window that measures FFNs in this step, None for none. tokens: a weak reference to the token
    ids or embeddings of the step.
    """

    kind: StepKind
    request: Request
    cache: Cache | None
    plan: SkipPlan
    window: LearningWindow | None
    tokens: Callable[[], Tensor | None] = lambda: None

    def token_ids(self) -> Tensor | None:
        """The token ids that `generate` prepared, [B, q]; None if it prepared embeddings or nothing."""
        tokens = self.tokens()
        return tokens if tokens is not None and tokens.dim() == 2 else None

    def is_for(self, tokens: Tensor) -> bool:
        """Whether the `tokens` that reach the decoder are those for which `generate` prepared the step."""
        prepared = self.tokens()
        if prepared is None:
            return False
        moved = prepared.device != tokens.device and prepared.shape == tokens.shape  # by a device hook
        embedded = tokens.dim() == 3 and prepared.dim() == 2 and prepared.shape == tokens.shape[:2]  # by a wrapper
        return prepared is tokens or moved or embedded


class Here(threading.local):
    """State of the calling thread."""

    prepared: Step | None = None
    """The step that `generate` has prepared and will run next."""
    kind: StepKind | None = None
    """The kind declared for direct calls by `prefilling()` or `decoding()`."""
    prefilling: bool = False
    """Whether `generate` is reading the prompt, possibly in chunks."""
    num_forwards: int = 0
    compiled: bool = False
    """Whether a compiled call of `generate`, which already has its turn, is about to enter the decoder."""
