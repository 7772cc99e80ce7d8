"""`eval/online_ablation.py`: AdaSkip in the decode phase with and without online learning, for several P and beta.

For models that run tasks, each variant is a run like any other; for stories260K its loss is measured story by story.
One JSON file keeps the quality of each sample and the number of skipped sublayers, by model and variant.
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
from adaskip.common.files import write_text_atomic
from adaskip.common.locks import exclusive
from adaskip.common.options import option
from adaskip.core.plan import Budget
from adaskip.models.loading import LoadedModel
from adaskip.models.source import find_source
from adaskip.models.stories import NOT_AT_HAND, STORIES, load_stories, stories_dir, tell_split
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
from adaskip.studies.study import StudyConfig, read_json
from adaskip.studies.tables.runs import load_run
from adaskip.studies.tables.scores import score_run

SAMPLES_FILE = "online_ablation_samples.json"
SCORE, REFERENCE_LOSS = "score", "reference_loss"
WINDOWS = (5, 10, 20, 40)
QUANTILES = (0.1, 0.25, 0.5)
OFFLINE = (1.0, 1.5, 2.0, 2.5, 3.0)
"""Budgets without online learning, as multiples of the smallest, which is the budget with online learning."""
STORIES_BUDGETS = (2, 3, 4, 5, 6)
"""The same for stories260K, of 10 sublayers."""
STORY_TOKENS, PROMPT_TOKENS = 128, 16
"""Length of a story, and of its prompt, in tokens."""
SOURCES = (
    *("checkpoint", "weights_fingerprint", "num_layers", "dtype", "device", "tasks", "max_new_tokens", "batch_size"),
    *("data_fingerprint", "profile_fingerprint", "versions", "git_commit"),
)
"""Fields of a run's manifest that are saved with the numbers."""
NO_SOURCES = ("variant", "checkpoint", "started", "finished", "resumed", "measured")
"""Fields of a manifest of stories that are not."""


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
    """The full model, every budget without online learning, and the smallest one with every P and beta."""
    betas = (*sorted(quantiles), None)
    online = [Variant(budgets[0], window, beta) for window in windows for beta in betas]
    return [Variant(0), *map(Variant, budgets), *online]


@dataclass(frozen=True, kw_only=True)
class AblationConfig(StudyConfig):
    """The options of `eval/online_ablation.py`."""

    folder = "online"

    tasks: tuple[str, ...] = option("tasks, with answers longer than P", ("gov_report", "multi_news"))
    limit: int = option("number of samples of each task", 8, least=1)
    quality: str = option(
        f"measure of an answer: {SCORE}, or {REFERENCE_LOSS} (loss of the reference answer)",
        SCORE,
        choices=(SCORE, REFERENCE_LOSS),
    )
    stories: int = option(
        f"number of stories for {STORIES}, which is in the folder of the environment variable ADASKIP_REAL; 0 for none",
        24,
    )
    windows: tuple[int, ...] = option("values of P, the learning window in tokens", WINDOWS, least=1, distinct=True)
    quantiles: tuple[float, ...] = option(
        "values of beta besides the paper's, as quantiles of FFN similarity", QUANTILES, distinct=True
    )
    max_new_tokens: int | None = option(
        "maximum number of new tokens per answer; default: the cap of the phase", least=1
    )
    jobs: int | None = option("number of parallel runs; default: with --testbed one per core, else one", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= quantile <= 1 for quantile in self.quantiles):
            raise ValueError(f"--quantiles must be from 0 to 1, not {' '.join(map(str, self.quantiles))}")

    @property
    def num_jobs(self) -> int:
        return self.jobs or ((os.cpu_count() or 1) if self.find_benchmark().models else 1)

    def variants(self, name: str) -> list[Variant]:
        """The variants of a model; its budgets are multiples of the smallest budget for its depth."""
        if name == STORIES:
            return variants(STORIES_BUDGETS, self.windows, self.quantiles)
        loading = find_loading(self, name)
        least = min(self.setup_of(loading.source.entry).budgets_for(loading.num_layers))
        budgets = [count for factor in OFFLINE if (count := round(least * factor)) < 2 * loading.num_layers]
        return variants(budgets, self.windows, self.quantiles)


Results = dict[str, Any]
"""Saved results of one model. measure: SCORE, REFERENCE_LOSS, or `loss` of a story. sources: what the numbers were
measured on. variants: their fields, and `samples`: for each its id, quality (score or negative loss: higher is better),
skipped sublayers per decode step, FFNs added online, and milliseconds per token (None if not measured)."""


def measure(config: AblationConfig) -> None:
    """Complete every run and save what the findings need; finished runs are skipped.

    Raises:
        ValueError: a run is impossible, or its folder contains another run or is in use.
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
    """Complete the run of a variant; if it is finished, no model is loaded."""
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
        batch_size=1,  # online learning is per request
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
                # An answer that ends by itself has an end token, which is not in the record but took a step.
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
    """Sublayers skipped per decode step: the offline set in all steps, the added FFNs after the window."""
    return variant.sublayers + (added * max(0, steps - variant.window) / steps if steps else 0.0)


def ensure_stories(config: AblationConfig, variant: Variant) -> None:
    """Measure the missing stories of a variant."""
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
    """The model, its profile measured on its own stories, and `count` other stories to measure on."""
    loaded = load_stories()
    calibration, told = tell_split(loaded, count, STORY_TOKENS, seed)
    return loaded, calibrate(loaded.model, calibration), told


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
    """Save the results of these models in the file, replacing older ones of the same models."""
    path = config.out_dir / SAMPLES_FILE
    with exclusive(path.with_suffix(".lock"), wait=True):
        both = {**read_json(path), **results}
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(each, allow_nan=False)}" for name, each in both.items())
        write_text_atomic(path, f"{{\n{lines}\n}}\n")
