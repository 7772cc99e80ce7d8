"""Calibrated skipping: skips the set that changes the model's output least, found by a search in advance."""

from __future__ import annotations

from dataclasses import dataclass

from adaskip.core.look import VERMILION, Look
from adaskip.strategies.selected_sets import SelectedSets


@dataclass(frozen=True, kw_only=True)
class CalibratedSkip(SelectedSets):
    """Skip the set that a search on calibration prompts chose for this phase and budget.

    Each sublayer is compensated by its offline scale, as in AdaSkip. There is no learning window: its threshold, the
    lowest similarity in the set, is meaningless for a set that was not chosen by similarity. So at the same budget,
    inference costs the same as with AdaSkip without its window.

    profile: the result of the search (`adaskip.calibration.select`).
    """

    name = "calibrated"
    short_name = "CAL"
    label = "Calibrated"
    look = Look(VERMILION, "v", (6, 1, 1, 1, 1, 1), zorder=3)
    in_grid = True
