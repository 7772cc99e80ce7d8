"""Short names of the strategies, as run names use them, and the lists that tables and grids run over."""

from __future__ import annotations

SHORT_NAMES = {
    "full": "FULL",
    "early_exit": "EE",
    "skipdecode": "SD",
    "unified": "US",
    "adaskip": "ADA",
    "calibrated": "CAL",
    "most_skip": "MOST",
    "least_skip": "LEAST",
}
PAPER_STRATEGIES = ("full", "early_exit", "skipdecode", "unified", "adaskip")
"""The strategies of the paper's Tables 3 and 4, the full model first."""
GRID_STRATEGIES = (*PAPER_STRATEGIES, "calibrated")
