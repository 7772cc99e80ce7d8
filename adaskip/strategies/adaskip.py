"""AdaSkip: skips the sublayers of highest offline similarity, and more FFNs learnt from a request's first tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from adaskip.core.look import BLUE, Look
from adaskip.core.plan import EMPTY_PLAN, SkipPlan, Sublayer
from adaskip.core.strategy import FFNSimilarity, Strategy, strategy_option
from adaskip.profiles.importance import ImportanceProfile

LEARNING_WINDOW = 20  # P, as in the paper's experiments


@dataclass(frozen=True, kw_only=True)
class AdaSkip(Strategy):
    """Skip the sublayers of highest offline IO similarity, each compensated by its offline scale.

    While decoding (phases decode and e2e), the FFNs outside the set are measured over the first `learning_window`
    tokens of a request. Those whose similarity exceeds `beta` join the set for the rest of the request.

    profile: result of the offline importance learning. learning_window: P of the paper; 0 disables online learning.
    beta_quantile: use this quantile of the offline similarities of all FFNs (0.5: the median) as beta, instead of the
    paper's threshold. Paper: Eq. (2)-(5).
    """

    name = "adaskip"
    short_name = "ADA"
    label = "AdaSkip"
    look = Look(BLUE, "o", zorder=3)
    profile_type = ImportanceProfile
    in_paper = True
    in_grid = True

    profile: ImportanceProfile
    learning_window: int = strategy_option("length of the learning window in tokens, 0 for none", LEARNING_WINDOW)
    beta_quantile: float | None = strategy_option(
        "beta as a quantile of the FFNs' similarities; default: the paper's threshold", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_window < 0:
            raise ValueError(f"learning_window must be at least 0 tokens; got {self.learning_window}")
        if self.beta_quantile is not None and not 0 <= self.beta_quantile <= 1:
            raise ValueError(f"beta_quantile must be between 0 and 1; got {self.beta_quantile}")

    @cached_property
    def skipped(self) -> SkipPlan:
        self.profile.check_num_layers(self.num_layers)
        count = self.budget.num_sublayers(self.num_layers)
        chosen: dict[Sublayer, float] = {}
        live_attention = self.num_layers
        for sublayer in self.profile.ranking():
            if len(chosen) == count:
                break
            if sublayer.kind == "attention":
                if live_attention == 1:  # one live attention must keep the length of the KV cache
                    continue
                live_attention -= 1
            chosen[sublayer] = self.profile.scale_of(sublayer)
        return SkipPlan.of_sublayers(chosen)

    @cached_property
    def beta(self) -> float:
        """The threshold: the lowest offline similarity in the set (as in the paper), or the `beta_quantile`.

        Infinite if the set is empty.
        """
        if self.beta_quantile is not None and self.skipped:
            return float(np.quantile(self.profile.ffn.similarity, self.beta_quantile))
        return min((self.profile.similarity_of(s) for s in self.skipped.sublayers), default=float("inf"))

    @property
    def window_tokens(self) -> int:
        """P; 0 in the prefill phase, whose few answer tokens use the set of the prompt."""
        return 0 if self.phase == "prefill" or not self.skipped else self.learning_window

    def learn(self, window: Mapping[int, FFNSimilarity]) -> SkipPlan:
        """FFNs whose similarity in the window is above `beta`, with the scales measured in the window."""
        joining = {
            Sublayer("ffn", layer): measured.scale
            for layer, measured in window.items()
            if layer not in self.skipped.ffn and measured.similarity > self.beta
        }
        return SkipPlan.of_sublayers(joining) if joining else EMPTY_PLAN
