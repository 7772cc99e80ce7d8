"""`eval/online_ablation.py`: AdaSkip in the decode phase with and without online learning, its P and beta varied.

On models that run tasks each variant is a run like any other; on stories260K its loss is measured story by story. Of
every model and variant each sample's quality, and how much was skipped, are kept in one JSON file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from adaskip.calibration.measure import calibrate
from adaskip.common.choices import check_choice
from adaskip.common.files import write_text_atomic
from adaskip.common.options import option
from adaskip.core.plan import Budget
from adaskip.models.loading import LoadedModel
from adaskip.models.source import find_source
from adaskip.models.stories import CALIBRATION_STORIES, NOT_AT_HAND, STORIES, load_stories, stories_dir, tell
from adaskip.profiles.importance import ImportanceProfile
from adaskip.runs.config import RunConfig
from adaskip.runs.folder import RunFolder
from adaskip.runs.job import resolve
from adaskip.runs.loading import find_loading
from adaskip.runs.manifest import describe_model, is_done
from adaskip.runs.runner import run
from adaskip.strategies import FULL, AdaSkip
from adaskip.studies.ablation.stories import token_losses
from adaskip.studies.side_by_side import Work, side_by_side
from adaskip.studies.study import StudyConfig
from adaskip.studies.tables.runs import load_run
from adaskip.studies.tables.scores import score_run

SAMPLES_FILE = "online_ablation_samples.json"
SCORE, REFERENCE_LOSS = "score", "reference_loss"
WINDOWS = (5, 10, 20, 40)
QUANTILES = (0.1, 0.25, 0.5)
OFFLINE = (1.0, 1.5, 2.0, 2.5, 3.0)
"""Budgets without online learning, as multiples of the least one, which is the one with it."""
STORIES_BUDGETS = (2, 3, 4, 5, 6)
"""The same for stories260K, of 10 sublayers."""
STORY_TOKENS, PROMPT_TOKENS = 128, 16
"""Length of a story, and of its beginning, which is the prompt."""
SOURCES = (
    *("checkpoint", "weights_fingerprint", "num_layers", "dtype", "device", "tasks", "max_new_tokens", "batch_size"),
    *("data_fingerprint", "profile_fingerprint", "versions", "git_commit"),
)
"""Fields of a run's manifest that go with the numbers."""
NO_SOURCES = ("variant", "checkpoint", "started", "finished", "resumed", "measured")
"""Fields of a manifest of stories that do not."""


@dataclass(frozen=True)
class Variant:
    """AdaSkip in the decode phase. window: P, 0 for no online learning. quantile: beta's, None for the paper's beta."""

    sublayers: int
    window: int = 0
    quantile: float | None = None

    @property
    def label(self) -> str:
        """`4-off`, `4-P20-paper` or `4-P20-q0.5`; `0-off` is the full model."""
        return f"{self.sublayers}-{f'P{self.window}-{self.beta}' if self.window else 'off'}"

    @property
    def beta(self) -> str:
        return "paper" if self.quantile is None else f"q{self.quantile:g}"


def variants(budgets: Sequence[int], windows: Sequence[int], quantiles: Sequence[float]) -> list[Variant]:
    """The full model, every budget without online learning, and the least one with it under every P and beta."""
    betas = (*sorted(quantiles), None)
    online = [Variant(budgets[0], window, beta) for window in windows for beta in betas]
    return [Variant(0), *map(Variant, budgets), *online]


