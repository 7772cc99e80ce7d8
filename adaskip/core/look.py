"""How a strategy is drawn in every figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
VERMILION = "#D55E00"


@dataclass(frozen=True)
class Look:
    """Colour, marker and dashes, in matplotlib's terms; each tells a strategy apart alone. No dashes: a solid line."""

    color: str
    marker: str
    dashes: tuple[float, ...] = ()
    zorder: int = 2

    @property
    def line(self) -> dict[str, Any]:
        """Keywords of a line with markers."""
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
        """The marker of an unfinished run, over its full one."""
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
        """The paper's numbers, behind ours."""
        return {**self.line, "markerfacecolor": "white", "linewidth": 0.7, "alpha": 0.45, "zorder": 1}
