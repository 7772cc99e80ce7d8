"""`--target-speedup`: chooses the budget of a run by predicted speedup, and measures the attained speedup at its end.

The choice is saved as `speedup-<asked>[-<device>].json` in the run's folder as soon as that exists, so that a continued
run keeps it, even on another machine. The attained speedup is added when the run ends.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice, zip_longest
from pathlib import Path
from statistics import mean
from typing import Any

from adaskip.common.files import write_text_atomic
from adaskip.common.intervals import median_estimate
from adaskip.common.provenance import device_name
from adaskip.core.blocks import decoder_layers
from adaskip.core.generate import generate
from adaskip.core.plan import Budget
from adaskip.models.loading import LoadedModel
from adaskip.profiles.selection import SelectionProfile
from adaskip.roofline import Ceilings, ModelShape
from adaskip.runs.cells import run_name
from adaskip.runs.choose_by_speedup import Predictor, Request, choose, phase_seconds
from adaskip.runs.job import Job, Part, SpeedupAsked
from adaskip.runs.profiles import profile_for
from adaskip.runs.records import Sample
from adaskip.strategies import Strategy, build

PAIRS = 6
"""Number of batches that are timed with both the full and the skipped model."""


@dataclass(frozen=True)
class Attained:
    """The median, over pairs, of the full model's time divided by the skipped model's, and its 95 % interval."""

    speedup: float
    low: float | None
    high: float | None
    device: str
    full_s: tuple[float, ...]
    skipped_s: tuple[float, ...]


@dataclass(frozen=True)
class Target:
    """A target speedup and the number of sublayers chosen for it.

    on: the device of `--speedup-on`, None for this machine. requests: for each task, the mean prompt length and the
    answer cap of the prediction. attained: None until the run has ended.
    """

    asked: float
    on: str | None
    sublayers: int
    divergence: float
    predicted: float
    ceilings: Ceilings
    requests: dict[str, Request]
    attained: Attained | None = None

    @property
    def line(self) -> str:
        """The line that a run prints about it."""
        told = f"speedup asked {self.asked:.2f}, predicted {self.predicted:.2f} on {self.ceilings.name}"
        if (attained := self.attained) is None:
            return told
        interval = "" if attained.low is None else f" [{attained.low:.2f}, {attained.high:.2f}]"
        return f"{told}, attained {attained.speedup:.2f}{interval} on {attained.device}, {self.sublayers} sublayers"

    def save(self, folder: Path) -> Path:
        """Write it to the folder of a run, atomically."""
        return write_text_atomic(folder / _file_name(self.asked, self.on), json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Target:
        """Read a saved target; ValueError if the file is not one."""
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            fields["ceilings"] = Ceilings(**fields["ceilings"])
            fields["requests"] = {task: Request(**request) for task, request in fields["requests"].items()}
            fields["attained"] = None if fields["attained"] is None else Attained(**fields["attained"])
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a saved choice ({error}); delete it to choose again") from None


def _file_name(asked: float, on: str | None) -> str:
    return f"speedup-{asked}{'' if on is None else f'-{on}'}.json"


def find_target(job: Job) -> Target:
    """The saved choice of an earlier run of this job, or a new one, for which the model and its profile are loaded.

    Raises:
        UnreachableSpeedupError: no set of the profile is predicted to reach the target.
    """
    assert job.speedup is not None
    name = _file_name(job.speedup.speedup, job.speedup.on)
    runs = job.runs_dir / run_name(job.loading.source.name, job.phase, job.strategy)
    held = sorted(runs.glob(f"*-sublayers/{name}"))
    if len(held) > 1:
        raise ValueError(
            f"several runs have a choice for this speedup: {', '.join(map(str, held))}; delete all but one"
        )
    return Target.load(held[0]) if held else choose_target(job, job.speedup)


def choose_target(job: Job, asked: SpeedupAsked) -> Target:
    """A new choice, whatever earlier runs have chosen. Raises UnreachableSpeedupError like `find_target`."""
    loaded = job.loading.load()
    profile, _ = profile_for(job, loaded)
    assert isinstance(profile, SelectionProfile)
    requests = {part.name: _typical_request(part, loaded) for part in job.parts}
    model = loaded.model
    predictor = Predictor.on(
        *(asked.on, model.device, model.dtype, job.loading.attn_implementation),
        shape=ModelShape.of(model.config),
        phase=job.phase,
        requests=list(requests.values()),
        batch_size=job.batch_size,
    )
    speedups = {count: predictor.speedup(chosen.plan) for count, chosen in profile.selected.items()}
    sublayers = choose(profile, asked.speedup, speedups, f"in phase {job.phase} on {predictor.ceilings.name}")
    return Target(
        asked=asked.speedup,
        on=asked.on,
        sublayers=sublayers,
        divergence=profile.selected[sublayers].divergence,
        predicted=speedups[sublayers],
        ceilings=predictor.ceilings,
        requests=requests,
    )


def _typical_request(part: Part, loaded: LoadedModel) -> Request:
    lengths = [len(prompt) for prompt in part.prompt_ids(part.samples, loaded)]
    return Request(round(mean(lengths)), part.max_new_tokens, len(lengths))


def attain(job: Job, target: Target) -> Target:
    """Time the first batches of the job's tasks in pairs, with the full model and with the chosen set.

    Every answer has the length of its cap, so that both generate the same number of tokens. One extra pair warms up;
    the order within pairs alternates.
    """
    loaded = job.loading.load()
    profile, _ = profile_for(job, loaded)
    assert isinstance(profile, SelectionProfile)
    skipped = build(
        job.strategy,
        num_layers=len(decoder_layers(loaded.model)),
        budget=Budget(sublayers=target.sublayers),
        phase=job.phase,
        profile=profile,
    )
    pairs = []
    for number, (part, batch) in enumerate(_first_batches(job)):
        first, second = (None, skipped) if number % 2 == 0 else (skipped, None)
        times = [_seconds(job, part, batch, loaded, strategy) for strategy in (first, second)]
        pairs.append(times if first is None else times[::-1])
    full_s, skipped_s = zip(*pairs[1:], strict=True)
    estimate = median_estimate([full / skip for full, skip in zip(full_s, skipped_s, strict=True)])
    assert estimate is not None
    device = device_name(loaded.model.device)
    return replace(target, attained=Attained(estimate.value, estimate.low, estimate.high, device, full_s, skipped_s))


def _first_batches(job: Job) -> list[tuple[Part, Sequence[Sample]]]:
    """One warm-up batch and `PAIRS` batches to time, alternating between tasks, repeated if there are too few."""
    starts = range(0, max(len(part.samples) for part in job.parts), job.batch_size)
    batches = zip_longest(
        *([(part, part.samples[start : start + job.batch_size]) for start in starts] for part in job.parts)
    )
    filled = [(part, batch) for row in batches for part, batch in row if batch]
    return list(islice(cycle(filled), PAIRS + 1))


def _seconds(job: Job, part: Part, batch: Sequence[Sample], loaded: LoadedModel, strategy: Strategy | None) -> float:
    generation, *_ = generate(
        loaded.model,
        strategy,
        part.prompt_ids(batch, loaded),
        max_new_tokens=part.max_new_tokens,
        min_new_tokens=part.max_new_tokens,
        eos_token_ids=loaded.spec.stop_token_ids,
        pad_token_id=loaded.pad_token_id,
    )
    tpot_s = None if generation.tpot_ms is None else generation.tpot_ms / 1000
    return phase_seconds(job.phase, generation.ttft_s, tpot_s, part.max_new_tokens)
