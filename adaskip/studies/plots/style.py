"""One look for every figure: readable without colour, and the same bytes for the same data."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from adaskip.common.files import write_bytes_atomic

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same glyphs everywhere
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "adaskip",
}

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
VERMILION = "#D55E00"
FULL_LINE: dict[str, Any] = {"color": "black", "linewidth": 0.9, "dashes": (6, 2), "zorder": 1}


@dataclass(frozen=True)
class Look:
    """How a strategy is drawn: colour, marker and dashes each tell it apart alone."""

    color: str
    marker: str
    dashes: tuple[float, ...]
    zorder: int = 2

    @property
    def line(self) -> dict[str, Any]:
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
        """Another's numbers, behind ours."""
        return {**self.line, "markerfacecolor": "white", "linewidth": 0.7, "alpha": 0.45, "zorder": 1}


LOOKS = {
    "early_exit": Look(ORANGE, "s", (4, 1.5)),
    "skipdecode": Look(PURPLE, "^", (1, 1)),
    "unified": Look(GREEN, "D", (4, 1.5, 1, 1.5)),
    "adaskip": Look(BLUE, "o", (), zorder=3),
    "calibrated": Look(VERMILION, "v", (6, 1, 1, 1, 1, 1), zorder=3),
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in this look, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg without dates and program versions; called inside `styled()`."""
    left_out: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    return [_save(figure, stem.parent / f"{stem.name}.{kind}", kind, metadata) for kind, metadata in left_out.items()]


def _save(figure: Figure, path: Path, kind: str, metadata: dict[str, Any]) -> Path:
    image = io.BytesIO()
    figure.savefig(image, format=kind, dpi=200, metadata=metadata)
    return write_bytes_atomic(path, image.getvalue())
