"""What a forward of the full model over 1, 2, 3, ... tokens costs, learned while decoding."""

from __future__ import annotations

from collections import deque
from statistics import median

MOST = 16
"""Tokens of the longest verification."""
LATEST = 7
"""Measurements of one number of tokens that count."""
ASSUMED_SLOPE = 0.3
"""Steps that one more token is assumed to cost before any forward over several tokens was measured."""


class StepCosts:
    """Seconds of a verification by its number of tokens: medians of the latest measurements, lines between them.

    Beyond the longest measured verification, every further token costs what a token beyond the first cost so far.
    From one request to the next only the ratios to a step of one token are kept, since the time of a step depends on
    the length of the prompt.
    """

    def __init__(self) -> None:
        self.ratios = {1: 1.0}
        self.seconds: dict[int, deque[float]] = {}
        self._curve: list[float] | None = None

    def new_request(self) -> None:
        if 1 in self.seconds:
            step_s = median(self.seconds[1])
            self.ratios |= {tokens: median(times) / step_s for tokens, times in self.seconds.items()}
        self.seconds, self._curve = {}, None

    def add(self, tokens: int, seconds: float) -> None:
        self.seconds.setdefault(tokens, deque(maxlen=LATEST)).append(seconds)
        self._curve = None

    @property
    def measured(self) -> bool:
        """Whether any forward over several tokens was measured, in this request or before."""
        return len(self.seconds.keys() | self.ratios.keys()) > 1

    def curve(self) -> list[float]:
        """Seconds by number of tokens, [MOST + 1]; entry 0 has no meaning."""
        if self._curve is None:
            step_s = median(self.seconds[1])
            known = {tokens: ratio * step_s for tokens, ratio in self.ratios.items()}
            known |= {tokens: median(times) for tokens, times in self.seconds.items()}
            self._curve = _interpolated(known)
        return self._curve


def _interpolated(known: dict[int, float]) -> list[float]:
    curve, longest = [0.0, known[1]], max(known)
    slope = max(0.0, (known[longest] - known[1]) / (longest - 1)) if longest > 1 else ASSUMED_SLOPE * known[1]
    for tokens in range(2, MOST + 1):
        if tokens > longest:
            curve.append(curve[-1] + slope)
            continue
        below, above = max(t for t in known if t < tokens), min(t for t in known if t >= tokens)
        part = (tokens - below) / (above - below)
        curve.append(known[below] + part * (known[above] - known[below]))
    return curve
