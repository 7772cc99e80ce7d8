"""What is refused before a model is loaded, which may take minutes: all that can be known to be wrong without it."""

from __future__ import annotations

from typing import Any

from adaskip.core.plan import Budget, check_phase
from adaskip.profiles.importance import ImportanceProfile, SublayerMeans
from adaskip.profiles.selection import SearchCost, Selected, SelectionProfile
from adaskip.runs.config import RunConfig
from adaskip.runs.job import Job, Part, find_job, find_parts
from adaskip.runs.manifest import is_done
from adaskip.runs.profiles import Profile, searched_samples
from adaskip.runs.sources import calibration_samples, check_weights, given_profile, num_layers
from adaskip.strategies import Strategy, build, needs_profile, needs_selection

UNKNOWN: dict[str, Any] = {
    **{"model": "", "weights_fingerprint": "", "dtype": "", "attn_implementation": ""},
    **{"dataset": "", "data_ids": ()},
}
"""Fields of a profile that stands for any."""


def check(config: RunConfig) -> None:
    """Refuse a run that cannot be; a finished one is not looked into any further.

    Looks at the data, at the given profile or the data to make one of, at whether the weights are whole (a Hub id is
    downloaded for that), and at whether the strategy can keep to its budget, unless `--target-speedup` is to choose it.

    Raises:
        ValueError: any of these is missing, damaged or impossible; one line.
    """
    if config.target_speedup is not None:
        find_parts(config)
        check_weights(config, config.model)
        _profile_without_model(config)
        return
    job = find_job(config)
    if is_done(job):
        return
    check_weights(config, config.model)
    build_strategies(job, num_layers(config, config.model), _profile_without_model(config))


def build_strategies(job: Job, num_layers: int, profile: Profile | None) -> list[Strategy | None]:
    """The strategy of each part; ValueError if there is no such option of it, or it cannot keep to the job's budget."""
    return [_build(job, part, num_layers, profile) for part in job.parts]


def _build(job: Job, part: Part, num_layers: int, profile: Profile | None) -> Strategy | None:
    return build(
        job.config.strategy,
        phase=check_phase(job.config.phase),
        budget=job.config.skip_budget or Budget(sublayers=0),
        num_layers=num_layers,
        profile=profile,
        max_decode_steps=part.max_new_tokens,
        **job.config.strategy_options,
    )


def _profile_without_model(config: RunConfig) -> Profile | None:
    """The given profile; else, once the data to make one of is found to be there, one that stands for any."""
    if not needs_profile(config.strategy):
        return None
    if (given := given_profile(config)) is not None:
        return given
    calibration_samples(config, config.setup.calibration_samples)
    if not needs_selection(config.strategy):
        return _any_importance(num_layers(config, config.model))
    searched_samples(config, check_phase(config.phase), config.setup.calibration_samples)
    return _any_selection(config, num_layers(config, config.model))


def _any_importance(depth: int) -> ImportanceProfile:
    means = SublayerMeans((0.0,) * depth, (1.0,) * depth)
    return ImportanceProfile(attention=means, ffn=means, layer=means, tokens=1, phase="prefill", **UNKNOWN)


def _any_selection(config: RunConfig, depth: int) -> SelectionProfile:
    """Of every number of sublayers: the first FFNs, and beyond those the first attentions."""
    selected = {}
    for count in range(1, 2 * depth):
        ffn, attention = (dict.fromkeys(range(size), 1.0) for size in (min(count, depth), max(0, count - depth)))
        selected[count] = Selected(attention, ffn, divergence=0.0, found_by="")
    cost = SearchCost(0, 0, 0.0, 0, 0, 0.0)
    return SelectionProfile(selected, check_phase(config.phase), num_layers=depth, cost=cost, **UNKNOWN)
