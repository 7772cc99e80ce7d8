"""What an observation's test says: claims in words, each with its numbers and whether it holds on the data at hand."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaskip.common.files import write_text_atomic
from adaskip.common.pipe_table import pipe_table

UNRELATED = 0.5
"""Rankings that correlate less are called different: about what 16 random layers reach once in twenty times."""
ALIKE = 0.7
"""Rankings that correlate at least so much are called alike."""


@dataclass(frozen=True)
class Claim:
    """One claim, and in how many of the cases that were tested it holds."""

    text: str
    holding: int
    cases: int
    evidence: str

    @property
    def verdict(self) -> str:
        if self.cases == 0:
            return "not tested"
        if self.holding == self.cases:
            return "holds"
        return "does not hold" if self.holding == 0 else f"holds in {self.holding} of {self.cases} cases"

    @property
    def sentence(self) -> str:
        return f"{self.text}: {self.verdict}. {self.evidence}"

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Table:
    """Numbers as they are shown."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def as_csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.header, *self.rows])
        return text.getvalue()


@dataclass(frozen=True)
class Findings:
    """One script's result."""

    name: str
    title: str
    notes: Sequence[str]
    claims: Sequence[Claim]
    table: Table
    numbers: Any
    """What the table shows, unrounded, for the JSON file."""
    sources: dict[str, Any] = field(default_factory=dict)
    """What the numbers were measured on."""
    has_figure: bool = True

    def as_markdown(self) -> str:
        parts = [f"# {self.title}", *self.notes]
        parts += [f"![{self.title}]({self.name}.png)"] if self.has_figure else []
        parts += ["\n".join(f"- **{c.text}: {c.verdict}.** {c.evidence}" for c in self.claims)] if self.claims else []
        return "\n\n".join([*parts, pipe_table(self.table.header, self.table.rows)]) + "\n"

    def as_json(self) -> str:
        content = {
            "name": self.name,
            "title": self.title,
            "claims": [claim.as_dict() for claim in self.claims],
            "numbers": self.numbers,
            "sources": self.sources,
        }
        return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def write_findings(findings: Findings, out_dir: Path) -> list[Path]:
    """Write `<name>.md`, `.csv` and `.json` into `out_dir`."""
    texts = {"md": findings.as_markdown(), "csv": findings.table.as_csv(), "json": findings.as_json()}
    return [write_text_atomic(out_dir / f"{findings.name}.{kind}", text) for kind, text in texts.items()]


def span(values: Sequence[float]) -> str:
    """`0.31 (0.02 to 0.58)`: mean and range."""
    if not values:
        return "none"
    mean = sum(values) / len(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"
