"""`speed/lossless.py`: lossless mode against the full model, side by side.

Each prompt is answered greedily by stock `generate` and with every draft, in turns, the first one changing from prompt
to prompt, so that a drifting machine affects all alike. Answers are saved in a file per model after every prompt: a
stopped run continues. The sets that draft are found on other samples than those that prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame
from torch import Tensor
from tqdm import tqdm

from adaskip.calibration.measure import calibrate
from adaskip.calibration.select import select
from adaskip.common.choices import check_choice
from adaskip.common.files import write_text_atomic
from adaskip.common.intervals import ratio_estimate
from adaskip.common.options import option
from adaskip.core.blocks import decoder_layers, execution_device
from adaskip.core.plan import Budget
from adaskip.models.loading import LoadedModel
from adaskip.models.source import find_source
from adaskip.models.stories import CALIBRATION_STORIES, NOT_AT_HAND, STORIES, load_stories, stories_dir, tell
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from adaskip.runs.cells import MODELS
from adaskip.runs.job import resolve
from adaskip.runs.manifest import describe_model
from adaskip.runs.records import prompt_ids
from adaskip.speculative import LosslessDecoder, lossless
from adaskip.speculative.draft_length import break_even_acceptance, expected_speedup
from adaskip.speculative.statistics import DraftStatistics
from adaskip.strategies import Strategy, build, needs_selection, strategy_class
from adaskip.studies.bench.measuring import folder_name
from adaskip.studies.bench.settings import RESULTS_DIR
from adaskip.studies.bench.timing import timed_generation
from adaskip.studies.study import Findings, Study, StudyConfig, prompts_of

FULL_MODEL = "full"
STORIES_SEED = 2
"""Other stories than those of the studies of quality."""
STORY_TOKENS = 128
STORY_PROMPT_TOKENS = (20, 60)
"""Lengths of the beginnings of stories that are prompts, from .. to."""
SAME = ("prompts_fingerprint", "drafts", "weights_fingerprint", "dtype", "device_name", "threads", "versions")
"""What must be equal for a benchmark to be continued."""
NOTE = """\
Greedy answers, decode time after the first token, full model / lossless, ratio of means with a 95 % bootstrap interval
over prompts. c: what drafting and verifying a token takes beyond one decode step of the full model a round, in such
steps, host time included. A round of g drafted tokens yields (1 - a^(g+1)) / (1 - a) tokens in the time of 1 + g c
steps; below break-even it is slower than the full model."""


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
    Draft("adaskip", 0.25, gamma=4),
    *(Draft("adaskip", share) for share in (0.25, 0.375, 0.5)),
    *(Draft(*way) for way in (("calibrated", 0.5), ("early_exit", 0.25), ("unified", 0.25))),
)
STRATEGIES = tuple(dict.fromkeys(draft.strategy for draft in DRAFTS))


@dataclass(frozen=True, kw_only=True)
class LosslessConfig(StudyConfig):
    """The options of `speed/lossless.py`."""

    folder = RESULTS_DIR
    extra_models = (STORIES,)

    strategies: tuple[str, ...] = option(f"what drafts, of {', '.join(STRATEGIES)}", STRATEGIES)
    prompts: int = option("prompts of each model; each is answered with every draft", 40)
    new_tokens: int = option("most tokens of an answer", 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.strategies:
            check_choice("strategy that drafts", name, STRATEGIES)
        for name in ("prompts", "new_tokens"):
            if getattr(self, name) < 2:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 2, not {getattr(self, name)}")

    @property
    def drafts(self) -> tuple[Draft, ...]:
        return tuple(draft for draft in DRAFTS if draft.strategy in self.strategies)


@dataclass(frozen=True)
class Subject:
    """A model and its prompts, token ids, 1-D. calibration: those that importance is measured on. searched: those that
    the sets of calibrated are searched on."""

    loaded: LoadedModel
    prompts: Sequence[Tensor]
    calibration: Sequence[Tensor]
    searched: Sequence[Tensor]

    @property
    def ends(self) -> dict[str, Any]:
        """The tokens that end an answer, and the one that pads."""
        tokenizer: Any = self.loaded.tokenizer
        pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return {"eos_token_id": list(self.loaded.spec.stop_token_ids) or None, "pad_token_id": pad}


def measure(config: LosslessConfig) -> None:
    """Answer the prompts of every model."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    for name in config.models:
        if name == STORIES and stories_dir() is None:
            print(NOT_AT_HAND)
        elif name == STORIES:
            _measure(config, STORIES, _of_stories(config))
        else:
            _measure(config, find_source(name).name, _of_tasks(config, name))


