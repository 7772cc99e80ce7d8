"""The strategies by name."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches

from adaskip.core.plan import Budget, Phase
from adaskip.core.strategy import FFNSimilarity, Strategy
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from adaskip.strategies.adaskip import AdaSkip
from adaskip.strategies.calibrated import CalibratedSkip
from adaskip.strategies.early_exit import EarlyExit
from adaskip.strategies.fixed import FixedPlan
from adaskip.strategies.skipdecode import SkipDecode
from adaskip.strategies.unified import UnifiedSkipping
from adaskip.strategies.whole_layer_similarity import LeastSkip, MostSkip

STRATEGIES: dict[str, type[Strategy]] = {
    cls.name: cls for cls in (EarlyExit, SkipDecode, UnifiedSkipping, AdaSkip, CalibratedSkip, MostSkip, LeastSkip)
}
FULL = "full"
"""The name of the unskipped model wherever a strategy is named."""
NAMES: tuple[str, ...] = (FULL, *STRATEGIES)


def needs_profile(name: str) -> bool:
    """Whether the strategy chooses by something measured: importance, or the search of a selection."""
    return name != FULL and "profile" in {f.name for f in fields(strategy_class(name))}


def strategy_class(name: str) -> type[Strategy]:
    """The class of a strategy name; ValueError with the nearest and all names if there is none."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    near = get_close_matches(name, NAMES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown strategy {name!r}.{hint} Available: {', '.join(NAMES)}")


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

    profile and max_decode_steps go to the strategies that use them; options are further fields of the class (for
    example learning_window). Raises ValueError for an unknown name, option or budget, or a profile that is missing.
    """
    if name == FULL:
        if budget.num_sublayers(num_layers):
            raise ValueError(f"the full model skips nothing; got a budget of {budget}")
        return None
    cls = strategy_class(name)
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{name} has no option {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
    if "profile" in known:
        if profile is None:
            raise ValueError(f"{name} chooses by measurement: give the profile of a calibration")
        expected = SelectionProfile if cls is CalibratedSkip else ImportanceProfile
        if not isinstance(profile, expected):
            raise ValueError(f"{name} needs {expected.__name__}, not {type(profile).__name__}")
        options["profile"] = profile
    if max_decode_steps is not None and "max_decode_steps" in known:
        options["max_decode_steps"] = max_decode_steps
    return cls(num_layers=num_layers, budget=budget, phase=phase, **options)


__all__ = [
    "FULL",
    "NAMES",
    "STRATEGIES",
    "AdaSkip",
    "CalibratedSkip",
    "EarlyExit",
    "FFNSimilarity",
    "FixedPlan",
    "LeastSkip",
    "MostSkip",
    "SkipDecode",
    "Strategy",
    "UnifiedSkipping",
    "build",
    "needs_profile",
    "strategy_class",
]
