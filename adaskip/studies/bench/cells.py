"""What the benchmark times: a cell is one way to run the model, a workload the work each cell does, a study some cells.

Within a study every cell does the same work in every round, so that ratios are of things that ran side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adaskip.strategies import FULL
from adaskip.studies.engines.engines import ENGINE_MODES

PATCHED, BREAKDOWN = "patched", "breakdown"
ADASKIP, WINDOWLESS = "adaskip", "adaskip without window"
PLAIN_PREFILL, MEASURING_PREFILL = "plain prefill", "measuring prefill"
KV_CHECK, COUNTS = "kv check", "counts"
EXACT = (KV_CHECK, COUNTS)
"""Cells that count and do not time."""

EAGER, COMPILED = "eager", "compiled"
MODES = {
    EAGER: "a dynamic cache, nothing compiled",
    COMPILED: "a static cache and transformers' own compilation of decode steps",
    **{name: engine.what for name, engine in ENGINE_MODES.items()},
}
"""How decoding runs."""

STUDIES = {
    "strategies": "the full model and every strategy at every budget; the time of each sublayer",
    "overhead": "the model inside `skipping` with nothing to skip, against the stock model",
    "window": "AdaSkip with and without its online learning window",
    "calibration": "a prefill that measures IO similarity, against a plain one",
    "kv": "the KV cache's bytes, and that they are freed before the first decode step (times nothing)",
}


@dataclass(frozen=True)
class Workload:
    """What each cell does in each round: a batch of prompts of equal length, and a fixed number of new tokens."""

    prompt_tokens: int
    new_tokens: int
    batch_size: int = 1

    @property
    def decode_steps(self) -> int:
        """Forwards after the one over the prompt, which makes the first new token."""
        return self.new_tokens - 1

    def __str__(self) -> str:
        return f"{self.batch_size} x {self.prompt_tokens} + {self.new_tokens} tokens"


@dataclass(frozen=True)
class Cell:
    """One way to run the model."""

    name: str
    """A strategy's name, or one of the benchmark's own above."""
    phase: str = ""
    sublayers: int = 0
    mode: str = EAGER

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.name, self.phase, str(self.sublayers or ""), self.mode)))

    @property
    def baseline(self) -> Cell:
        """The full model in the same mode."""
        return Cell(FULL, mode=self.mode)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cells_of(
    study: str, phases: Sequence[str], strategies: Sequence[str], budgets: Sequence[int], modes: Sequence[str]
) -> list[Cell]:
    """The cells of a study in the order of its first round."""
    if study == "strategies":
        full = [Cell(FULL, mode=mode) for mode in modes]
        timed = [Cell(BREAKDOWN)] if EAGER in modes else []
        skipping = [Cell(name, p, n, mode) for mode in modes for p in phases for name in strategies for n in budgets]
        return [*full, *timed, *skipping]
    if study == "overhead":
        return [*(Cell(name, mode=mode) for mode in modes for name in (FULL, PATCHED)), Cell(COUNTS)]
    if study == "window":
        return [Cell(name, "decode", n, mode) for mode in modes for n in budgets for name in (WINDOWLESS, ADASKIP)]
    if study == "calibration":
        return [Cell(PLAIN_PREFILL), Cell(MEASURING_PREFILL)]
    assert study == "kv", study
    return [Cell(KV_CHECK, phase, n) for phase in phases for n in budgets]


def rotated(cells: Sequence[Cell], round_number: int) -> list[Cell]:
    """The cells in another order each round, so that none always runs first or behind the same neighbour.

    Odd rounds run backwards; every two rounds begin one cell further. What is exact runs in the first round only.
    """
    if round_number != 1 and not all(cell.name in EXACT for cell in cells):
        cells = [cell for cell in cells if cell.name not in EXACT]
    start = (round_number // 2) % len(cells)
    turned = [*cells[start:], *cells[:start]]
    return turned[::-1] if round_number % 2 else turned
