"""One forward of one request, and what a thread is about to run."""

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
    """One forward of one request. window: what measures FFNs in it. tokens: weakly, the ids or embeddings it is for."""

    kind: StepKind
    request: Request
    cache: Cache | None
    plan: SkipPlan
    window: LearningWindow | None
    tokens: Callable[[], Tensor | None] = lambda: None

    def is_for(self, tokens: Tensor) -> bool:
        """Whether `tokens`, which reach the decoder, are those that `generate` prepared the step for."""
        prepared = self.tokens()
        if prepared is None:
            return False
        moved = prepared.device != tokens.device and prepared.shape == tokens.shape  # by a device hook
        embedded = tokens.dim() == 3 and prepared.dim() == 2 and prepared.shape == tokens.shape[:2]  # by a wrapper
        return prepared is tokens or moved or embedded


class Here(threading.local):
    """What belongs to the calling thread."""

    prepared: Step | None = None
    """The step that `generate` is about to run."""
    kind: StepKind | None = None
    """What direct calls are declared to be."""
    prefilling: bool = False
    """Whether `generate` is reading the prompt, perhaps in chunks."""
    num_forwards: int = 0
    compiled: bool = False
    """Whether a compiled call of `generate`, which has its turn already, is about to enter the decoder."""
