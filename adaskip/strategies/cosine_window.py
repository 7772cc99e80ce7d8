"""Cosine window: skips the run of consecutive layers whose input and output differ least in angle."""

from __future__ import annotations

from dataclasses import dataclass

from adaskip.core.look import SKY, Look
from adaskip.strategies.selected_sets import SelectedSets


@dataclass(frozen=True, kw_only=True)
class CosineWindow(SelectedSets):
    """Skip n consecutive layers: those with the smallest angle between the stream before and after them.

    The angle is that at the last token of the calibration prompts (`adaskip.calibration.cosine_window`). No scales.
    Source: Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887.
    """

    name = "cosine_window"
    short_name = "UIDL"
    label = "Cosine Window"
    look = Look(SKY, "X", (5, 1))
    whole_layers = True
    method = "cosine_window"
