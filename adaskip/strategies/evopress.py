"""EvoPress: skips the attentions and FFNs that an evolutionary search by KL divergence chose."""

from __future__ import annotations

from dataclasses import dataclass

from adaskip.core.look import Look
from adaskip.strategies.selected_sets import SelectedSets


@dataclass(frozen=True, kw_only=True)
class EvoPress(SelectedSets):
    """Skip as many attentions as FFNs: the set that an evolutionary search found to diverge least.

    The search has one run for each budget (`adaskip.calibration.evopress`). No scales.
    Source: Sieberling et al., EvoPress, arXiv 2410.14649.
    """

    name = "evopress"
    short_name = "EVO"
    label = "EvoPress"
    look = Look("#5B4B8A", "h", (1, 1, 3, 1))
    method = "evopress"
