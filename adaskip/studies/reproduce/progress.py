"""A progress bar over different kinds of work, with the time left for all of it."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

TOLD_EVERY_S = 30.0
"""Minimum time between lines if standard error is not a terminal."""


class Whole:
    """Progress in estimated seconds of work; the time left is extrapolated from the pace so far.

    It has the attributes of a bar that `runs.grid.Pool` needs: `update` and `disable`.
    """

    disable = False

    def __init__(self, total_s: float):
        self.total_s, self.done_s = total_s, 0.0
        self.began = self.told = time.monotonic()
        self.bar = tqdm(
            total=total_s,
            desc="reproduce",
            smoothing=0,
            disable=None,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left {postfix}",
        )

    def __enter__(self) -> Whole:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()

    def update(self, seconds: float) -> None:
        """Add finished work, in estimated seconds."""
        self.done_s += seconds
        self.bar.update(seconds)
        if self.bar.disable and time.monotonic() - self.told > TOLD_EVERY_S:
            self.told = time.monotonic()
            print(self.line(), file=sys.stderr)

    def stage(self, name: str) -> None:
        """Show the current stage beside the bar."""
        self.bar.set_postfix_str(name)

    def line(self) -> str:
        """The finished share, and the time so far and left, as a line for a log."""
        passed = time.monotonic() - self.began
        left = passed * (self.total_s - self.done_s) / self.done_s if self.done_s else 0.0
        share = 100 * self.done_s / self.total_s
        return f"reproduce: {share:.0f} %, {_minutes(passed)} so far, about {_minutes(left)} left"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