@dataclass(frozen=True, kw_only=True)
class AblationConfig(StudyConfig):
    """The options of `eval/online_ablation.py`."""

    folder = "online"

    tasks: tuple[str, ...] = option("tasks with answers longer than P", ("gov_report", "multi_news"))
    limit: int = option("samples of each task", 8)
    quality: str = option(f"measure of an answer: {SCORE}, or {REFERENCE_LOSS} (loss of the reference answer)", SCORE)
    stories: int = option(f"stories for {STORIES}, where ADASKIP_REAL names the folder that holds it; 0 for none", 24)
    windows: tuple[int, ...] = option("values of P", WINDOWS)
    quantiles: tuple[float, ...] = option("values of beta beside the paper's, quantiles of FFN similarity", QUANTILES)
    max_new_tokens: int | None = option("most tokens of an answer; if not given, the phase's cap")
    jobs: int | None = option("runs side by side; if not given, with --testbed one per core, else one")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("--quality", self.quality, (SCORE, REFERENCE_LOSS))
        if min(self.windows, default=0) < 1:
            raise ValueError(f"--windows are at least 1 token each; got {' '.join(map(str, self.windows)) or 'none'}")
        if not all(0 <= quantile <= 1 for quantile in self.quantiles):
            raise ValueError(f"--quantiles lie between 0 and 1; got {' '.join(map(str, self.quantiles))}")

    @property
    def num_jobs(self) -> int:
        return self.jobs or ((os.cpu_count() or 1) if self.find_benchmark().models else 1)

    def variants(self, name: str) -> list[Variant]:
        """Of a model: its budgets are multiples of the least one of a model of its depth."""
        if name == STORIES:
            return variants(STORIES_BUDGETS, self.windows, self.quantiles)
        loading = find_loading(self, name)
        least = min(self.setup_of(loading.source.entry).budgets_for(loading.num_layers))
        return variants([round(least * factor) for factor in OFFLINE], self.windows, self.quantiles)


Results = dict[str, Any]
"""Of one model, as it is saved. measure: SCORE, REFERENCE_LOSS, or `loss` of a story. sources: what the numbers were
measured on. variants: of each its fields, and `samples`: of each its id, quality (score, or negative loss: more is
better), sublayers skipped per decode step, FFNs that joined online, and milliseconds per token (None where not
measured)."""


def measure(config: AblationConfig) -> None:
    """Bring every run to its end and keep what the findings need; what is finished is passed over.

    Raises:
        ValueError: a run cannot be, or its folder holds another or is in use.
        RunError: a run failed half-way; the same command continues.
    """
    work: list[Work] = [(ensure_run, (config, name, v)) for name in config.models for v in config.variants(name)]
    with_stories = config.stories > 0 and stories_dir() is not None
    if with_stories:
        work += [(ensure_stories, (config, variant)) for variant in config.variants(STORIES)]
    elif config.stories > 0:
        print(NOT_AT_HAND, file=sys.stderr)
    with tqdm(total=len(work), desc="online ablation", unit="run", disable=None) as bar:
        side_by_side(work, min(config.num_jobs, len(work)), lambda place: bar.update())
    results = {find_source(name).name: read_runs(config, name) for name in config.models}
    keep(config, {**results, **({STORIES: read_stories(config)} if with_stories else {})})


def ensure_run(config: AblationConfig, model: str, variant: Variant) -> None:
    """Bring one variant's run to its end; loads no model where it is already there."""
    cell = _run_config(config, model, variant)
    if not is_done(resolve(cell)):
        run(cell)


def _run_config(config: AblationConfig, model: str, variant: Variant) -> RunConfig:
    learning: dict[str, Any] = {}
    if variant.sublayers:
        learning = {"learning_window": variant.window, "beta_quantile": variant.quantile, "budget": variant.sublayers}
    return config.run_config(
        model,
        phase="decode",
        strategy=AdaSkip.name if variant.sublayers else FULL,
        **learning,
        output_dir=str(config.out_dir / "runs" / variant.label),
        threads=config.threads or (1 if config.num_jobs > 1 else None),
        limit=config.limit,
        batch_size=1,  # what is learnt is learnt of one request
        max_new_tokens=config.max_new_tokens,
    )


def read_runs(config: AblationConfig, model: str) -> Results:
    """The quality of the answers in the finished runs of a model. Raises ValueError if a record has no loss."""
    sources, by_variant = {}, []
    for variant in config.variants(model):
        found, samples = load_run(resolve(_run_config(config, model, variant)).folder.path), []
        sources |= {field: found.manifest[field] for field in SOURCES if found.manifest.get(field) is not None}
        for task, scored in score_run(found).tasks.items():
            most = found.manifest["max_new_tokens"][task]
            for name, record in scored.records.by_id.items():
                # An answer that ends by itself has an end token, which is no part of the record but took a step.
                steps, added = min(record["new_tokens"], most - 1), len(record["online_ffns"])
                learnt = [mean_skipped(variant, added, steps), added, record.get("tpot_ms")]
                quality = scored.main.by_id[name] if config.quality == SCORE else _negative_loss(record)
                samples.append([f"{task}/{name}", quality, *learnt])
        by_variant.append({**asdict(variant), "samples": samples})
    return {"measure": config.quality, "sources": sources, "variants": by_variant}


