"""BlockPruner: skips the sublayers that a greedy search by perplexity removed one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from adaskip.core.look import Look
from adaskip.strategies.selected_sets import SelectedSets


@dataclass(frozen=True, kw_only=True)
class BlockPruner(SelectedSets):
    """Skip the attentions and FFNs that were removed one by one, each time the one that raises perplexity least.

    The perplexity is that of the calibration text (`adaskip.calibration.blockpruner`). No scales.
    Source: Zhong et al., BlockPruner, arXiv 2406.10594.
    """

    name = "blockpruner"
    short_name = "BP"
    label = "BlockPruner"
    look = Look("#8C564B", "P", (2, 1))
    method = "blockpruner"
