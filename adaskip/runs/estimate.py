"""Estimates the cost of a grid before anything is loaded: GPU time from the roofline model, and bytes.

The time is the sum of the minimum times of `adaskip.roofline`: every live sublayer runs at the device's ceilings, every
answer has its maximum length, and loading, tokenising and kernel launches are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from adaskip.benchmarks.protocol import HUB, Benchmark, MissingDataError
from adaskip.calibration.divergence import ANSWER_TOKENS
from adaskip.calibration.peers import PEERS
from adaskip.calibration.select import most_forwards
from adaskip.core.plan import EMPTY_PLAN, Budget, SkipPlan
from adaskip.profiles.selection import METHODS, SEARCH
from adaskip.roofline import Ceilings, ModelShape, kv_bytes_per_token, predict
from adaskip.roofline.predict import DecodePlan
from adaskip.runs.config import GridConfig
from adaskip.runs.job import Job, find_cells, resolve
from adaskip.runs.manifest import DONE, MISSING, run_state
from adaskip.strategies import FULL, build

TOKENS_PER_WORD = 1.4
"""Assumed ratio for a record's `length` in words, since the tokenizer is not loaded."""
RECORD_BYTES, BYTES_PER_NEW_TOKEN = 8192, 8
"""Assumed size of a saved record: a fixed part for references and plan, and a part per token of the answer."""
UNCHECKED = "unchecked"
"""The state of an existing run whose data is missing."""


@dataclass(frozen=True)
class TaskSize:
    """Number of samples of a task, and the number of words of each; words is None if the data is missing."""

    samples: int
    words: tuple[int, ...] | None = None

    def prompts(self, most: int) -> Counter[int]:
        """Number of prompts by length in tokens, capped at `most`; if words are unknown, all have length `most`."""
        if self.words is None:
            return Counter({most: self.samples})
        return Counter(min(most, max(1, round(TOKENS_PER_WORD * words))) for words in self.words)


@dataclass(frozen=True)
class CellSize:
    """A cell with the state of its run and the sizes of its tasks."""

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
        """Whether the samples were counted rather than taken from what the benchmark says."""
        return all(size.words is not None for size in self.tasks.values())


def listing(config: GridConfig) -> Iterator[CellSize]:
    """Yield every cell of the grid with the state of its run; loads and downloads nothing."""
    if config.data_dir == HUB:
        config = replace(config, data_dir=None)
    for cell in find_cells(config):
        job = resolve(cell)
        try:
            sizes = {part.name: _size(part.benchmark, part.name, part.samples) for part in job.parts}
        except MissingDataError:
            state = MISSING if job.folder.read_manifest() is None else UNCHECKED
            yield CellSize(job, state, {task: _published_size(job, task) for task in job.answer_caps})
        else:
            yield CellSize(replace(job), run_state(job), sizes)  # a copy of the job without its cached samples


def _size(benchmark: Benchmark, task: str, samples: Sequence[dict]) -> TaskSize:
    words = (sample.get("length") or len(benchmark.prompt(task, sample).split()) for sample in samples)
    return TaskSize(len(samples), tuple(words))


def _published_size(job: Job, name: str) -> TaskSize:
    number = job.records.benchmark.num_records(name) if job.records.prompt_limit is None else None
    if number is None:
        raise MissingDataError(f"the number of samples of {name} is unknown without its data; give --data-dir")
    return TaskSize(min(number, job.num_wanted or number))


def seconds(cell: CellSize, ceilings: Ceilings) -> float:
    """Minimum GPU time of the whole cell, in batches of one sample."""
    job, shape = cell.job, cell.job.loading.shape
    most, sublayers = job.loading.max_prompt_tokens, job.cell.sublayers
    total = 0.0
    for task, size in cell.tasks.items():
        prompts, new_tokens = size.prompts(most), job.answer_caps[task]
        prefill_plan, decode_plan = assumed_plans(job, sublayers, shape.num_layers, new_tokens)
        # The time of a decode step is linear in the context length, so the mean prompt length is enough.
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
    """Minimum time of reading the prompts. prompts: number of prompts by length in tokens."""
    return sum(
        count
        * predict(
            shape, prefill_plan=plan, decode_plan=plan, prompt_tokens=length, new_tokens=1, ceilings=ceilings
        ).ttft_s
        for length, count in prompts.items()
    )


