"""What is refused before a model is loaded, which may take minutes: all that can be known to be wrong without it."""

from __future__ import annotations

from typing import Any

from adaskip.core.plan import Budget, Phase
from adaskip.profiles.importance import ImportanceProfile, SublayerMeans
from adaskip.profiles.selection import SearchCost, Selected, SelectionProfile
from adaskip.runs.job import Job, Part, Profile
from adaskip.runs.manifest import is_done
from adaskip.strategies import Strategy, build

UNKNOWN: dict[str, Any] = {
    **{"model": "", "weights_fingerprint": "", "dtype": "", "attn_implementation": ""},
    **{"dataset": "", "data_ids": ()},
}
"""Fields of a profile that stands for any."""


def check(job: Job) -> None:
    """Refuse a run that cannot be; a finished one is not looked into any further.

    Looks at the data, at the given profile or the data to make one of, at whether the weights are whole (a Hub id is
    downloaded for that), and at whether the strategy can keep to its budget, unless `--target-speedup` is to choose it.

    Raises:
        ValueError: any of these is missing, damaged or impossible; one line.
    """
    if job.speedup is None and is_done(job):
        return
    assert job.parts, "reads the data"
    job.loading.source.check()
    profile = _profile_without_model(job)
    if job.speedup is None:
        build_strategies(job, profile)


def build_strategies(job: Job, profile: Profile | None) -> list[Strategy | None]:
    """The strategy of each part; ValueError if there is no such option of it, or it cannot keep to the job's budget."""
    return [_build(job, part, profile) for part in job.parts]


def _build(job: Job, part: Part, profile: Profile | None) -> Strategy | None:
    return build(
        job.strategy,
        phase=job.phase,
        budget=Budget(sublayers=job.cell.sublayers),
        num_layers=job.loading.num_layers,
        profile=profile,
        max_decode_steps=part.max_new_tokens,
        **job.strategy_options,
    )


def _profile_without_model(job: Job) -> Profile | None:
    """The given profile; else, once the data to make one of is found to be there, one that stands for any."""
    if job.given_profile is not None or job.calibration is None:
        return job.given_profile
    assert job.calibration.samples, "reads the data"
    if job.selection_phase is None:
        return _any_importance(job.loading.num_layers)
    assert job.calibration.searched, "reads the data"
    return _any_selection(job.selection_phase, job.loading.num_layers)


def _any_importance(depth: int) -> ImportanceProfile:
    means = SublayerMeans((0.0,) * depth, (1.0,) * depth)
    return ImportanceProfile(attention=means, ffn=means, layer=means, tokens=1, phase="prefill", **UNKNOWN)


def _any_selection(phase: Phase, depth: int) -> SelectionProfile:
    """Of every number of sublayers: the first FFNs, and beyond those the first attentions."""
    selected = {}
    for count in range(1, 2 * depth):
        ffn, attention = (dict.fromkeys(range(size), 1.0) for size in (min(count, depth), max(0, count - depth)))
        selected[count] = Selected(attention, ffn, divergence=0.0, found_by="")
    cost = SearchCost(0, 0, 0.0, 0, 0, 0.0)
    return SelectionProfile(selected, phase, num_layers=depth, cost=cost, **UNKNOWN)
