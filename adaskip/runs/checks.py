"""Checks of a run that need no model, made before one is loaded, which may take minutes."""

from __future__ import annotations

from adaskip.core.plan import Budget, Phase
from adaskip.profiles.assumed import assumed_profile
from adaskip.profiles.selection import METHODS, SearchCost, Selected, SelectionProfile
from adaskip.runs.job import Job, Part, Profile
from adaskip.runs.manifest import compensation_samples, is_done
from adaskip.strategies import Strategy, build


def check(job: Job) -> None:
    """Refuse a run that cannot succeed; a finished run is not checked further.

    Checks the data, the given profile or the calibration data, the weight files (a Hub id is downloaded for that), and
    whether the strategy can keep its budget or, if `--target-speedup` will choose that, takes the profile.

    Raises:
        ValueError: one of these is missing, damaged or impossible.
    """
    if job.speedup is None and is_done(job):
        return
    assert job.parts, "reads the data"
    compensation_samples(job)
    job.loading.source.check()
    profile = _profile_without_model(job)
    build_strategies(job if job.speedup is None else job.with_sublayers(0), profile)


def build_strategies(job: Job, profile: Profile | None) -> list[Strategy | None]:
    """The strategy of each part; ValueError for an unknown option, or a budget that the strategy cannot keep."""
    return [_build(job, part, profile) for part in job.parts]


def _build(job: Job, part: Part, profile: Profile | None) -> Strategy | None:
    return build(
        job.strategy,
        phase=job.phase,
        budget=Budget(sublayers=job.cell.sublayers),
        num_layers=job.loading.num_layers,
        profile=profile,
        **{"max_decode_steps": part.max_new_tokens, **job.strategy_options},
    )


def _profile_without_model(job: Job) -> Profile | None:
    """The given profile; else a placeholder, after checking that the calibration data exists."""
    if job.given_profile is not None or job.calibration is None:
        return job.given_profile
    assert job.calibration.samples, "reads the data"
    if job.selection_method is None:
        return assumed_profile(job.loading.num_layers)
    assert job.calibration.searched, "reads the data"
    return _any_selection(job.phase, job.loading.num_layers, job.selection_method)


def _any_selection(phase: Phase, depth: int, method: str) -> SelectionProfile:
    """A placeholder selection with every set that the method can make: the first FFNs, then the first attentions."""
    selected = {}
    for count in METHODS[method].counts(2 * depth - 1):
        ffn, attention = (dict.fromkeys(range(size), 1.0) for size in (min(count, depth), max(0, count - depth)))
        selected[count] = Selected(attention, ffn, divergence=0.0, found_by="")
    cost = SearchCost(0, 0, 0.0, 0, 0, 0.0)
    unknown = dict.fromkeys(("model", "weights_fingerprint", "dtype", "attn_implementation", "dataset"), "")
    return SelectionProfile(selected, phase, num_layers=depth, cost=cost, **unknown, data_ids=(), method=method)