def calibration_seconds(job: Job, ceilings: Ceilings) -> float:
    """Minimum time of reading the calibration prompts of a job; 0 if no profile has to be measured."""
    if job.calibration is None or job.profile_name is not None:
        return 0.0
    try:
        size = _size(job.records.benchmark, job.calibration.task, job.calibration.samples)
    except MissingDataError:
        size = TaskSize(job.calibration.num_samples)
    prompts = size.prompts(job.loading.max_prompt_tokens)
    return prefill_seconds(job.loading.shape, EMPTY_PLAN, prompts, ceilings)


def search_seconds(job: Job, ceilings: Ceilings) -> float:
    """Time of a job's search at the device's limits, 0 if no search is needed.

    It is estimated as if no contender were dropped early, and every forward ran all layers of the full model on the
    longest prompt that no run is scored on.
    """
    if job.calibration is None or (method := job.selection_method) is None or job.profile_name is not None:
        return 0.0
    shape, count, answer = job.loading.shape, job.calibration.num_searched, _searched_answer(job)
    words = job.records.unscored_words
    size = TaskSize(count, None if words is None else (max(1, words),) * count)
    (prompt,) = size.prompts(job.calibration.search_prompt_tokens or job.loading.max_prompt_tokens)
    full = {"prefill_plan": EMPTY_PLAN, "decode_plan": EMPTY_PLAN, "ceilings": ceilings}
    if not METHODS[method].by_phase:  # only the prompts are read
        forward = predict(shape, prompt_tokens=prompt, new_tokens=1, **full)
        return PEERS[method].most_forwards(shape.num_layers, count, job.counts) * forward.ttft_s
    answered = predict(shape, prompt_tokens=prompt, new_tokens=answer, **full)
    searched = prompt + answer if job.phase != "decode" else answer
    forward = predict(shape, prompt_tokens=searched, new_tokens=1, **full)
    reading = count * (answered.ttft_s + (answer - 1) * (answered.tpot_s or 0.0))
    if method == SEARCH:
        return reading + most_forwards(shape.num_layers, count, job.up_to) * forward.ttft_s
    return reading + PEERS[method].most_forwards(shape.num_layers, count, job.counts) * forward.ttft_s


def _searched_answer(job: Job) -> int:
    """Maximum length, in tokens, of the answers that a search compares."""
    return min(ANSWER_TOKENS, max(job.answer_caps.values()))


def assumed_plans(job: Job, sublayers: int, num_layers: int, new_tokens: int) -> tuple[SkipPlan, DecodePlan]:
    """(prefill, decode) plans of a cell; if a profile will decide, equal numbers of attentions and FFNs."""
    if job.strategy == FULL:
        return EMPTY_PLAN, EMPTY_PLAN
    if job.calibration is not None:
        plan = SkipPlan(frozenset(range(sublayers // 2)), frozenset(range(sublayers - sublayers // 2)))
        plan.check_fits(num_layers)
        if job.keeps_kv:
            return replace(plan, keeps_kv=True), EMPTY_PLAN
        return EMPTY_PLAN if job.phase == "decode" else plan, plan
    strategy = build(
        job.strategy,
        phase=job.phase,
        budget=Budget(sublayers=sublayers),
        num_layers=num_layers,
        **{"max_decode_steps": new_tokens, **job.strategy_options},
    )
    assert strategy is not None, "only the full model has no strategy"
    return strategy.prefill_plan, strategy.decode_plan


def result_bytes(cell: CellSize) -> int:
    """Approximate size of the cell's records."""
    return sum(
        size.samples * (RECORD_BYTES + BYTES_PER_NEW_TOKEN * cell.job.answer_caps[task])
        for task, size in cell.tasks.items()
    )


def gpu_bytes(cell: CellSize) -> tuple[int, int]:
    """(bytes of the weights in 16 bits, bytes of K/V of the longest request with the full model)."""
    shape = cell.job.loading.shape
    longest = cell.job.loading.max_prompt_tokens + max(cell.job.answer_caps.values())
    return 2 * shape.num_parameters, longest * kv_bytes_per_token(shape, EMPTY_PLAN)
