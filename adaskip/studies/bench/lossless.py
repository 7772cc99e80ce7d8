"""`speed/lossless.py`: lossless mode against the full model, side by side.

Each prompt is answered greedily by stock `generate` and with every draft, in turns, the first one changing from prompt
to prompt, so that a drifting machine hits all alike. A file a model, written after every prompt: a stopped run
continues, a finished one says so. What drafts is found on other samples than those that prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.benchmark import timer
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from adaskip.calibration.measure import calibrate
from adaskip.calibration.select import select
from adaskip.common.choices import check_choice
from adaskip.common.commands import study
from adaskip.common.files import write_text_atomic
from adaskip.common.options import option
from adaskip.common.paths import given_or_default
from adaskip.core.blocks import decoder_layers, execution_device
from adaskip.core.decoding import plain_generate
from adaskip.core.plan import Budget
from adaskip.models.loading import LoadedModel
from adaskip.models.stories import CALIBRATION_STORIES, NOT_AT_HAND, STORIES, load_stories, stories_dir, tell
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from adaskip.runs.calibration import find_calibration
from adaskip.runs.cells import MODELS
from adaskip.runs.config import SharedConfig
from adaskip.runs.loading import find_loading
from adaskip.runs.manifest import describe_model
from adaskip.runs.records import find_records, prompt_ids
from adaskip.speculative import LosslessDecoder, lossless
from adaskip.strategies import Strategy, build, needs_selection
from adaskip.studies.bench.lossless_table import FULL_MODEL, render
from adaskip.studies.bench.measuring import folder_name
from adaskip.studies.bench.settings import RESULTS_DIR

WHOLE_LAYERS = ("early_exit", "unified")
STORIES_SEED = 2
"""Other stories than those of the studies of quality."""
STORY_TOKENS = 128
STORY_PROMPT_TOKENS = (20, 60)
"""Lengths of the beginnings of stories that are prompts, from .. to."""
SAME = ("prompts_fingerprint", "drafts", "weights_fingerprint", "dtype", "device_name", "threads", "versions")
"""What must be equal for a benchmark to be continued."""


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
        whole = 2 if self.strategy in WHOLE_LAYERS else 1
        return whole * round(2 * num_layers * self.share / whole)


DRAFTS = (
    Draft("adaskip", 0.25, gamma=4),
    Draft("adaskip", 0.25),
    Draft("adaskip", 0.375),
    Draft("adaskip", 0.5),
    Draft("calibrated", 0.5),
    Draft("early_exit", 0.25),
    Draft("unified", 0.25),
)


@dataclass(frozen=True, kw_only=True)
class LosslessConfig(SharedConfig):
    """The options of `speed/lossless.py`."""

    models: tuple[str, ...] = option(f"of {', '.join((*MODELS, STORIES))}", MODELS, aliases=["--model"])
    tasks: tuple[str, ...] | None = option("tasks that prompt in turns; if not given, all of the setup's")
    prompts: int = option("prompts of each model; each is answered with every draft", 40)
    new_tokens: int = option("most tokens of an answer", 64)
    output_dir: str | None = option(f"results go to a folder of the device's name in here; if not given, {RESULTS_DIR}")
    draw_only: bool = option("run no model: the table of what is saved", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.models:
            check_choice("model", name, (*MODELS, STORIES))
        if self.checkpoint is not None and (len(self.models) != 1 or STORIES in self.models):
            raise ValueError("--checkpoint is of one of the paper's models: give it with exactly one --model")
        for name, value, least in (("prompts", self.prompts, 2), ("new-tokens", self.new_tokens, 2)):
            if value < least:
                raise ValueError(f"--{name} must be at least {least}, not {value}")

    @property
    def out_dir(self) -> Path:
        return given_or_default(self.output_dir, RESULTS_DIR)

    @property
    def all_tasks(self) -> tuple[str, ...]:
        """The tasks given, or those of every phase."""
        return self.tasks or tuple(dict.fromkeys(chain(*(phase.tasks for phase in self.setup.phases.values()))))


@dataclass(frozen=True)
class Subject:
    """A model and what it is asked. prompts: token ids, 1-D. calibration: those that importance is measured on.
    searched: those that the sets of calibrated are searched on."""

    loaded: LoadedModel
    prompts: Sequence[Tensor]
    calibration: Sequence[Tensor]
    searched: Sequence[Tensor]

    @property
    def stops(self) -> tuple[int, ...]:
        return self.loaded.spec.stop_token_ids

    @property
    def pad(self) -> int:
        tokenizer: Any = self.loaded.tokenizer
        return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def main(doc: str | None) -> int:
    """The script's whole life; returns its exit code. doc: the script's docstring."""
    return study(doc, LosslessConfig, _run)


def _run(config: LosslessConfig) -> int:
    folders = {path.parent for path in config.out_dir.glob("*/lossless-*.json")}
    if not config.draw_only:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        for name in config.models:
            if name == STORIES and stories_dir() is None:
                print(NOT_AT_HAND)
            else:
                folders.add(measure(config, name))
    if not folders:
        raise ValueError(f"nothing is saved in {config.out_dir}; leave out --draw-only")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for folder in sorted(folders):
        text = render(sorted(folder.glob("lossless-*.json"), key=_order))
        console.print(text)
        console.print(f"wrote {write_text_atomic(folder / 'lossless.md', text)}")
    return 0


def _order(path: Path) -> int:
    name = path.stem.removeprefix("lossless-")
    return [*MODELS, STORIES, name].index(name)


def measure(config: LosslessConfig, name: str) -> Path:
    """Answer one model's prompts, going on with those that its file has already; the folder of the file.

    Raises ValueError if the file is of other prompts, drafts, weights or another machine.
    """
    subject = _of_stories(config) if name == STORIES else _of_tasks(config, name)
    model: Any = subject.loaded.model
    folder = config.out_dir / folder_name(model.device)
    path = folder / f"lossless-{name}.json"
    manifest = {
        **describe_model(subject.loaded),
        "checkpoint": Path(subject.loaded.spec.checkpoint).name,  # the folder, wherever it lies
        "model": name,
        "prompts_fingerprint": _fingerprint(subject.prompts, config.new_tokens),
        "drafts": [str(draft) for draft in DRAFTS],
    }
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if saved and (other := [key for key in SAME if saved["manifest"].get(key) != manifest[key]]):
        raise ValueError(f"{path} was measured with other {', '.join(other)}; give another --output-dir")
    records: list[dict[str, Any]] = saved.get("records", [])
    if len(records) == len(subject.prompts):
        return folder
    strategies = strategies_for(subject, folder / f"selection-{name}.json")
    manifest["plans"] = {str(draft): strategy.skipped.to_dict() for draft, strategy in strategies.items()}
    decoders: dict[str, LosslessDecoder | None] = {FULL_MODEL: None}
    decoders |= {str(draft): lossless(model, strategy, gamma=draft.gamma) for draft, strategy in strategies.items()}
    for decoder in decoders.values():  # warm up
        answer(subject, subject.prompts[0], config.new_tokens, decoder)
    names = list(decoders)
    for i in tqdm(range(len(records), len(subject.prompts)), desc=name, unit="prompt", disable=None):
        turn = names[i % len(names) :] + names[: i % len(names)]
        answers = {way: answer(subject, subject.prompts[i], config.new_tokens, decoders[way]) for way in turn}
        records.append({"prompt_tokens": len(subject.prompts[i]), "answers": {way: answers[way] for way in names}})
        write_text_atomic(path, json.dumps({"manifest": manifest, "records": records}) + "\n")
    return folder


def _of_tasks(config: LosslessConfig, name: str) -> Subject:
    """A model of the paper or the testbed; the tasks take turns."""
    loaded, records, tasks = find_loading(config, name).load(), find_records(config), config.all_tasks
    each = -(-config.prompts // len(tasks))
    columns = [prompt_ids(records.benchmark, task, records.scored(task, each), loaded) for task in tasks]
    prompts = [ids for row in zip_longest(*columns) for ids in row if ids is not None]
    calibration = find_calibration(config).data(loaded)["prompts"]
    unscored = records.unscored(tasks, config.setup.search_samples)
    searched = [prompt_ids(records.benchmark, task, [sample], loaded)[0] for task, sample in unscored]
    return Subject(loaded, prompts[: config.prompts], calibration, searched)


def _of_stories(config: LosslessConfig) -> Subject:
    """stories260K, which goes on with the beginnings of stories it told; other stories calibrate."""
    loaded = load_stories()
    told = tell(loaded, CALIBRATION_STORIES + config.prompts, STORY_TOKENS, STORIES_SEED)
    shortest, longest = STORY_PROMPT_TOKENS
    spread = longest - shortest + 1
    begun = [story[: shortest + i % spread] for i, story in enumerate(told[CALIBRATION_STORIES:])]
    return Subject(loaded, begun, told[:CALIBRATION_STORIES], told[:CALIBRATION_STORIES])


def _fingerprint(prompts: Sequence[Tensor], new_tokens: int) -> str:
    told = str([new_tokens, *(prompt.tolist() for prompt in prompts)])
    return hashlib.sha256(told.encode()).hexdigest()


def strategies_for(subject: Subject, selection_path: Path) -> dict[Draft, Strategy]:
    """The drafts as strategies of this model; the sets calibrated drafts by are searched once and kept."""
    model, depth = subject.loaded.model, len(decoder_layers(subject.loaded.model))
    importance = calibrate(model, subject.calibration)
    searched = [draft.sublayers(depth) for draft in DRAFTS if needs_selection(draft.strategy)]
    selection = _selection(subject, importance, max(searched), selection_path) if searched else None
    made = {}
    for draft in DRAFTS:
        profile = selection if needs_selection(draft.strategy) else importance
        budget = Budget(sublayers=draft.sublayers(depth))
        strategy = build(draft.strategy, phase="decode", budget=budget, num_layers=depth, profile=profile)
        assert strategy is not None, "no draft is the full model"
        made[draft] = strategy
    return made


def _selection(subject: Subject, importance: ImportanceProfile, up_to: int, path: Path) -> SelectionProfile:
    if path.is_file():
        return SelectionProfile.load(path, subject.loaded.model)
    ends = {"eos_token_ids": subject.stops, "pad_token_id": subject.pad}
    progress_path = path.with_suffix(".partial.jsonl")
    selection = select(
        subject.loaded.model,
        subject.searched,
        "decode",
        up_to=up_to,
        importance=importance,
        progress_path=progress_path,
        show_progress=True,
        **ends,
    )
    selection.save(path)
    progress_path.unlink()
    return selection


class _FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first token is there."""

    def __init__(self) -> None:
        self.time_s: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # pyright: ignore
        if self.time_s is None:
            self.time_s = timer()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def answer(subject: Subject, prompt: Tensor, new_tokens: int, decoder: LosslessDecoder | None) -> dict[str, Any]:
    """One greedy answer: its tokens, the seconds after the first one, what drafting took. decoder: None for stock."""
    model: Any = subject.loaded.model
    ids, first = prompt[None].to(execution_device(model)), _FirstToken()
    output = plain_generate(
        model,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        eos_token_id=list(subject.stops) or None,
        pad_token_id=subject.pad,
        stopping_criteria=StoppingCriteriaList([first]),
        **({} if decoder is None else {"custom_generate": decoder}),
    )
    end_s = timer()
    assert first.time_s is not None, "an answer has a first token"
    record = {"tokens": output[0, len(prompt) :].tolist(), "decode_s": end_s - first.time_s}
    return record if decoder is None else {**record, **asdict(decoder.last_request)}
