"""The colour, marker and line style of a strategy in every figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# The palette of Okabe and Ito, which readers with colour blindness can distinguish.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
VERMILION = "#D55E00"


@dataclass(frozen=True)
class Look:
    """Colour, marker and dashes of a strategy, as matplotlib takes them; no dashes mean a solid line.

    Each of the three should distinguish the strategy without the other two.
    """

    color: str
    marker: str
    dashes: tuple[float, ...] = ()
    zorder: int = 2

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments for a line with markers."""
        style = (0, self.dashes) if self.dashes else "-"
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": style,
            "linewidth": 1.2,
            "markersize": 4,
            "zorder": self.zorder,
        }

    @property
    def hollow(self) -> dict[str, Any]:
        """Keyword arguments for the marker of an unfinished run, drawn over the filled one."""
        return {
            "color": self.color,
            "marker": self.marker,
            "markerfacecolor": "white",
            "linestyle": "none",
            "markersize": 4,
            "zorder": 4,
        }

    @property
    def faint(self) -> dict[str, Any]:
        """Keyword arguments for the paper's numbers, drawn behind ours."""
        return {**self.line, "markerfacecolor": "white", "linewidth": 0.7, "alpha": 0.45, "zorder": 1}
