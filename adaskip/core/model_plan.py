"""Makes plans with an origin, which records their model, and strategies from such plans."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from typing import Any

from torch import nn

from adaskip.core.decoder import decoder_layers
from adaskip.core.fingerprint import portable_fingerprint
from adaskip.core.plan import PlanOrigin, SkipPlan
from adaskip.core.same_model import check_same_model, identity
from adaskip.core.strategy import FixedPlan, Strategy

PROVENANCE = (
    *("model", "phase", "dataset", "data_ids", "tokens", "dtype", "attn_implementation"),
    *("weights_fingerprint", "config_fingerprint", "versions"),
)
"""Fields of a profile that record the model and the data."""


def make_plan(
    model: nn.Module, strategy: Strategy, *, base_model: str | None = None, allow_other_weights: bool = False
) -> SkipPlan:
    """The set that `strategy` skips in `model`, as a plan with an origin, which `save_pretrained` needs.

    base_model: Hub id, folder or GGUF file of the model; default: where it was loaded from. Of what exists here, the
    plan records the absolute path. allow_other_weights: accept a profile of other weights of a model of the same shape.

    Raises ValueError if the strategy is for another number of layers, its profile is of another model, or its set
    changes during an answer.
    """
    check_steady(strategy)
    depth = len(decoder_layers(model))
    if strategy.num_layers != depth:
        raise ValueError(f"strategy {strategy.name} was made for {strategy.num_layers} layers, the model has {depth}")
    profile: Any = getattr(strategy, "profile", None)
    if profile is not None:
        profile.check_fits(model, allow_other_weights=allow_other_weights)
    known = identity(model, base_model, portable_fingerprint(model))
    origin = PlanOrigin(
        **{**known, "model": _place(known["model"])},
        num_layers=depth,
        phase=strategy.phase,
        strategy=strategy.name,
        budget={unit: value for unit, value in vars(strategy.budget).items() if value is not None},
        options={f.name: getattr(strategy, f.name) for f in fields(strategy) if "help" in f.metadata},
        profile=None if profile is None else _provenance(profile),
        versions={name: version(name) for name in ("torch", "transformers")},
    )
    return replace(strategy.skipped, origin=origin)


def _place(name: str) -> str:
    """The absolute path of a folder or file, which a relative one is only here; a name that is neither as it is."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.exists(path) else name


def check_steady(strategy: Strategy) -> None:
    """Raise ValueError unless a saved plan can express what the strategy skips in an answer."""
    if not strategy.is_steady or strategy.is_prompt_only:
        raise ValueError(
            f"strategy {strategy.name} in phase {strategy.phase!r} changes its set during an answer or after the "
            "prompt, which a saved plan cannot express; allowed: a constant set (adaskip: learning_window=0; "
            "skipdecode: phase prefill)"
        )


def strategy_of(given: Strategy | SkipPlan, model: nn.Module, *, allow_other_weights: bool = False) -> Strategy:
    """A strategy unchanged; for a plan, a strategy that skips its set in the phase of its origin.

    Without an origin it is e2e, or prefill if the plan keeps the K/V.

    Raises ValueError for anything else, and for a plan that was made for another model; with allow_other_weights, a
    plan for other weights of the same shape only causes a warning.
    """
    if isinstance(given, Strategy):
        return given
    if not isinstance(given, SkipPlan):
        raise ValueError(
            f"expected a Strategy or a SkipPlan (for lossless, or a list of them); got {type(given).__name__}"
        )
    if given.origin is None:
        phase = "prefill" if given.keeps_kv else "e2e"
        return FixedPlan(num_layers=len(decoder_layers(model)), phase=phase, plan=given)
    check_plan(
        given.origin,
        identity(model, fingerprint=portable_fingerprint(model)),
        len(decoder_layers(model)),
        allow_other_weights=allow_other_weights,
    )
    return FixedPlan(num_layers=given.origin.num_layers, phase=given.origin.phase, plan=given)


check_plan = partial(check_same_model, what="plan", again="make one for this model")


def _provenance(profile: Any) -> dict[str, Any]:
    found = {name: getattr(profile, name) for name in PROVENANCE if getattr(profile, name, None) is not None}
    plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items()}
    return {"kind": type(profile).__name__, **plain}
