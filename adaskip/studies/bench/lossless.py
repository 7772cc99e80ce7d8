"""`speed/lossless.py`: lossless mode against the full model and transformers' assisted generation, side by side.

Each prompt, or batch of prompts of one task, is answered greedily by stock `generate` and in every other way, in
turns, the first one changing from batch to batch, so that a drifting machine affects all alike. With one row, stock and
lossless start with a copy of the same KV cache of the prompt; assisted generation reads the prompt itself, since it
gives other tokens with a filled cache. Answers are saved in a file per model, dtype and number of rows after every
batch: a stopped run continues. The sets that draft are found on other samples than those that prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from adaskip.calibration.measure import calibrate
from adaskip.calibration.select import select
from adaskip.common.choices import check_choice
from adaskip.common.files import write_text_atomic
from adaskip.common.options import option
from adaskip.core.blocks import decoder_layers
from adaskip.core.plan import Budget, SkipPlan
from adaskip.models.loading import LoadedModel
from adaskip.models.source import find_source
from adaskip.models.stories import NOT_AT_HAND, STORIES, load_stories, stories_dir, tell_split
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from adaskip.runs.job import resolve
from adaskip.runs.manifest import describe_model
from adaskip.runs.records import prompt_ids
from adaskip.speculative import lossless
from adaskip.speculative.batch_checks import MOST_ROWS
from adaskip.speculative.drafting import VERSION
from adaskip.strategies import Strategy, build, needs_selection, strategy_class
from adaskip.studies.bench.lossless_answers import answer, differences, read_prompt
from adaskip.studies.bench.lossless_table import FULL_MODEL, find, read_saved
from adaskip.studies.bench.measuring import folder_name
from adaskip.studies.bench.settings import CLOCKS, RESULTS_DIR
from adaskip.studies.study import Study, StudyConfig, check_same, read_json

STORIES_SEED = 2
"""Other stories than those of the studies of quality."""
STORY_TOKENS = 128
STORY_PROMPT_TOKENS = (20, 60)
"""Lengths of the beginnings of stories that are prompts, from .. to."""
SAME = (
    *("prompts_fingerprint", "rows", "drafts", "drafting_version", "clock", "weights_fingerprint", "dtype"),
    *("attn_implementation", "device_name", "threads", "versions"),
)
"""What must be equal for a benchmark to be continued."""
PEERS: dict[str, dict[str, int]] = {
    "prompt_lookup_3": {"prompt_lookup_num_tokens": 3},
    "prompt_lookup_10": {"prompt_lookup_num_tokens": 10},
    "early_exit": {"assistant_early_exit": 0},
}
"""Options of `generate` for assisted generation of transformers, by name. 0: half of the layers."""


@dataclass(frozen=True)
class Draft:
    """A way to draft. share: of all sublayers, skipped. gamma: draft length, None for the adaptive one."""

    strategy: str
    share: float
    gamma: int | None = None

    def __str__(self) -> str:
        return f"{self.strategy} {self.share:.1%} {'adaptive' if self.gamma is None else f'gamma {self.gamma}'}"

    def sublayers(self, num_layers: int) -> int:
        """The nearest budget of a model of that depth."""
        unit = 2 if strategy_class(self.strategy).whole_layers else 1
        return unit * round(2 * num_layers * self.share / unit)


DRAFTS = (
    *(Draft("adaskip", share) for share in (0.25, 0.375, 0.5)),
    *(Draft(*way) for way in (("calibrated", 0.25), ("calibrated", 0.5), ("early_exit", 0.25), ("unified", 0.25))),
)
NGRAMS = "ngrams"
"""Drafts of n-grams alone."""
NESTED = "nested"
"""Drafts of all sets of a strategy, of which each draft takes the one that earns the most."""
STRATEGIES = (*dict.fromkeys(draft.strategy for draft in DRAFTS), NGRAMS, NESTED)
SHARES = tuple(dict.fromkeys(draft.share for draft in DRAFTS))


@dataclass(frozen=True, kw_only=True)
class LosslessConfig(StudyConfig):
    """The options of `speed/lossless.py`."""

    folder = RESULTS_DIR
    extra_models = (STORIES,)

    strategies: tuple[str, ...] = option(f"what drafts, of {', '.join(STRATEGIES)}", STRATEGIES)
    shares: tuple[float, ...] = option("shares of the sublayers that drafts skip", SHARES)
    peers: tuple[str, ...] = option(f"assisted generation of transformers, of {', '.join(PEERS)}", ())
    profile: str | None = option("importance profile: a file, folder or published name; if not given, calibrate")
    clock: str = option(f"on the CPU, of {', '.join(CLOCKS)}; CUDA has its own", "wall", choices=[*CLOCKS])
    prompts: int = option("prompts of each model; each is answered with every draft", 40)
    rows: int = option(f"prompts answered together, up to {MOST_ROWS}; from 2 on, only {NGRAMS} can draft", 1)
    new_tokens: int = option("most tokens of an answer", 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.strategies:
            check_choice("strategy that drafts", name, STRATEGIES)
        for name in self.peers:
            check_choice("assisted generation", name, PEERS)
        for share in self.shares:
            check_choice("share", str(share), [str(each) for each in SHARES])
        for name in ("prompts", "new_tokens"):
            if getattr(self, name) < 2:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 2, not {getattr(self, name)}")
        if NESTED in self.strategies and not self.nested:
            raise ValueError(
                f"--strategies {NESTED} drafts with all sets of a strategy; give a strategy with several --shares, too"
            )
        if not 1 <= self.rows <= MOST_ROWS:
            raise ValueError(f"--rows must be 1 to {MOST_ROWS}, not {self.rows}")
        if self.rows > 1 and (self.peers or self.strategies != (NGRAMS,)):
            raise ValueError(
                f"--rows {self.rows}: only n-grams draft for several rows; give --strategies {NGRAMS} and no --peers"
            )

    @property
    def drafts(self) -> tuple[Draft, ...]:
        return tuple(draft for draft in DRAFTS if draft.strategy in self.strategies and draft.share in self.shares)

    @property
    def nested(self) -> dict[str, list[Draft]]:
        """The drafts of each strategy that has several, by the name of the way that takes them all."""
        drafts = [draft for draft in self.drafts if draft.gamma is None and NESTED in self.strategies]
        names = dict.fromkeys(draft.strategy for draft in drafts)
        sets = {f"{name} {NESTED}": [draft for draft in drafts if draft.strategy == name] for name in names}
        return {name: each for name, each in sets.items() if len(each) > 1}


@dataclass(frozen=True)
class Batch:
    """Prompts of one task that are answered together, token ids, 1-D, and their ids."""

    task: str
    ids: Sequence[str]
    prompts: Sequence[Tensor]


@dataclass(frozen=True)
class Subject:
    """A model and its prompts. calibration: prompts that importance is measured on, unless it is given, 1-D.
    searched: those that the sets of calibrated are searched on."""

    loaded: LoadedModel
    batches: Sequence[Batch]
    calibration: Sequence[Tensor]
    searched: Sequence[Tensor]
    importance: ImportanceProfile | None = None

    @property
    def ends(self) -> dict[str, Any]:
        """The tokens that end an answer, and the one that pads."""
        ends = list(self.loaded.spec.stop_token_ids)
        return {"eos_token_id": ends or None, "pad_token_id": self.loaded.pad_token_id}


def measure(config: LosslessConfig) -> None:
    """Answer the prompts of every model."""
    for name in config.models:
        if name == STORIES and stories_dir() is None:
            print(NOT_AT_HAND)
        elif name == STORIES:
            _measure(config, STORIES, _of_stories(config))
        else:
            _measure(config, find_source(name).name, _of_tasks(config, name))


def _of_tasks(config: LosslessConfig, name: str) -> Subject:
    """Batches of the tasks in turns: of those given, or those of every phase."""
    entry = find_source(name, config.checkpoint).entry
    phases = config.setup_of(entry).phases.values()
    tasks = config.tasks or tuple(dict.fromkeys(chain(*(phase.tasks for phase in phases))))
    job = resolve(config.run_config(name, phase="decode", strategy="adaskip", tasks=tasks))
    loaded, records, calibration = job.loading.load(), job.records, job.calibration
    assert calibration is not None, "of strategy adaskip"
    each = config.rows * -(-config.prompts // (len(tasks) * config.rows))
    columns = []
    for task in tasks:
        samples = records.scored(task, each)
        prompts = [prompt_ids(records.benchmark, task, [sample], loaded)[0] for sample in samples]
        columns.append(_batches(task, [sample["_id"] for sample in samples], prompts, config.rows))
    batches = [batch for turn in zip_longest(*columns) for batch in turn if batch][: -(-config.prompts // config.rows)]
    searches = any(needs_selection(draft.strategy) for draft in config.drafts)
    searched = calibration.prompts(calibration.searched, loaded) if searches else []
    if config.profile is None:
        return Subject(loaded, batches, calibration.data(loaded)["prompts"], searched)
    importance = ImportanceProfile.load(config.profile, loaded.model, allow_other_weights=True)
    return Subject(loaded, batches, [], searched, importance)


def _of_stories(config: LosslessConfig) -> Subject:
    """stories260K, which goes on with the beginnings of stories it told; other stories calibrate."""
    loaded = load_stories()
    calibration, told = tell_split(loaded, config.prompts, STORY_TOKENS, STORIES_SEED)
    shortest, longest = STORY_PROMPT_TOKENS
    spread = longest - shortest + 1
    begun = [story[: shortest + i % spread] for i, story in enumerate(told)]
    batches = _batches("stories", [str(i) for i in range(len(begun))], begun, config.rows)
    return Subject(loaded, batches, calibration, calibration)


def _batches(task: str, ids: Sequence[str], prompts: Sequence[Tensor], rows: int) -> list[Batch]:
    starts = range(0, len(prompts), rows)
    return [Batch(task, ids[start : start + rows], prompts[start : start + rows]) for start in starts]


def _measure(config: LosslessConfig, name: str, subject: Subject) -> None:
    """Answer those batches of one model that its file does not have yet.

    Raises ValueError if the file is of other prompts, drafts, plans, weights or another machine.
    """
    model: Any = subject.loaded.model
    manifest = _manifest(config, name, subject)
    dtype = "" if manifest["dtype"] == "float32" else f"-{manifest['dtype']}"
    rows = "" if config.rows == 1 else f"-rows{config.rows}"
    path = config.out_dir / folder_name(model.device) / f"lossless-{name}{dtype}{rows}.json"
    saved = read_json(path)
    if saved:
        check_same(saved["manifest"], manifest, SAME, path)
    records: list[dict[str, Any]] = saved.get("records", [])
    if len(records) == len(subject.batches):
        return
    strategies = strategies_for(subject, config.drafts, path.with_name(f"selection-{name}.json"))
    manifest["plans"] = {str(draft): strategy.skipped.to_dict() for draft, strategy in strategies.items()}
    if saved and saved["manifest"]["plans"] != manifest["plans"]:
        raise ValueError(f"{path} was measured with other plans; give another --output-dir")
    ways = _ways(config, model, strategies)
    for way in ways.values():  # warm up
        answer(model, [prompt[-64:] for prompt in subject.batches[0].prompts], 4, {**subject.ends, **way})
    names = list(ways)
    for i in tqdm(range(len(records), len(subject.batches)), desc=name, unit="batch", disable=None):
        batch, turn = subject.batches[i], names[i % len(names) :] + names[: i % len(names)]
        cache = read_prompt(model, batch.prompts[0]) if len(batch.prompts) == 1 else None
        answers = {}
        for way in turn:
            given = None if way in config.peers else cache
            options = {**subject.ends, **ways[way]}
            answers[way] = answer(model, batch.prompts, config.new_tokens, options, given, config.clock)
        for way in names[1:]:
            tokens, stock = answers[way]["tokens"], answers[FULL_MODEL]["tokens"]
            answers[way]["differences"] = differences(model, batch.prompts, stock, tokens)
        lengths = [len(prompt) for prompt in batch.prompts]
        record = {"task": batch.task, "ids": batch.ids, "prompt_tokens": lengths}
        records.append({**record, "answers": {way: answers[way] for way in names}})
        write_text_atomic(path, json.dumps({"manifest": manifest, "records": records}) + "\n")


def _manifest(config: LosslessConfig, name: str, subject: Subject) -> dict[str, Any]:
    """What the answers of a file depend on, without the plans."""
    prompts = chain(*(batch.prompts for batch in subject.batches))
    told = str([config.new_tokens, *(prompt.tolist() for prompt in prompts)])
    return {
        **describe_model(subject.loaded),
        "checkpoint": Path(subject.loaded.spec.checkpoint).name,  # the folder, wherever it lies
        "model": name,
        "prompts_fingerprint": hashlib.sha256(told.encode()).hexdigest(),
        "drafts": [*_names(config), *config.peers],
        "rows": config.rows,
        "drafting_version": VERSION,
        "clock": config.clock,
    }


def _names(config: LosslessConfig) -> list[str]:
    """The ways to draft."""
    return [*map(str, config.drafts), *config.nested, *([NGRAMS] if NGRAMS in config.strategies else [])]


def _ways(config: LosslessConfig, model: Any, strategies: dict[Draft, Strategy]) -> dict[str, dict[str, Any]]:
    """Options of `generate` of every way to answer, stock first."""
    ways: dict[str, dict[str, Any]] = {FULL_MODEL: {}}
    for draft, strategy in strategies.items():
        ways[str(draft)] = {"custom_generate": lossless(model, strategy, gamma=draft.gamma)}
    for name, drafts in config.nested.items():
        ways[name] = {"custom_generate": lossless(model, [strategies[draft] for draft in drafts])}
    if NGRAMS in config.strategies:
        ways[NGRAMS] = {"custom_generate": lossless(model, SkipPlan())}
    half = len(decoder_layers(model)) // 2
    return ways | {peer: {name: tokens or half for name, tokens in PEERS[peer].items()} for peer in config.peers}


def strategies_for(subject: Subject, drafts: Sequence[Draft], selection_path: Path) -> dict[Draft, Strategy]:
    """The drafts as strategies of this model; the sets calibrated drafts by are searched once and kept."""
    if not drafts:
        return {}
    model, depth = subject.loaded.model, len(decoder_layers(subject.loaded.model))
    importance = subject.importance or calibrate(model, subject.calibration)
    made = {}
    searched = [draft.sublayers(depth) for draft in drafts if needs_selection(draft.strategy)]
    selection = _selection(subject, importance, max(searched), selection_path) if searched else None
    for draft in drafts:
        profile = selection if needs_selection(draft.strategy) else importance
        budget = Budget(sublayers=draft.sublayers(depth))
        made[draft] = build(draft.strategy, phase="decode", budget=budget, num_layers=depth, profile=profile)
    return made


def _selection(subject: Subject, importance: ImportanceProfile, up_to: int, path: Path) -> SelectionProfile:
    if path.is_file():
        return SelectionProfile.load(path, subject.loaded.model)
    progress_path = path.with_suffix(".partial.jsonl")
    selection = select(
        subject.loaded.model,
        subject.searched,
        "decode",
        up_to=up_to,
        eos_token_ids=subject.loaded.spec.stop_token_ids,
        pad_token_id=subject.loaded.pad_token_id,
        importance=importance,
        progress_path=progress_path,
        show_progress=True,
    )
    selection.save(path)
    progress_path.unlink()
    return selection


STUDY = Study(
    LosslessConfig, measure, lambda config: read_saved(config.out_dir), find=lambda saved, config: find(saved)
)
main = STUDY.main
