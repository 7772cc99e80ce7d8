"""The strategies, and `build`, which makes one by name."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules

from adaskip.core.look import Look
from adaskip.core.plan import Budget, Phase
from adaskip.core.strategy import FFNSimilarity, FixedPlan, Strategy, strategy_option
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from adaskip.strategies.adaskip import AdaSkip
from adaskip.strategies.blockpruner import BlockPruner
from adaskip.strategies.calibrated import CalibratedSkip
from adaskip.strategies.cosine_window import CosineWindow
from adaskip.strategies.early_exit import EarlyExit
from adaskip.strategies.evopress import EvoPress
from adaskip.strategies.names import GRID_STRATEGIES, LABELS, LOOKS, NAMES, PAPER_STRATEGIES, SHORT_NAMES, STRATEGIES
from adaskip.strategies.pop import POP
from adaskip.strategies.registry import (
    FULL,
    needs_profile,
    needs_selection,
    phases_of,
    profile_type,
    register_strategy,
    selection_method,
    strategy_class,
    strategy_name,
)
from adaskip.strategies.skipdecode import SkipDecode
from adaskip.strategies.unified import UnifiedSkipping
from adaskip.strategies.whole_layer_similarity import BlockInfluence, LeastSkip, MostSkip

PEERS = (BlockInfluence, CosineWindow, BlockPruner, EvoPress, POP)
"""Strategies of other papers, besides the baselines of AdaSkip's."""
for _strategy in (EarlyExit, SkipDecode, UnifiedSkipping, AdaSkip, CalibratedSkip, *PEERS, MostSkip, LeastSkip):
    register_strategy(_strategy)  # in the order of tables and help texts
for _module in iter_modules(__path__):  # a new file in this folder registers its strategy when imported
    import_module(f"{__name__}.{_module.name}")


def build(
    name: str,
    *,
    phase: Phase,
    budget: Budget,
    num_layers: int,
    profile: ImportanceProfile | SelectionProfile | None = None,
    max_decode_steps: int | None = None,
    **options,
) -> Strategy | None:
    """The strategy of that name, or None for "full".

    profile and max_decode_steps are passed to the strategies that use them. options: other fields of the class, e.g.
    learning_window. Raises ValueError for an unknown name or option, a budget that the strategy cannot keep, or a
    missing or wrong profile.
    """
    if name == FULL:
        if budget.num_sublayers(num_layers):
            raise ValueError(f"the full model skips nothing; got a budget of {budget}")
        return None
    cls = strategy_class(name)
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{name} has no option {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
    expected = cls.profile_type
    if expected is not None:
        if profile is None:
            raise ValueError(f"{name} needs a profile ({expected.__name__}); none was given")
        if not isinstance(profile, expected):
            raise ValueError(f"{name} needs a profile of type {expected.__name__}; got {type(profile).__name__}")
        options["profile"] = profile
    if max_decode_steps is not None and "max_decode_steps" in known:
        options["max_decode_steps"] = max_decode_steps
    return cls(num_layers=num_layers, budget=budget, phase=phase, **options)


__all__ = [
    "FULL",
    "GRID_STRATEGIES",
    "LABELS",
    "LOOKS",
    "NAMES",
    "PAPER_STRATEGIES",
    "PEERS",
    "POP",
    "SHORT_NAMES",
    "STRATEGIES",
    "AdaSkip",
    "BlockInfluence",
    "BlockPruner",
    "CalibratedSkip",
    "CosineWindow",
    "EarlyExit",
    "EvoPress",
    "FFNSimilarity",
    "FixedPlan",
    "LeastSkip",
    "Look",
    "MostSkip",
    "SkipDecode",
    "Strategy",
    "UnifiedSkipping",
    "build",
    "needs_profile",
    "needs_selection",
    "phases_of",
    "profile_type",
    "register_strategy",
    "selection_method",
    "strategy_class",
    "strategy_name",
    "strategy_option",
]
