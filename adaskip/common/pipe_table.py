"""Markdown tables with aligned columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def pipe_table(header: Sequence[str], lines: Iterator[list[str]] | Sequence[Sequence[str]]) -> str:
    """A Markdown table whose source text is aligned, too."""
    rows = [list(header), *map(list, lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    drawn = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([drawn[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *drawn[1:]])