def _of_tasks(config: LosslessConfig, name: str) -> Subject:
    """Tasks prompt in turns: those given, or those of every phase."""
    entry = find_source(name, config.checkpoint).entry
    phases = config.setup_of(entry).phases.values()
    tasks = config.tasks or tuple(dict.fromkeys(chain(*(phase.tasks for phase in phases))))
    job = resolve(config.run_config(name, phase="decode", strategy="adaskip", tasks=tasks))
    loaded, records, calibration = job.loading.load(), job.records, job.calibration
    assert calibration is not None, "of strategy adaskip"
    each = -(-config.prompts // len(tasks))
    columns = [prompt_ids(records.benchmark, task, records.scored(task, each), loaded) for task in tasks]
    prompts = [ids for row in zip_longest(*columns) for ids in row if ids is not None]
    searches = any(needs_selection(draft.strategy) for draft in config.drafts)
    searched = prompts_of(calibration, calibration.searched, loaded) if searches else []
    return Subject(loaded, prompts[: config.prompts], calibration.data(loaded)["prompts"], searched)


def _of_stories(config: LosslessConfig) -> Subject:
    """stories260K, which goes on with the beginnings of stories it told; other stories calibrate."""
    loaded = load_stories()
    told = tell(loaded, CALIBRATION_STORIES + config.prompts, STORY_TOKENS, STORIES_SEED)
    shortest, longest = STORY_PROMPT_TOKENS
    spread = longest - shortest + 1
    begun = [story[: shortest + i % spread] for i, story in enumerate(told[CALIBRATION_STORIES:])]
    return Subject(loaded, begun, told[:CALIBRATION_STORIES], told[:CALIBRATION_STORIES])


def _measure(config: LosslessConfig, name: str, subject: Subject) -> None:
    """Answer one model's prompts that its file does not have yet.

    Raises ValueError if the file is of other prompts, drafts, weights or another machine.
    """
    model: Any = subject.loaded.model
    path = config.out_dir / folder_name(model.device) / f"lossless-{name}.json"
    told = str([config.new_tokens, *(prompt.tolist() for prompt in subject.prompts)])
    manifest = {
        **describe_model(subject.loaded),
        "checkpoint": Path(subject.loaded.spec.checkpoint).name,  # the folder, wherever it lies
        "model": name,
        "prompts_fingerprint": hashlib.sha256(told.encode()).hexdigest(),
        "drafts": [str(draft) for draft in config.drafts],
    }
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if saved and (other := [key for key in SAME if saved["manifest"].get(key) != manifest[key]]):
        raise ValueError(f"{path} was measured with other {', '.join(other)}; give another --output-dir")
    records: list[dict[str, Any]] = saved.get("records", [])
    if len(records) == len(subject.prompts):
        return
    strategies = strategies_for(subject, config.drafts, path.with_name(f"selection-{name}.json"))
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


def strategies_for(subject: Subject, drafts: Sequence[Draft], selection_path: Path) -> dict[Draft, Strategy]:
    """The drafts as strategies of this model; the sets calibrated drafts by are searched once and kept."""
    model, depth = subject.loaded.model, len(decoder_layers(subject.loaded.model))
    importance, made = calibrate(model, subject.calibration), {}
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
        pad_token_id=subject.ends["pad_token_id"],
        importance=importance,
        progress_path=progress_path,
        show_progress=True,
    )
    selection.save(path)
    progress_path.unlink()
    return selection


def answer(subject: Subject, prompt: Tensor, new_tokens: int, decoder: LosslessDecoder | None) -> dict[str, Any]:
    """One greedy answer: its tokens, the seconds after the first one, what drafting took. decoder: None for stock."""
    model: Any = subject.loaded.model
    options = {} if decoder is None else {"custom_generate": decoder}
    ids = prompt[None].to(execution_device(model))
    timed = timed_generation(model, None, ids, new_tokens, "wall", **subject.ends, **options)
    record = {"tokens": timed.tokens[0, len(prompt) :].tolist(), "decode_s": sum(timed.steps_s)}
    return record if decoder is None else {**record, **asdict(decoder.last_request)}


