"""What a grid would cost, before anything is loaded: GPU time by the roofline, and bytes.

The time is what the least times of `adaskip.roofline` add up to: every live sublayer at the device's ceilings, every
answer as long as it may get, nothing counted for loading, tokenising and launching kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from adaskip.benchmarks.longbench import get_task
from adaskip.benchmarks.longbench_files import HUB, MissingDataError
from adaskip.calibration.divergence import ANSWER_TOKENS
from adaskip.calibration.select import most_forwards
from adaskip.core.plan import EMPTY_PLAN, Budget, SkipPlan
from adaskip.roofline import Ceilings, ModelShape, kv_bytes_per_token, predict
from adaskip.roofline.predict import DecodePlan
from adaskip.runs.config import GridConfig
from adaskip.runs.job import Job, find_cells, resolve
from adaskip.runs.manifest import DONE, MISSING, find_state
from adaskip.strategies import FULL, build

TOKENS_PER_WORD = 1.4
"""Assumed of a record's `length`, for the tokenizer is not loaded."""
RECORD_BYTES, BYTES_PER_NEW_TOKEN = 8192, 8
"""Assumed of a saved record: references and plan, and each token of the answer."""
UNCHECKED = "unchecked"
"""The state of a run that is there while its data is not."""


@dataclass(frozen=True)
class TaskSize:
    """How many samples a task has, and how many words each; None where the data is not there to be counted."""

    samples: int
    words: tuple[int, ...] | None = None

    def prompts(self, most: int) -> Counter[int]:
        """How many prompts there are of each length in tokens, `most` at most; all so long if words are unknown."""
        if self.words is None:
            return Counter({most: self.samples})
        return Counter(min(most, max(1, round(TOKENS_PER_WORD * words))) for words in self.words)


@dataclass(frozen=True)
class CellSize:
    """One cell: whether it is done, and the samples of its tasks."""

    job: Job
    state: str
    tasks: dict[str, TaskSize]

    @property
    def label(self) -> str:
        return self.job.cell.label

    @property
    def samples(self) -> int:
        return sum(size.samples for size in self.tasks.values())

    @property
    def is_done(self) -> bool:
        return self.state == DONE

    @property
    def is_counted(self) -> bool:
        """Whether the samples were counted rather than taken from `configs/longbench.yaml`."""
        return all(size.words is not None for size in self.tasks.values())


def listing(config: GridConfig) -> Iterator[CellSize]:
    """Every cell of the grid and whether it is done as configured; loads and downloads nothing."""
    if config.data_dir == HUB:
        config = replace(config, data_dir=None)
    for cell in find_cells(config):
        job = resolve(cell)
        try:
            sizes = {part.name: _size(part.samples) for part in job.parts}
        except MissingDataError:
            state = MISSING if job.folder.read_manifest() is None else UNCHECKED
            yield CellSize(job, state, {task: _published_size(job, task) for task in job.answer_caps})
        else:
            yield CellSize(replace(job), find_state(job), sizes)  # a copy, which does not hold the samples


def _size(samples: Sequence[dict]) -> TaskSize:
    return TaskSize(len(samples), tuple(sample["length"] for sample in samples))


def _published_size(job: Job, name: str) -> TaskSize:
    number = get_task(name).num_long
    if number is None:
        raise MissingDataError(f"the number of samples of {name} is not known without the data: give --data-dir")
    return TaskSize(min(number, job.num_wanted or number))


def seconds(cell: CellSize, ceilings: Ceilings) -> float:
    """Least GPU time of the whole cell, one sample after the other."""
    job, shape = cell.job, cell.job.loading.shape
    most, sublayers = job.loading.max_prompt_tokens, job.cell.sublayers
    total = 0.0
    for task, size in cell.tasks.items():
        prompts, new_tokens = size.prompts(most), job.answer_caps[task]
        prefill_plan, decode_plan = assumed_plans(job, sublayers, shape.num_layers, new_tokens)
        # A decode step takes time linear in its context: the mean prompt stands for all.
        request = predict(
            shape,
            prefill_plan=prefill_plan,
            decode_plan=decode_plan,
            prompt_tokens=round(mean(prompts.elements())),
            new_tokens=new_tokens,
            ceilings=ceilings,
        )
        total += prefill_seconds(shape, prefill_plan, prompts, ceilings)
        total += size.samples * (new_tokens - 1) * (request.tpot_s or 0.0)
    return total