def _negative_loss(record: Mapping[str, Any]) -> float:
    if record.get("reference_loss") is None:
        raise ValueError(f"record {record['id']!r} has no reference loss; use --quality {SCORE}")
    return -record["reference_loss"]


def mean_skipped(variant: Variant, added: int, steps: int) -> float:
    """Sublayers skipped per decode step: the offline set from the first, what was learnt after the window."""
    return variant.sublayers + (added * max(0, steps - variant.window) / steps if steps else 0.0)


def ensure_stories(config: AblationConfig, variant: Variant) -> None:
    """Measure what is missing of one variant, story by story."""
    folder = _stories_folder(config, variant)
    torch.set_num_threads(config.threads or 1)
    loaded, profile, told = _prepared(config.stories, config.seed)
    digest = hashlib.sha256(str([story.tolist() for story in told]).encode()).hexdigest()
    description = {"measured": "loss", "variant": variant.label, "seed": config.seed, "stories_fingerprint": digest}
    strategy = None
    if variant.sublayers:
        strategy = AdaSkip(
            num_layers=profile.num_layers,
            budget=Budget(sublayers=variant.sublayers),
            phase="decode",
            profile=profile,
            learning_window=variant.window,
            beta_quantile=variant.quantile,
        )
    ids = [f"story-{number}" for number in range(len(told))]
    with folder.lock():
        folder.start({**description, "tokens": STORY_TOKENS, **describe_model(loaded)})
        for i in folder.merge("stories", ids, batch_size=1):
            of_tokens, online = token_losses(loaded.model, strategy, told[i][None], PROMPT_TOKENS)
            decoded = of_tokens[0, 1:]  # the first token comes from the prompt's forward
            record = {"loss": float(decoded.mean()), "steps": len(decoded), "online_ffns": online}
            folder.append("stories", [{"id": ids[i], "index": i, **record}])
        folder.merge("stories", ids, batch_size=1)
        folder.finish()


def _stories_folder(config: AblationConfig, variant: Variant) -> RunFolder:
    return RunFolder(config.out_dir / "runs" / STORIES / variant.label)


@lru_cache(maxsize=1)
def _prepared(count: int, seed: int) -> tuple[LoadedModel, ImportanceProfile, list[Tensor]]:
    """The model, its profile on stories of its own, and `count` others to measure on."""
    loaded = load_stories()
    told = tell(loaded, CALIBRATION_STORIES + count, STORY_TOKENS, seed)
    return loaded, calibrate(loaded.model, told[:CALIBRATION_STORIES]), told[CALIBRATION_STORIES:]


def read_stories(config: AblationConfig) -> Results:
    """The finished measurements of stories260K."""
    manifest, by_variant = {}, []
    for variant in config.variants(STORIES):
        folder, samples = _stories_folder(config, variant), []
        manifest = folder.read_manifest() or {}
        for line in folder.records_path("stories").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            added = len(record["online_ffns"])
            skipped = mean_skipped(variant, added, record["steps"])
            samples.append([record["id"], -record["loss"], skipped, added, None])
        by_variant.append({**asdict(variant), "samples": samples})
    sources = {name: value for name, value in manifest.items() if name not in NO_SOURCES}
    return {"measure": "loss", "sources": sources, "variants": by_variant}


def keep(config: AblationConfig, results: Mapping[str, Results]) -> None:
    """Put these models' results into the file, in place of what it holds of them."""
    path = config.out_dir / SAMPLES_FILE
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    both = {**held, **results}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(each, allow_nan=False)}" for name, each in both.items())
    write_text_atomic(path, f"{{\n{lines}\n}}\n")


def read(config: AblationConfig) -> dict[str, Results]:
    """Everything kept, by model; ValueError if nothing is."""
    path = config.out_dir / SAMPLES_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; leave out --draw-only")
    return json.loads(path.read_text(encoding="utf-8"))