Saved = dict[str, list[dict[str, Any]]]
"""By device's folder, the contents of its files in the order in which they are shown."""


def read(config: LosslessConfig) -> Saved:
    """Everything saved; ValueError if nothing is."""
    names = [f"lossless-{name}" for name in (*MODELS, STORIES)]
    paths = sorted(config.out_dir.glob("*/lossless-*.json"), key=lambda path: [*names, path.stem].index(path.stem))
    if not paths:
        raise ValueError(f"nothing is saved in {config.out_dir}; leave out --draw-only")
    folders = sorted({path.parent.name for path in paths})
    return {f: [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.parent.name == f] for f in folders}


def find(saved: Saved) -> list[Findings]:
    """Differing tokens, acceptance, speedup and break-even of every draft, device by device."""
    found = []
    for folder, files in saved.items():
        rows = [_row(each, draft) for each in files for draft in each["manifest"]["drafts"]]
        compared, differing = (sum(int(row[name]) for row in rows) for name in ("answers", "differing"))
        total = f"{compared} answers compared with stock `generate`, {differing} differing."
        where = dict.fromkeys(_where(each["manifest"]) for each in files)
        found.append(
            Findings(
                name="lossless",
                title="Lossless mode against the full model",
                notes=[NOTE, total, *where],
                claims=[],
                table=DataFrame(rows),
                has_figure=False,
                kinds=["md"],
                subfolder=folder,
            )
        )
    return found


def _where(manifest: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {manifest['versions'][name]}" for name in ("torch", "transformers"))
    device = f"{manifest['device_name']} ({manifest['device']}), {manifest['threads']} CPU threads"
    return f"{device}, {manifest['dtype']}, {versions}."


def _row(saved: dict[str, Any], draft: str) -> dict[str, str]:
    """One line of the table: a draft of a saved file."""
    answers, plan = [record["answers"] for record in saved["records"]], saved["manifest"]["plans"][draft]
    full, mine = ([each[way] for each in answers] for way in (FULL_MODEL, draft))
    seen = DraftStatistics()
    for each in mine:
        seen += DraftStatistics(**{field.name: each[field.name] for field in fields(DraftStatistics)})
    full_s = [each["decode_s"] for each in full]
    speedup = ratio_estimate(full_s, [each["decode_s"] for each in mine])
    assert speedup is not None, "every answer takes time"
    row = {
        "model": saved["manifest"]["model"],
        "draft": draft,
        "attention + FFN skipped": f"{len(plan['attention'])} + {len(plan['ffn'])}",
        "answers": str(len(mine)),
        "differing": str(sum(a["tokens"] != b["tokens"] for a, b in zip(full, mine, strict=True))),
    }
    row |= _costs(seen, sum(full_s) / sum(len(each["tokens"]) - 1 for each in full))
    return {**row, "speedup measured": f"{speedup.value:.3f} [{speedup.low:.3f}, {speedup.high:.3f}]"}


def _costs(seen: DraftStatistics, step_s: float) -> dict[str, str]:
    """step_s: of a decode step of the full model."""
    names = ("acceptance a", "tokens per verification", "cost c of a drafted token", "break-even a")
    names += ("speedup expected from a and c",)
    if not seen.draft_forwards or seen.acceptance_rate is None or seen.tokens_per_verify is None:
        return dict.fromkeys(names, "n/a")
    cost = (seen.draft_s + seen.verify_s - seen.verify_forwards * step_s) / seen.draft_forwards / step_s
    length = max(1, round(seen.draft_forwards / seen.verify_forwards))
    even = break_even_acceptance(cost, length)
    expected = expected_speedup(seen.acceptance_rate, length, cost)
    shown = (f"{seen.acceptance_rate:.3f}", f"{seen.tokens_per_verify:.2f}", f"{cost:.3f}")
    return dict(zip(names, (*shown, "none" if even is None else f"{even:.3f}", f"{expected:.3f}"), strict=True))


STUDY = Study(LosslessConfig, measure, read, find=lambda saved, config: find(saved))
main = STUDY.main
