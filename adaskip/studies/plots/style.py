"""The style of all figures: readable without colour, and the same bytes for the same data."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from adaskip.common.files import write_bytes_atomic
from adaskip.core.look import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, Look
from adaskip.strategies.names import LOOKS

__all__ = [
    "BLUE",
    "FULL_LINE",
    "GREEN",
    "LOOKS",
    "ORANGE",
    "PURPLE",
    "RC",
    "SKY",
    "VERMILION",
    "Look",
    "save",
    "save_as",
    "styled",
]

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # part of matplotlib: the same glyphs on every machine
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

LEFT_OUT: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
"""Metadata to leave out, by file type: it would differ between files of the same data."""

FULL_LINE: dict[str, Any] = {"color": "black", "linewidth": 0.9, "dashes": (6, 2), "zorder": 1}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in this style, whatever the user's matplotlibrc contains."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg without dates and program versions; call it inside `styled()`."""
    return [save_as(figure, stem.parent / f"{stem.name}.{kind}") for kind in ("png", "svg")]


def save_as(figure: Figure, path: Path) -> Path:
    """Write one file, .png, .svg or .pdf; call it inside `styled()`. ValueError for another file type."""
    if (kind := path.suffix[1:]) not in LEFT_OUT:
        raise ValueError(f"{path} is not the name of a picture; allowed endings: {', '.join(LEFT_OUT)}")
    image = io.BytesIO()
    figure.savefig(image, format=kind, dpi=200, metadata=LEFT_OUT[kind])
    return write_bytes_atomic(path, image.getvalue())