def prefill_seconds(shape: ModelShape, plan: SkipPlan, prompts: Counter[int], ceilings: Ceilings) -> float:
    """Least time of reading so many prompts of each length."""
    return sum(
        count
        * predict(
            shape, prefill_plan=plan, decode_plan=plan, prompt_tokens=length, new_tokens=1, ceilings=ceilings
        ).ttft_s
        for length, count in prompts.items()
    )


def calibration_seconds(job: Job, ceilings: Ceilings) -> float:
    """Least time of reading the calibration prompts of a cell's model; 0 where no profile has to be measured."""
    if job.calibration is None or job.profile_name is not None:
        return 0.0
    try:
        size = _size(job.calibration.samples)
    except MissingDataError:
        size = TaskSize(job.calibration.num_samples)
    prompts = size.prompts(job.loading.max_prompt_tokens)
    return prefill_seconds(job.loading.shape, EMPTY_PLAN, prompts, ceilings)


def search_seconds(job: Job, ceilings: Ceilings) -> float:
    """Least time of the search of a cell's phase, if nothing can be given up early; 0 for other strategies, and with a
    profile. Each forward is taken as that of the full model on the longest prompt that no run is scored on."""
    if job.calibration is None or job.selection_phase is None or job.profile_name is not None:
        return 0.0
    shape, count, answer = job.loading.shape, job.calibration.num_samples, _searched_answer(job)
    words = TaskSize(count, (max(1, job.calibration.max_length),) * count)
    (prompt,) = words.prompts(job.loading.max_prompt_tokens)
    full = {"prefill_plan": EMPTY_PLAN, "decode_plan": EMPTY_PLAN, "ceilings": ceilings}
    answered = predict(shape, prompt_tokens=prompt, new_tokens=answer, **full)
    searched = prompt + answer if job.phase != "decode" else answer
    forward = predict(shape, prompt_tokens=searched, new_tokens=1, **full)
    reading = count * (answered.ttft_s + (answer - 1) * (answered.tpot_s or 0.0))
    return reading + most_forwards(shape.num_layers, count, job.up_to) * forward.ttft_s


def _searched_answer(job: Job) -> int:
    """Tokens of the longest answers that a search compares."""
    return min(ANSWER_TOKENS, max(job.answer_caps.values()))


def assumed_plans(job: Job, sublayers: int, num_layers: int, new_tokens: int) -> tuple[SkipPlan, DecodePlan]:
    """(prefill, decode) plans of a cell; where measurement will decide, as many attentions as FFNs."""
    if job.strategy == FULL:
        return EMPTY_PLAN, EMPTY_PLAN
    if job.calibration is not None:
        plan = SkipPlan(frozenset(range(sublayers // 2)), frozenset(range(sublayers - sublayers // 2)))
        plan.check_fits(num_layers)
        return EMPTY_PLAN if job.phase == "decode" else plan, plan
    strategy = build(
        job.strategy,
        phase=job.phase,
        budget=Budget(sublayers=sublayers),
        num_layers=num_layers,
        max_decode_steps=new_tokens,
    )
    assert strategy is not None, "only the full model has no strategy"
    return strategy.prefill_plan, strategy.decode_plan


def result_bytes(cell: CellSize) -> int:
    """About how large the cell's records get."""
    return sum(
        size.samples * (RECORD_BYTES + BYTES_PER_NEW_TOKEN * cell.job.answer_caps[task])
        for task, size in cell.tasks.items()
    )


def gpu_bytes(cell: CellSize) -> tuple[int, int]:
    """(bytes of the weights in 16 bits, bytes of K/V of the longest request under the full model)."""
    shape = cell.job.loading.shape
    longest = cell.job.loading.max_prompt_tokens + max(cell.job.answer_caps.values())
    return 2 * shape.num_parameters, longest * kv_bytes_per_token(shape, EMPTY_PLAN)
