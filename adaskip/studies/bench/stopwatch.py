"""Moments along a run, read once at its end: CUDA events on the stream, on the CPU a clock of the system."""

from __future__ import annotations

import itertools
import time
from typing import Any, Literal

import torch

Clock = Literal["wall", "process"]
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
"""On the CPU: time as it passes, or the process's own time, which other processes hardly stretch; with one thread the
two agree on a quiet machine."""


class Stopwatch:
    """Marks moments without waiting for the device; only `laps` waits, once."""

    def __init__(self, device: torch.device, clock: Clock):
        self.device, self.now = device, CLOCKS[clock]
        self.moments: list[Any] = []

    def mark(self) -> None:
        if self.device.type != "cuda":
            self.moments.append(self.now())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.moments.append(event)

    def laps(self) -> list[float]:
        """Seconds from each mark to the next."""
        pairs = itertools.pairwise(self.moments)
        if self.device.type != "cuda":
            return [after - before for before, after in pairs]
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1000 for before, after in pairs]
