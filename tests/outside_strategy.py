"""The source of a package outside that brings a strategy of its own, as its author would write it."""

from __future__ import annotations

from pathlib import Path

MODULE, NAME, SHORT_NAME = "outside_skip", "outside_skip", "OUT"
LABEL, COLOR = "From outside", "#7a5195"
SOURCE = f'''
"""A strategy of another package."""

from dataclasses import dataclass
from functools import cached_property

from adaskip import Budget, SkipPlan
from adaskip.strategies import Look, Strategy, register_strategy, strategy_option


@register_strategy
@dataclass(frozen=True, kw_only=True)
class OutsideSkip(Strategy):
    """Skip FFNs from layer `first` on."""

    name = "{NAME}"
    short_name = "{SHORT_NAME}"
    label = "{LABEL}"
    look = Look("{COLOR}", "P", (2, 3))

    first: int = strategy_option("the first FFN that it skips", 1)

    @cached_property
    def skipped(self) -> SkipPlan:
        count = self.budget.num_sublayers(self.num_layers)
        return SkipPlan(ffn=frozenset(range(self.first, self.first + count)))
'''


def write_module(folder: Path) -> Path:
    """Write the module into `folder`, from which it can be imported."""
    folder.mkdir(exist_ok=True)
    (folder / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
    return folder


def install(folder: Path) -> Path:
    """The same as a package with an entry point, as pip would leave it in a folder of packages."""
    write_module(folder)
    info = folder / "outside_skip-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-skip\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[adaskip.strategies]\nany_name = {MODULE}:OutsideSkip\n", encoding="utf-8")
    return folder
